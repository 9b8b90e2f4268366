"""What a machine may choose of: the table, what holds, and that results stay what they are whatever is chosen."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from metal_kernels import choices, chunk_lightning_attn, dispatch, launch
from metal_kernels.choices import TABLE
from ring_mlx.generation.decoding import prefill_step_or_default
from tests.compare import assert_close
from tests.kernel_backends import backends
from tests.tiny import PACKABLE, make_model, tokens

BACKENDS = ("metal", "cuda", "simulator", choices.CPU, choices.PLAIN)


@pytest.fixture(autouse=True)
def nothing_applied(monkeypatch):
    monkeypatch.setattr(choices, "applied", {})


@pytest.fixture
def cpu():
    """No backend runs kernels, whatever this machine has."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.mark.parametrize("where", BACKENDS)
def test_each_default_is_one_of_the_values(where):
    for name, entry in TABLE.items():
        values = entry.values_on(where)
        assert not values or entry.default_on(where) in values, name
        assert len(set(values)) == len(values), name


def test_mlx_is_among_the_values_of_each_kernel():
    for name, entry in TABLE.items():
        values = entry.values_on("metal")
        assert choices.KERNEL not in values or choices.MLX in values, name


def test_what_is_tried_comes_before_what_is_applied_and_that_before_the_table():
    name = "norm_qmv/5-8"
    assert choices.chosen(name, "cuda") == choices.TALL
    assert choices.chosen(name, "metal") == choices.KERNEL
    choices.apply({name: choices.HALF}, "cuda")
    assert choices.chosen(name, "cuda") == choices.HALF
    assert choices.chosen(name, "metal") == choices.KERNEL
    with choices.use({}):
        assert choices.chosen(name, "cuda") == choices.TALL
    choices.apply({}, "cuda")
    assert choices.chosen(name, "cuda") == choices.TALL


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        "mlx",
        {"norm_qmv/1": "quarter"},
        {"norm_qmv/9": "mlx"},
        {"prefill_step": 513},
        {"prefill_step": "512"},
        {"prefill_step": True},
        {"norm_qmv/1": ["mlx"]},
        {"norm_qmv/1": None},
        {"prefill_step": 512.0},
        {3: 4},
    ],
)
def test_what_the_table_does_not_have_is_left_out(broken):
    choices.apply(broken, "metal")
    assert choices.active("metal") == {}


def test_a_good_choice_beside_a_broken_one_holds():
    choices.apply({"norm_qmv/1": "mlx", "gate_qmv/1": "?"}, "metal")
    assert choices.active("metal") == {"norm_qmv/1": "mlx"}


def test_what_is_asked_for_is_known_outside_too():
    with choices.use({}) as outer:
        with choices.use({}) as inner:
            choices.chosen("prefill_step")
        choices.chosen("route/1")
    assert inner == {"prefill_step"}
    assert outer == {"prefill_step", "route/1"}


@pytest.mark.usefixtures("cpu")
def test_the_step_of_a_prompt_is_as_asked_or_chosen():
    assert prefill_step_or_default() == 128
    choices.apply({"prefill_step": 64}, choices.CPU)
    assert prefill_step_or_default() == 64
    assert prefill_step_or_default(7) == 7


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("size", [16, 32, 128, choices.BY_HEAD])
def test_the_chunk_is_as_chosen(size, monkeypatch):
    q, k, v = (mx.random.normal((1, 40, 2, 32), key=mx.random.key(i)) for i in range(3))
    sizes = []

    def chunked(*arguments):
        sizes.append(arguments[-1])
        return chunk_lightning_attn(*arguments)

    monkeypatch.setattr(dispatch, "chunk_lightning_attn", chunked)
    choices.apply({"chunk_tokens/9+": size}, choices.CPU)
    o, _ = dispatch.lightning_attn(q, k, v, mx.array([0.5, 0.1]), 0.2)
    expected, _ = chunk_lightning_attn(q, k, v, mx.array([0.5, 0.1]), 0.2)
    assert sizes == [32 if size == choices.BY_HEAD else size]
    assert_close(o, expected, 1e-5)


# Every value of every kernel's entry is in one of these.
SETS = {
    "mlx": ("mlx",),
    "half": ("half", "half first", "other width"),
    "double": ("double", "double first"),
    "second": ("half second", "tall", "double", "other width"),
    "last": ("double second", "unsplit", "within", "half"),
}


SLOW = ("half", "double")  # of which the last two have most


def picked(where, wanted):
    """Of each entry the first of the wanted values that it has."""
    found = {n: next((v for v in wanted if v in e.values_on(where)), None) for n, e in TABLE.items()}
    return {n: v for n, v in found.items() if v is not None}


def test_the_sets_have_every_value():
    seen = {(n, v) for wanted in SETS.values() for n, v in picked("metal", wanted).items()}
    every = {(n, v) for n, e in TABLE.items() for v in e.values_on("metal") if isinstance(v, str)}
    assert every - seen == {(n, v) for n, v in every if v in (choices.KERNEL, choices.BY_HEAD)}


@pytest.fixture(scope="module")
def packed():
    """Two quantized layers, one of each kind, and what they make of prompts and steps with plain operations."""
    model = make_model(**PACKABLE, num_hidden_layers=2, layer_group_size=2)
    nn.quantize(model, 32, 4, class_predicate=lambda p, m: hasattr(m, "to_quantized") and "gate.gate_proj" not in p)
    with launch.use(None):
        return model, logits(model)


def logits(model):
    cache, row = model.make_cache(), tokens(42)
    found = [model(part, cache) for part in (row[:, :33], row[:, 33:39], row[:, 39:42], row[:, :1])]
    mx.eval(found)
    return mx.concatenate(found, axis=1)


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize(
    "wanted",
    [pytest.param(values, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, values in SETS.items()],
)
def test_results_stay_the_same_whatever_is_chosen(packed, backend, wanted):
    model, plain = packed
    with launch.use(backend), choices.use(picked(backend.name, wanted)):
        assert_close(logits(model), plain, 1e-4)


def recording(record):
    """A backend that notes names, template arguments and grids, and computes zeros."""

    def constructor(*, name, **_):
        def call(*, output_shapes, output_dtypes, template, grid, **_):
            record.append(f"{name} {template} {grid}")
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return call

    return launch.Backend("cuda", constructor)


# What changes nothing for two layers in float32 of few experts with heads of 32 and prompts of 33 tokens.
SAME_HERE = {
    ("recurrent/1", "other width"),
    ("experts/9+", "half"),
    *(("lightning_attn/9+", v) for v in ("half", "double", "unsplit")),
    *((f"{name}_qmv/{n}", "kernel") for name in ("norm", "gate", "add") for n in ("2-4", "5-8")),
    *((f"many_keys/{n}", "mlx") for n in ("1", "2-4", "5-8")),
    *((f"head/{n}", v) for n in ("1", "2-4", "5-8") for v in ("mlx", "half", "double")),
}


def test_each_choice_changes_what_is_launched(packed):
    def launched(chosen):
        record = []
        with launch.use(recording(record)), choices.use(chosen):
            logits(packed[0])
        return record

    default = launched({})
    single = {(n, v) for n, e in TABLE.items() for v in e.values_on("cuda") if v != e.default_on("cuda")}
    same = {(n, v) for n, v in single if isinstance(v, str) and launched({n: v}) == default}
    assert same == SAME_HERE
