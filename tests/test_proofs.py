"""A kernel that is wrong in one variant costs that variant and nothing else, wherever it is met."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import contextmanager

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm import utils

from metal_kernels import Experts, choices, dispatch, launch, proofs
from metal_kernels.lightning_attn import simd_chunk
from ring_mlx import load_model
from ring_mlx.distributed.loading import load_sharded
from ring_mlx.experts.slots import is_on_cuda
from ring_mlx.tuning.kernel_check import check_kernels
from tests import python_kernels
from tests.compare import assert_close
from tests.kernel_backends import mutated, proving, simulator
from tests.metal_sim import metal_kernel
from tests.moe_cases import Case, naive_moe
from tests.tiny import PACKABLE, config, make_model, save_hf, tokens

SMALL = PACKABLE | {"num_hidden_layers": 3, "layer_group_size": 3}
# What one operation launches together, and is on or off together.
TOGETHER = {"decode_gate_up": "decode_down", "decode_down": "decode_gate_up"}


@pytest.fixture
def traced(monkeypatch):
    """Python's kernels, and steps in pieces as on a GPU; they are traced and not compiled, which takes seconds here."""
    monkeypatch.setattr(launch.Kernel, "_build", python_kernels.hand_over)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def model():
    return make_model(**SMALL)


def answers(model):
    """Logits of a prompt, a token, five, another one and a second prompt; then of a batch of three."""
    out, cache = [], model.make_cache()
    for n in (9, 1, 5, 1, 12):
        out.append(model(tokens(n), cache))
        mx.eval(out[-1], cache.state)
    cache = model.make_cache(left_padding=[3, 0, 1])
    for n in (10, 1, 1):
        out.append(model(tokens(n, B=3), cache)[:, 3 if n > 3 else 0 :])
        mx.eval(out[-1], cache.state)
    return out


@pytest.fixture(scope="module")
def plain(model):
    with launch.use(None):
        return answers(model)


def check(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-4)


