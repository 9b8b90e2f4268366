"""The whole model with kernels on: the goldens, splits, padding and decode give what the plain forms give."""

from __future__ import annotations

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metal_kernels import launch
from metal_kernels.fused_qmv import fused as fused_qmv
from ring_mlx import load_model
from ring_mlx.model.moe import bundle_experts
from ring_mlx.model.tentative import Tentative
from ring_mlx.tuning import kernel_check
from ring_mlx.tuning.kernel_check import check_kernels
from tests.compare import assert_close
from tests.kernel_backends import backends, proving
from tests.tiny import GOLDENS, PACKABLE, make_model, tokens


@pytest.fixture(scope="module", params=["mini_like", "flash_like"])
def golden(request):
    folder = GOLDENS / request.param
    return load_model(folder, dtype=mx.float32), mx.load(str(folder / "golden.safetensors"))


@pytest.mark.parametrize("backend", backends("fast"))
def test_goldens_with_kernels_on(golden, backend):
    model, expected = golden
    with launch.use(backend):
        cache, hidden = model.make_cache(), []
        logits = model(expected["tokens"][None], cache, hidden_states=hidden)
        mx.eval(logits, hidden, cache.state)
    assert_close(logits[0], expected["logits"], 1e-4)
    for h, e in zip(hidden, expected["hidden"], strict=True):
        assert_close(h[0], e, 1e-4)
    for key, e in expected.items():
        if key.startswith("state."):
            assert_close(cache[int(key.split(".")[1])][0][0], e, 1e-4)


