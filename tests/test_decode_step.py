"""The compiled decode step and a long prompt that is computed as it goes give what the layers one by one give."""

from __future__ import annotations

from collections import Counter
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache

import ring_mlx.model.model as model_module
from metal_kernels import choices, launch
from ring_mlx.bench.dispatches import count_launches, count_primitives
from ring_mlx.bench.random_weights import random_model_of
from ring_mlx.bench.shapes import MINI
from ring_mlx.generation.decoding import decode
from ring_mlx.model.cache import make_kv_cache
from ring_mlx.model.decode_step import DecodeStep, is_worthwhile
from ring_mlx.model.tentative import Tentative
from tests.compare import assert_close
from tests.tiny import GOLDENS, make_model, tokens


@pytest.fixture
def pieces(monkeypatch):
    """Steps go through the pieces as they would on a GPU; not compiled, which takes seconds on a CPU."""
    monkeypatch.setattr(model_module, "is_worthwhile", lambda: True)
    mx.disable_compile()
    yield
    mx.enable_compile()


def steps(model, cache, ids):
    """Logits of ids fed one token at a time."""
    out = []
    for i in range(ids.shape[1]):
        out.append(model(ids[:, i : i + 1], cache))
        mx.eval(out[-1], cache.state)
    return mx.concatenate(out, axis=1)


def after_three(model, ids):
    """Logits of what follows the first three tokens, in single steps."""
    cache = model.make_cache()
    model(ids[:, :3], cache)
    return steps(model, cache, ids[:, 3:])


def with_and_without(monkeypatch, run):
    mine = run()
    with monkeypatch.context() as m:
        m.setattr(model_module, "is_worthwhile", lambda: False)
        plain = run()
    return mine, plain


@pytest.mark.parametrize("name", ["mini_like", "flash_like"])
def test_goldens_in_single_steps(pieces, name):
    from ring_mlx import load_model

    expected = mx.load(str(GOLDENS / name / "golden.safetensors"))
    model, ids = load_model(GOLDENS / name, dtype=mx.float32), expected["tokens"][None]
    cache = model.make_cache()
    first = model(ids[:, :5], cache)
    assert model.model._decode_step().accepts(mx.zeros((1, 1, 1)), cache)
    logits = mx.concatenate([first, steps(model, cache, ids[:, 5:40])], axis=1)
    assert_close(logits[0], expected["logits"][:40], 1e-4)
    assert cache.offset == 40


def test_rows_of_different_lengths(pieces, monkeypatch):
    model, batch, more = make_model(), tokens(12, B=3), tokens(4, B=3, seed=5)

    def run():
        cache = model.make_cache(left_padding=[5, 0, 2])
        model(batch, cache)
        return steps(model, cache, more), cache

    masks = []
    call = DecodeStep.__call__
    monkeypatch.setattr(
        DecodeStep, "__call__", lambda self, x, c, m, o: masks.append(m[True]) or call(self, x, c, m, o)
    )
    (mine, cache), (plain, other) = with_and_without(monkeypatch, run)
    assert len(masks) == 4
    assert masks[0].shape == (3, 1)
    assert_close(mine, plain, 1e-6)
    for a, b in zip(cache, other, strict=True):
        if not hasattr(a, "keys"):
            assert_close(a[0], b[0], 1e-6)
    assert mx.array_equal(cache.offset, other.offset)


@pytest.mark.parametrize("n", range(5))
def test_tentative_tokens_go_through_the_pieces_and_are_taken_back(pieces, monkeypatch, n):
    model, ids, seen = make_model(num_hidden_layers=4, layer_group_size=2), tokens(9), []
    call = DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, x, *a: seen.append(x.shape[1]) or call(self, x, *a))

    def run():
        cache = model.make_cache()
        model(ids[:, :5], cache)
        tentative = Tentative(model, cache, ids[:, 5:].tolist())
        tentative.keep([n])
        return tentative.logits[0], model(ids[:, 4:5], cache), cache

    (logits, after, cache), (plain, expected, other) = with_and_without(monkeypatch, run)
    assert seen == [4, 1]
    assert_close(logits, plain, 1e-5)
    assert_close(after, expected, 1e-5)
    for a, b in zip(cache, other, strict=True):
        if not hasattr(a, "keys"):
            assert_close(a[0], b[0], 1e-6)
    assert cache.offset == other.offset == 6 + n


