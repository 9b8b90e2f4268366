"""The model against what an independent float64 implementation computed from the same checkpoints."""

from __future__ import annotations

import mlx.core as mx
import pytest

import ring_mlx.model.moe as moe
from metal_kernels import chunk_lightning_attn, dispatch
from ring_mlx import load_model
from tests.compare import assert_close
from tests.tiny import GOLDENS

NAMES = ["mini_like", "flash_like"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    model = load_model(GOLDENS / request.param, dtype=mx.float32)
    return model, mx.load(str(GOLDENS / request.param / "golden.safetensors"))


def states(model, cache):
    return {i: cache[i][0][0] for i, layer in enumerate(model.layers) if layer.is_linear}


def test_logits_hidden_states_and_recurrent_states(golden):
    model, expected = golden
    hidden, cache = [], model.make_cache()
    logits = model(expected["tokens"][None], cache, hidden_states=hidden)
    assert_close(logits[0], expected["logits"], TOLERANCE)
    assert len(hidden) == model.config.num_hidden_layers + 1
    for ours, theirs in zip(hidden, expected["hidden"], strict=True):
        assert_close(ours[0], theirs, TOLERANCE)
    found = states(model, cache)
    assert sorted(found) == sorted(int(k[6:]) for k in expected if k.startswith("state."))
    for i, state in found.items():
        assert_close(state, expected[f"state.{i}"], TOLERANCE)


def test_decay_rates(golden):
    model, expected = golden
    rates = {k: v for k, v in expected.items() if k.startswith("decay_rate.")}
    assert rates
    for key, rate in rates.items():
        assert_close(model.layers[int(key.split(".")[1])].attention.decay_rate, rate, 1e-6)


def test_chosen_experts(golden, monkeypatch):
    model, expected = golden
    chosen, route = [], moe.route
    monkeypatch.setattr(moe, "route", lambda *a: chosen.append(route(*a)) or chosen[-1])
    model(expected["tokens"][None])
    layers = [i for i in range(model.config.num_hidden_layers) if model.config.is_moe(i)]
    assert layers == sorted(int(k.split(".")[1]) for k in expected if k.startswith("experts."))
    for i, (ids, _) in zip(layers, chosen, strict=True):
        assert mx.sort(ids[0], axis=-1).tolist() == expected[f"experts.{i}"].tolist()


@pytest.mark.parametrize("chunk_size", [1, 16, 64, 10_000])
def test_any_chunk_length(golden, chunk_size, monkeypatch):
    model, expected = golden
    monkeypatch.setattr(dispatch, "lightning_attn", lambda *a: chunk_lightning_attn(*a, chunk_size))
    assert_close(model(expected["tokens"][None])[0], expected["logits"], TOLERANCE)


def test_splits_of_the_prompt_in_two(golden):
    """At and beside the edges of chunks and prompt, and at every ninth token: in a long prompt, each place of 16."""
    model, expected = golden
    tokens = expected["tokens"][None]
    T = tokens.shape[1]
    edges = {at + d for at in range(0, T + 1, 64) for d in (-1, 0, 1)} | {2, T - 2, T - 1}
    for at in sorted((edges | set(range(4, T, 9))) & set(range(1, T))):
        cache = model.make_cache()
        a = model(tokens[:, :at], cache)
        b = model(tokens[:, at:], cache)
        assert cache.offset == T
        assert_close(mx.concatenate([a, b], axis=1)[0], expected["logits"], TOLERANCE)


def test_token_by_token(golden):
    model, expected = golden
    cache = model.make_cache()
    steps = [model(expected["tokens"][None, t : t + 1], cache) for t in range(expected["tokens"].size)]
    assert_close(mx.concatenate(steps, axis=1)[0], expected["logits"], TOLERANCE)
    for i, state in states(model, cache).items():
        assert_close(state, expected[f"state.{i}"], TOLERANCE)


def test_last_only_is_the_last(golden):
    model, expected = golden
    assert_close(model(expected["tokens"][None], last_only=True)[0, 0], expected["logits"][-1], TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(golden, side):
    model, expected = golden
    tokens = expected["tokens"]
    lengths, width, then = [5, 23, 40, 1], 40, 6
    rows = [tokens[i : i + n + then] for i, n in enumerate(lengths)]
    alone = [model(row[None])[0] for row in rows]
    pads = [width - n for n in lengths]
    filler = mx.full((width,), 3, dtype=tokens.dtype)
    if side == "left":
        cache = model.make_cache(left_padding=pads)
        batch = mx.stack([mx.concatenate([filler[:p], r[:n]]) for p, r, n in zip(pads, rows, lengths, strict=True)])
        logits = [model(batch[:, :17], cache), model(batch[:, 17:], cache)]
        logits = mx.concatenate(logits, axis=1)
        first = [logits[i, p:] for i, p in enumerate(pads)]
    else:
        cache = model.make_cache(left_padding=[0] * len(rows))
        batch = mx.stack([mx.concatenate([r[:n], filler[:p]]) for p, r, n in zip(pads, rows, lengths, strict=True)])
        cache.prepare(lengths, width)
        logits = mx.concatenate([model(batch[:, :17], cache), model(batch[:, 17:], cache)], axis=1)
        cache.finalize()
        first = [logits[i, :n] for i, n in enumerate(lengths)]
    for ours, whole, n in zip(first, alone, lengths, strict=True):
        assert_close(ours, whole[:n], TOLERANCE)
    for t in range(then):
        step = model(mx.stack([r[n + t : n + t + 1] for r, n in zip(rows, lengths, strict=True)]), cache)
        for i, n in enumerate(lengths):
            assert_close(step[i, 0], alone[i][n + t], TOLERANCE)


def test_exact_is_at_least_as_right(golden):
    model, expected = golden
    exact = load_model(
        GOLDENS / ("mini_like" if len(model.layers) == 10 else "flash_like"), exact=True, dtype=mx.float32
    )
    assert_close(exact(expected["tokens"][None])[0], expected["logits"], TOLERANCE)