@contextmanager
def told():
    """The warnings of what runs within."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def off(where):
    """The kernels that are off, and those that passed."""
    entries = where.ledger.entries()
    return {e["kernel"] for e in entries if not e["passed"]}, {e["kernel"] for e in entries if e["passed"]}


def one_row(x):
    rows = x.reshape(-1, x.shape[-1])
    return mx.concatenate([rows[:-1], rows[-1:] + 1 + mx.abs(rows[-1:])]).reshape(x.shape)


def one_element(x):
    flat = x.flatten()
    return mx.concatenate([flat[:1] * 2 + 0.5, flat[1:]]).reshape(x.shape)


def not_a_number(x):
    return mx.concatenate([mx.array([mx.nan], x.dtype), x.flatten()[1:]]).reshape(x.shape)


def raises(x):
    raise RuntimeError("no such instruction")


def spoiling(name, fault, only=lambda template: True):
    def spoil(kernel, template, outputs):
        if kernel != f"ring_{name}" or not only(template):
            return outputs
        first = next(i for i, x in enumerate(outputs) if mx.issubdtype(x.dtype, mx.floating) and x.size > 1)
        return [fault(x) if i == first else x for i, x in enumerate(outputs)]

    return spoil


FAULTS = {
    "fused_qmv": one_element,
    "tall_qmv": one_element,
    "norm_router": one_row,
    "router": raises,
    "qk_norm_rope": not_a_number,
    "fused_recurrent": one_element,
    "simd_chunk": one_row,
    "linear_gate": one_element,
    "decode_gate_up": not_a_number,
    "decode_down": one_row,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_kernel_that_is_wrong_is_off_and_the_answer_right(traced, model, plain, name):
    launched = []
    where = proving(python_kernels.construct(spoiling(name, FAULTS[name]), launched))
    chosen = {f"head/{size}": choices.KERNEL for size in ("1", "2-4", "5-8")}  # which Metal's table leaves to MLX
    with launch.use(where), choices.use(chosen), told() as warned:
        check(answers(model), plain)
        bad, good = off(where)
        assert bad == {f"ring_{name}"} | {f"ring_{n}" for n in [TOGETHER.get(name)] if n}
        assert good - bad == {f"ring_{n}" for n in FAULTS} - bad
        assert warned
        assert all(f"ring_{name} (" in str(w.message) and "MLX's operations take its place" in str(w.message) for w in warned)  # fmt: skip
        before, launched[:] = len(warned), []
        check(answers(model), plain)
    assert len(warned) == before
    assert not bad & set(launched)
    assert good - bad <= set(launched)


def test_a_kernel_that_does_not_build_is_off(traced, model, plain):
    right = python_kernels.construct()

    def build(kernel, same):
        if kernel.name == "ring_fused_recurrent":
            raise ValueError("use of undeclared identifier")
        return right(kernel, same)

    where = proving(build)
    with launch.use(where), told() as warned:
        check(answers(model), plain)
    assert off(where)[0] == {"ring_fused_recurrent"}
    assert all("undeclared identifier" in str(w.message) for w in warned)


VARIANTS = {
    "five tokens": ("fused_qmv", lambda t: t["TOKENS"] == 5),
    "a batch of three": ("fused_recurrent", lambda t: t["PER_ROW"]),
    "a state to go on from": ("simd_chunk", lambda t: t["HAS_STATE"]),
    "two matrices": ("fused_qmv", lambda t: t["SECOND"] > 0),
    "a mask": ("simd_chunk", lambda t: t["HAS_MASK"]),
    "no router": ("norm_router", lambda t: t["E"] == 0),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_only_the_variant_that_is_wrong_is_off(traced, model, plain, kind):
    name, only = VARIANTS[kind]
    where = proving(python_kernels.construct(spoiling(name, one_row, only)))
    with launch.use(where), told() as warned:
        check(answers(model), plain)
    bad, good = off(where)
    assert bad == {f"ring_{name}"}
    assert bad <= good
    assert len(warned) == sum(not entry["passed"] for entry in where.ledger.entries())


def test_a_longer_prompt_is_another_variant_though_its_grid_is_the_same(traced, model):
    """As where only the second chunk of a prompt goes wrong."""

    def spoil(name, template, outputs):
        return [one_row(x) for x in outputs] if name == "ring_simd_chunk" and outputs[0].shape[1] > 32 else outputs

    where = proving(python_kernels.construct(spoil))
    with launch.use(None):
        expected = model(tokens(20)), model(tokens(60))
    with launch.use(where), told() as warned:
        check([model(tokens(20)), model(tokens(60))], expected)
        assert len(warned) == 1
    assert [e["passed"] for e in where.ledger.entries() if e["kernel"] == "ring_simd_chunk"].count(False) == 1


@pytest.mark.parametrize("tokens_of", [(64, 50), (50, 64)])
def test_a_part_of_a_chunk_is_another_variant_than_a_whole_one(traced, model, tokens_of):
    first, second = tokens_of

    def spoil(name, template, outputs):
        return [one_row(x) for x in outputs] if name == "ring_simd_chunk" and outputs[0].shape[1] == second else outputs

    with launch.use(None):
        expected = model(tokens(first)), model(tokens(second))
    with launch.use(proving(python_kernels.construct(spoil))), told() as warned:
        check([model(tokens(first)), model(tokens(second))], expected)
    assert len(warned) == 1


def test_a_step_is_compiled_once_its_kernels_are_proven(model, monkeypatch):
    """With MLX's real tracing; kernels that compute nothing, since a CPU compiles what is in their place for seconds."""
    launched = []

    def construct(name, **_):
        def call(inputs, output_shapes, output_dtypes, **_):
            launched.append(name)
            return mx.depends([mx.zeros(*o) for o in zip(output_shapes, output_dtypes, strict=True)], inputs)

        return call

    monkeypatch.setattr(proofs, "_judged", lambda *_: (0.0, ""))
    with launch.use(proving(construct)):
        cache, counts = model.make_cache(), []
        model(tokens(9), cache)
        for _ in range(3):
            launched.clear()
            model(tokens(1), cache)
            counts.append(Counter(launched))
    assert counts[0] == counts[1]
    assert counts[1]["ring_fused_recurrent"] == 2
    assert not counts[2]


def test_a_step_is_compiled_again_when_a_kernel_was_turned_off(traced, model, monkeypatch):
    def compile_once(run):
        """As MLX: called for new kinds of arguments, else not; here the result is had without telling."""
        kinds = set()

        def call(*arguments):
            kind = str(tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, mx.array) else x, arguments))
            traces.append(kind not in kinds)
            out = run(*arguments)
            kinds.add(kind)
            return out

        return call

    wrong, traces, ids = [False], [], tokens(9)

    def spoil(name, template, outputs):
        return [raises(x) for x in outputs] if name == "ring_fused_recurrent" and wrong[0] else outputs

    monkeypatch.setattr(mx, "compile", compile_once)
    with launch.use(None):
        expected = model(ids)
    where = proving(python_kernels.construct(spoil))
    with launch.use(where), told() as warned:
        cache, seen = model.make_cache(), []
        model(ids[:, :3], cache)
        for i in range(3, 9):
            traces.clear()
            wrong[0] = i >= 6
            logits = model(ids[:, i : i + 1], cache)
            assert_close(logits[:, 0], expected[:, i], 1e-4)
            seen.append(sum(traces))
    pieces = len(model.model._step._pieces)
    assert (seen[0], seen[2], seen[3], seen[4], seen[5]) == (pieces, 0, 0, pieces, 0)
    assert len(warned) == 1