def test_a_copy_does_not_keep_the_states_after_each_token(pieces):
    model, ids = make_model(num_hidden_layers=4, layer_group_size=2), tokens(9)
    cache = model.make_cache()
    model(ids[:, :5], cache)
    Tentative(model, cache, ids[:, 5:].tolist()).keep([2])
    copied = cache.copy()
    mx.eval(cache.state)
    for a, b in zip(cache, copied, strict=True):
        if not hasattr(a, "keys"):
            assert mx.array_equal(a[0], b[0])
            assert np.asarray(a[0]).ctypes.data != np.asarray(b[0]).ctypes.data


def test_a_tentative_step_that_fails_between_pieces_leaves_the_cache_as_it_was(pieces, monkeypatch):
    model, ids = make_model(num_hidden_layers=4, layer_group_size=2), tokens(9)
    (mine, other) = (model.make_cache() for _ in range(2))
    for cache in (mine, other):
        model(ids[:, :5], cache)

    def attend(*_):
        raise MemoryError("full")

    with monkeypatch.context() as m:
        m.setattr(type(model.layers[3].attention), "attend", attend)
        with pytest.raises(MemoryError):
            Tentative(model, mine, [[1, 2, 3]])
    assert mine.offset == other.offset
    assert_close(model(ids[:, 5:6], mine), model(ids[:, 5:6], other), 1e-6)


def test_what_is_no_single_step_goes_layer_by_layer(pieces):
    model = make_model()
    step, x = model.model._decode_step(), mx.zeros((1, 1, 1))
    cache = model.make_cache()
    assert not step.accepts(x, cache), "no state yet"
    model(tokens(3), cache)
    assert step.accepts(x, cache)
    assert not step.accepts(mx.zeros((1, 2, 1)), cache)
    assert not step.accepts(x, [None] * len(cache))
    assert model.model._decode_step() is step
    model.model.layers = list(model.model.layers)
    assert model.model._decode_step() is not step
    model.train()
    assert model.model._decode_step() is None


def test_the_simulator_and_the_cpu_compile_nothing():
    for backend in (None, launch.Backend("simulator", print)):
        with launch.use(backend):
            assert not is_worthwhile()


def test_a_compiled_step_sees_a_changed_weight(monkeypatch):
    monkeypatch.setattr(model_module, "is_worthwhile", lambda: True)
    model, ids = make_model(num_hidden_layers=3, layer_group_size=3), tokens(6)

    run = partial(after_three, model, ids)
    mine, plain = with_and_without(monkeypatch, run)
    assert_close(mine, plain, 1e-5)
    layer = model.layers[1]
    layer.attention.dense.weight = layer.attention.dense.weight * 2
    layer.mlp.gate.gate_proj.weight = layer.mlp.gate.gate_proj.weight[::-1]
    changed, expected = with_and_without(monkeypatch, run)
    assert_close(changed, expected, 1e-5)
    assert float(mx.abs(changed - mine).max()) > 1e-3
    layer.attention.g_proj = nn.Linear(*layer.attention.g_proj.weight.shape[::-1], bias=False)
    replaced, expected = with_and_without(monkeypatch, run)
    assert_close(replaced, expected, 1e-5)
    assert float(mx.abs(replaced - changed).max()) > 1e-3


def test_weights_that_are_not_computed_yet_are_computed_once(monkeypatch):
    monkeypatch.setattr(model_module, "is_worthwhile", lambda: True)
    counts = []
    for is_lazy in (False, True):
        model, ids = make_model(num_hidden_layers=3, layer_group_size=3), tokens(6)
        cache = model.make_cache()
        mx.eval(model(ids[:, :3], cache), [c.state for c in cache])
        if is_lazy:
            model.update(tree_map(lambda w: -w, model.parameters()))
        steps(model, cache, ids[:, 3:4])
        counts.append(count_primitives(model(ids[:, 4:5], cache)))
    assert counts[0] == counts[1]


def test_what_is_added_and_taken_away_is_seen(monkeypatch):
    monkeypatch.setattr(model_module, "is_worthwhile", lambda: True)
    model, ids = make_model(num_hidden_layers=3, layer_group_size=3), tokens(6)

    run = partial(after_three, model, ids)
    plain = run()
    dense = model.layers[1].attention.dense
    dense.bias = mx.ones(dense.weight.shape[0])
    mine, expected = with_and_without(monkeypatch, run)
    assert_close(mine, expected, 1e-5)
    assert float(mx.abs(mine - plain).max()) > 1e-3
    del dense.bias
    assert_close(run(), plain, 1e-5)