@pytest.mark.parametrize("backend", backends("fast"))
def test_prefill_then_decode_equals_the_whole(golden, backend):
    model, expected = golden
    ids = expected["tokens"][None]
    with launch.use(backend):
        cache = model.make_cache()
        parts = [model(ids[:, :29], cache), model(ids[:, 29:31], cache), model(ids[:, 31:39], cache)]
        parts += [model(ids[:, i : i + 1], cache) for i in range(39, 42)]
        logits = mx.concatenate(parts, axis=1)
        mx.eval(logits)
    assert_close(logits[0], expected["logits"][:42], 1e-4)


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize("bits", [None, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_padded_quantized_batch_equals_the_plain_forms(backend, bits):
    model = make_model(**PACKABLE)
    if bits:
        nn.quantize(
            model,
            32,
            bits,
            class_predicate=lambda p, m: hasattr(m, "to_quantized") and not p.endswith("gate.gate_proj"),
        )
    batch, step = tokens(33, B=2), tokens(1, B=2, seed=5)

    def run():
        cache = model.make_cache(left_padding=[9, 0])
        out = [model(batch, cache)[:, 9:], model(step, cache)]
        mx.eval(out)
        return out

    with launch.use(None):
        plain = run()
    with launch.use(backend):
        kernels = run()
    for k, p in zip(kernels, plain, strict=True):
        assert_close(k, p, 1e-4)


@pytest.mark.parametrize("backend", backends("fast"))
def test_a_linear_layer_decodes_in_seven_dispatches(backend, monkeypatch):
    layer = make_model(**PACKABLE, first_k_dense_replace=0).layers[0]
    assert layer.is_linear
    launched, call = [], launch.Kernel.__call__
    monkeypatch.setattr(
        launch.Kernel,
        "__call__",
        lambda self, *args, **kwargs: launched.append(self.name) or call(self, *args, **kwargs),
    )
    with launch.use(backend):
        mx.eval(layer(mx.random.normal((1, 1, 64)), None, None, 0))
    expected = ["fused_qmv", "fused_recurrent", "fused_qmv", "norm_router", "router", "decode_gate_up", "decode_down"]
    assert launched == [f"ring_{name}" for name in expected]


@pytest.mark.parametrize("backend", backends("fast"))
def test_experts_in_one_buffer_give_the_same_and_take_no_more_memory(backend):
    model = make_model(**PACKABLE)
    nn.quantize(model, 32, 4, class_predicate=lambda p, m: hasattr(m, "to_quantized") and "gate.gate_proj" not in p)
    mx.eval(model.parameters())
    expected = {name: mx.array(np.array(a)) for name, a in tree_flatten(model.parameters()) if a.dtype == mx.uint32}

    def logits():
        cache = model.make_cache()
        return mx.concatenate([model(tokens(9), cache), model(tokens(1), cache)], axis=1)

    with launch.use(backend):
        before = logits()
        mx.eval(before)
        held = mx.get_active_memory()
        for layer in model.layers:
            bundle_experts(layer.mlp)
        assert mx.get_active_memory() - held < 4096 * len(model.layers)
        assert mx.array_equal(logits(), before)
        mlp = model.layers[-1].mlp
        assert mlp.weights().buffer is not None
        mlp.switch_mlp.up_proj.scales = mlp.switch_mlp.up_proj.scales * 2
        assert mlp.weights().buffer is None
        assert not mx.array_equal(logits(), before)
    now = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(a, now[name]) for name, a in expected.items())


def test_a_changed_weight_reaches_the_kernels():
    block = make_model(**PACKABLE).layers[1].mlp
    before = block.weights()
    assert block.weights() is before
    block.switch_mlp.up_proj.weight = block.switch_mlp.up_proj.weight * 2
    assert block.weights().up.weight is block.switch_mlp.up_proj.weight
    nn.quantize(block, 32, 8, class_predicate=lambda p, m: hasattr(m, "to_quantized") and p != "gate.gate_proj")
    up = block.switch_mlp.up_proj
    assert block.weights().up.scales is up.scales
    up.scales = up.scales * 2
    assert block.weights().up.scales is up.scales


def test_training_stays_on_the_plain_forms():
    model = make_model()
    model.train()
    seen = []

    class Refuses:
        def __init__(self, *args, **kwargs):
            seen.append(args)

    with launch.use(launch.Backend("simulator", Refuses)):
        mx.eval(model(tokens(4)))
    assert not seen


class _Wrong:
    """A backend whose kernels fill their outputs with a number, or raise."""

    def __init__(self, value):
        self.value = value

    def __call__(self, *args, **kwargs):
        def run(*, output_shapes, output_dtypes, **_):
            if self.value is None:
                raise RuntimeError("no such instruction")
            kinds = [(s, d, mx.issubdtype(d, mx.floating)) for s, d in zip(output_shapes, output_dtypes, strict=True)]
            return [mx.full(s, self.value).astype(d) if is_float else mx.zeros(s, d) for s, d, is_float in kinds]

        return run


@pytest.mark.parametrize(
    ("value", "match"), [(7.0, "differs by"), (float("nan"), "is not finite"), (None, "no such instruction")]
)
def test_kernels_that_compute_nonsense_are_turned_off_with_a_warning(value, match):
    model, ids = make_model(**PACKABLE), tokens(12)
    where = proving(_Wrong(value))
    with launch.use(where), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = model(ids)
    assert any(match in str(w.message) for w in told)
    assert_close(found, model(ids), 1e-5)
    assert not any(entry["passed"] for entry in where.ledger.entries())


@pytest.mark.parametrize("backend", backends("fast"))
def test_right_kernels_prove_themselves_when_a_model_is_loaded(backend):
    where = proving(backend.constructor, backend.name)
    with launch.use(where):
        check_kernels(make_model(**PACKABLE))
    verdicts = {entry["kernel"]: entry["passed"] for entry in where.ledger.entries()}
    assert all(verdicts.values())
    assert {"ring_fused_qmv", "ring_fused_recurrent", "ring_simd_chunk", "ring_decode_down"} <= set(verdicts)


@pytest.mark.parametrize("backend", backends("fast"))
def test_steps_of_several_tokens_are_tried_when_a_model_is_loaded(backend, monkeypatch):
    model, where = make_model(**PACKABLE), proving(backend.constructor, backend.name)
    monkeypatch.setattr(kernel_check, "STEPS_S", 1e9)
    with launch.use(where):
        check_kernels(model, speculates=True)
        known = len(where.ledger.entries())
        cache = model.make_cache()
        model(tokens(9), cache, last_only=True)
        for count in range(2, 9):
            Tentative(model, cache, tokens(count).tolist()).keep([1])
    assert len(where.ledger.entries()) == known
    late = proving(backend.constructor, backend.name)
    monkeypatch.setattr(kernel_check, "STEPS_S", 0.0)
    with launch.use(late):
        check_kernels(model, speculates=True)
    assert 0 < len(late.ledger.entries()) < known


@pytest.mark.parametrize("backend", backends("fast"))
def test_no_kernel_of_a_step_reads_a_number_that_the_host_keeps(backend, monkeypatch):
    model = make_model(**PACKABLE)
    cache = model.make_cache()
    mx.eval(model(tokens(9), cache), cache.state)
    small, call = set(), launch.Kernel.__call__

    def record(self, inputs, **kwargs):
        read = {id(x): name for x, name in reversed(list(zip(inputs, self.inputs, strict=True))) if x.nbytes <= 8}
        small.update(read.values())
        return call(self, inputs, **kwargs)

    monkeypatch.setattr(launch.Kernel, "__call__", record)
    with launch.use(backend):
        mx.eval(model(tokens(1), cache))
    assert small == {"offset"}  # which a compiled step makes resident


def test_an_array_that_is_passed_twice_is_bound_once():
    kernel = launch.Kernel(fused_qmv.KERNEL.file, ("x", "gate", "weight", "residual"), ("first",))
    seen = []

    def constructor(**built):
        def run(**launched):
            seen.append((built["input_names"], "residual[at]" in built["source"], launched))
            return launched["inputs"][:1]

        return run

    a, b = mx.zeros((9,)), mx.ones((9,))
    shape = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1), "shapes": [(9,)], "dtypes": [mx.float32]}
    with launch.use(launch.Backend("simulator", constructor)):
        kernel([a, a, b, b], template=[("N", 3)], **shape)
        kernel([a, b, a + 1, b + 1], template=[("N", 3)], **shape)
    (names, named, launched), (all_names, all_named, plain) = seen
    assert names == ["x", "weight"]
    assert [x is y for x, y in zip(launched["inputs"], [a, b], strict=True)] == [True, True]
    assert not named
    assert [name for name, _ in launched["template"]] == ["N", "SAME"]
    assert all_names == ["x", "gate", "weight", "residual"]
    assert all_named
    assert plain["template"] == [("N", 3)]