def load_by(door, folder):
    """Through one of the three places that read weights; every command goes through one of them."""
    if door == "ours":
        return load_model(folder)
    if door == "distributed":
        return load_sharded(folder, mx.distributed.init(), "tensor")
    loaded = utils.load_model(folder)[0]
    loaded(tokens(20))
    return loaded


@pytest.mark.parametrize("door", ["ours", "distributed", "mlx-lm"])
def test_every_door_lets_the_kernels_of_a_prompt_and_a_token_prove_themselves(traced, tmp_path, registered, door):
    save_hf(tmp_path, config(**SMALL))
    launched = []
    where = proving(python_kernels.construct())
    with launch.use(where):
        loaded = load_by(door, tmp_path)
    launched.clear()
    again = proving(python_kernels.construct(None, launched), store=where.ledger._store)
    with launch.use(again):
        check_kernels(loaded, speculates=door == "ours")
        assert not launched
        again.ledger.doubt()
        check_kernels(loaded, speculates=door == "ours")
    assert launched
    operations = {entry["operation"] for entry in where.ledger.entries()}
    assert {"lightning_attn", "qkv_lightning_attn", "norm_qmv", "decode_moe", "route"} <= operations
    loaded.train()
    with launch.use(proving(raises)):
        mx.eval(loaded(tokens(5)))


@pytest.mark.skipif(is_on_cuda(), reason="experts on disk are refused there")
def test_streamed_experts_go_on_where_their_kernel_is_wrong(traced, tmp_path):
    save_hf(tmp_path, config(**SMALL))
    with launch.use(None):
        expected = answers(load_model(tmp_path))
    where = proving(python_kernels.construct(spoiling("decode_down", one_row)))
    with launch.use(where), told():
        found = answers(load_model(tmp_path, expert_cache_bytes=200_000))
    check(found, expected)
    assert off(where)[0] == {"ring_decode_gate_up", "ring_decode_down"}


# The Metal source itself, with Metal's tables, in the simulator.


def heads(T, B=1):
    q, k, v = (mx.random.normal((B, T, 2, 32), key=mx.random.key(i)) for i in range(3))
    return q, k, v, mx.array([0.3, 0.01]), 32**-0.5


def metal(spoil=None):
    """The simulator by the name of Metal; ``spoil`` is given a kernel's name, its template and its outputs."""
    with simulator("fast"):
        pass

    def construct(name, **text):
        kernel = metal_kernel(name=name, mode="fast", **text)
        return kernel if spoil is None else lambda **how: spoil(name, dict(how["template"]), kernel(**how))

    return proving(construct)


SOURCES = {
    "the first pass": (simd_chunk.SEGMENT_STATES, ("rate = decay_rate[h]", "rate = decay_rate[0]")),
    "the second pass": (simd_chunk.KERNEL, ("S.add(updates +", "if (false) S.add(updates +")),
    "what does not build": (simd_chunk.SEGMENT_STATES, ("const int own", "const nonsense own")),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_fault_in_the_source_that_only_a_long_prompt_meets(kind):
    kernel, change = SOURCES[kind]
    where, long, short = metal(), heads(600), heads(40)
    with mutated(kernel, change), launch.use(where), told() as warned:
        found = dispatch.lightning_attn(*long), dispatch.lightning_attn(*short), dispatch.lightning_attn(*long)
    with launch.use(None):
        expected = dispatch.lightning_attn(*long), dispatch.lightning_attn(*short), dispatch.lightning_attn(*long)
    for got, due in zip(found, expected, strict=True):
        assert_close(got[0], due[0], 1e-5)
        assert_close(got[1], due[1], 1e-5)
    assert len(warned) == 1
    entries = where.ledger.entries()
    assert [e["kernel"] for e in entries if e["passed"]] == ["ring_simd_chunk"]
    blamed = {"ring_segment_states"} if "build" in kind else {"ring_segment_states", "ring_simd_chunk"}
    assert {e["kernel"] for e in entries if not e["passed"]} == blamed


@pytest.mark.parametrize("name", ["plan", "grouped_gate_up", "grouped_down", "combine", None])
def test_experts_of_many_tokens_prove_themselves_too(name):
    case = Case(("affine", 4, 32), 20, residual=mx.float32, dtype=mx.float32)
    experts = Experts(*case.routed)
    arguments = case.x, case.chosen, case.weights, experts, case.residual

    def spoil(kernel, template, outputs):
        return [x * 0 + 1 for x in outputs] if kernel == f"ring_{name}" else outputs

    where = metal(spoil)
    with launch.use(where), choices.use({"experts/9+": choices.KERNEL}), told() as warned:
        kernel = dispatch.moe_kernel(experts, case.x)
        found, again = kernel(*arguments), kernel(*arguments)
    assert_close(found, naive_moe(*arguments[:3], *case.routed, residual=case.residual), 1e-5)
    assert (again is None, len(warned)) == ((True, 1) if name else (False, 0))