def test_a_head_that_is_filled_up_gives_the_same(monkeypatch):
    model, rows = make_model(), []
    whole = model.lm_head
    monkeypatch.setattr(type(model), "lm_head", lambda self, x: rows.append(x.shape[:-1]) or whole(x), raising=False)
    shapes = [(1, 1), (1, 3), (3, 1), (2, 3), (1, 8), (2, 4)]
    monkeypatch.setattr(model_module, "FILLED_ROWS", {})
    plain = [model(tokens(t, B=b)) for b, t in shapes]
    assert rows == shapes
    rows.clear()
    monkeypatch.setattr(model_module, "FILLED_ROWS", {choices.where(): 8})
    for (b, t), expected in zip(shapes, plain, strict=True):
        found = model(tokens(t, B=b))
        assert found.shape == expected.shape
        assert_close(found, expected, 1e-5)
    assert rows == [(1, 1), (8,), (8,), (8,), (1, 8), (2, 4)]


def test_keys_and_values_grow_to_lengths_that_mlx_seldom_gives_to_cudnn():
    with launch.use(launch.Backend("cuda", mx.fast.metal_kernel)):
        cache = make_kv_cache()
    with launch.use(None):
        assert make_kv_cache().step == KVCache.step
    for n in (512, 1, 1, 1, 300, 256, 1):
        cache.update_and_fetch(mx.zeros((1, 2, n, 4)), mx.zeros((1, 2, n, 4)))
        assert cache.keys.shape[2] % 256, cache.offset


@pytest.mark.parametrize("last_only", [False, True])
def test_a_long_prompt_is_computed_layer_by_layer(monkeypatch, last_only):
    model, ids = make_model(), tokens(33)
    evaluated = []
    real = mx.async_eval
    whole = model(ids)
    monkeypatch.setattr(model_module, "LONG_FROM_TOKENS", 16)
    monkeypatch.setattr(mx, "async_eval", lambda *a: evaluated.append(a) or real(*a))
    logits = model(ids, model.make_cache(), last_only=last_only)
    assert_close(logits, whole[:, -1:] if last_only else whole, 1e-5)
    assert len(evaluated) == len(model.layers) - 1
    evaluated.clear()
    model(ids[:, :8], model.make_cache())
    model(ids)
    assert not evaluated


def test_how_many_dispatches_minis_layers_take():
    """Counted in the graph, kernels by a stand-in that computes nothing; MLX spells out its fast operations on a CPU."""
    small = {"hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 256}
    model = random_model_of(MINI | small | heads, "mini", 4, 64, False, mx.bfloat16, 0)
    kernels = Counter()

    def construct(name, **_):
        def call(inputs, output_shapes, output_dtypes, **_):
            kernels[name.removeprefix("ring_")] += 1
            outputs = [mx.zeros(*o) for o in zip(output_shapes, output_dtypes, strict=True)]
            mx.eval(outputs)
            return mx.depends(outputs, inputs)

        return call

    cache = model.make_cache()
    for layer, c in zip(model.layers, cache, strict=True):
        if layer.is_linear:
            c[0] = mx.zeros((1, 8, 128, 128))
        else:
            c.update_and_fetch(*mx.zeros((2, 1, 2, 17, 128), mx.bfloat16))
    with launch.use(launch.Backend("metal", construct)), mx.stream(mx.cpu):
        logits = model(mx.array([[3]]), cache, last_only=True)[:, -1]
        assert model.model._step is not None
        steps = decode(logits, model, cache, mx.array([3]), max_tokens=2)
        mx.eval(logits, cache.state)
        with count_launches(cache) as counts:
            next(steps)
    # Called as the step is compiled: a layer's norm with its projections, its output product with the residual; the dense
    # block's gate and up, and its down. The embedding's once to see whether the kernel takes it, then for ids of two types.
    assert kernels == {"fused_qmv": 2 * 20 + 2, "fused_recurrent": 16, "qk_norm_rope": 4} | dict.fromkeys(
        ("norm_router", "router", "decode_gate_up", "decode_down"), 19
    ) | {"embed": 3, "peak": 1}
    found = counts[-1]
    assert found["SliceUpdate"] == 2 * 4
    assert (found["Softmax"], found["Gather"], found["Square"]) == (4, 0, 1)  # attention, embedding, last norm
    assert (found["QuantizedMatmul"], found["ArgReduce"], found["LogSumExp"]) == (1, 0, 0)
    assert sum(n for name, n in found.items() if name.startswith("Compiled")) == 1  # the dense block's silu
