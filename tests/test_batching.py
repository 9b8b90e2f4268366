"""Sequences of different lengths and ages in one step."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ring_mlx.errors import OptionError, PromptError
from ring_mlx.generation.batch import Batch
from ring_mlx.generation.decoding import generate_step
from tests.compare import assert_close
from tests.tiny import make_model, tokens

LENGTHS = (1, 63, 64, 65, 200, 7)


@pytest.fixture(scope="module")
def model():
    return make_model()


def prompt(n):
    return tokens(n, seed=n)[0].tolist()


@pytest.fixture(scope="module")
def alone(model):
    """The first 30 tokens of each prompt by itself."""
    return {n: [t for t, _ in generate_step(prompt(n), model, model.make_cache(), max_tokens=30)] for n in LENGTHS}


def test_all_at_once(model, alone):
    batch = Batch(model)
    numbers = {batch.add(prompt(n)): n for n in LENGTHS}
    said = {number: [] for number in numbers}
    for _ in range(20 + len(LENGTHS)):
        for number, token in batch.step().items():
            said[number].append(token)
    for number, n in numbers.items():
        assert len(said[number]) >= 20
        assert said[number][:30] == alone[n][: len(said[number])]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_joining_and_leaving_at_any_step(model, alone, data):
    batch, said, lengths = Batch(model, prefill_step_size=data.draw(st.sampled_from([16, 64, 500]))), {}, {}
    for _ in range(14):
        action = data.draw(st.sampled_from(["add", "step", "step", "remove"]))
        if action == "add":
            n = data.draw(st.sampled_from(LENGTHS))
            number = batch.add(prompt(n))
            said[number], lengths[number] = [], n
        elif action == "remove" and said:
            number = data.draw(st.sampled_from(sorted(said)))
            batch.remove(number)
            del said[number]
        else:
            for number, token in batch.step().items():
                said[number].append(token)
        assert len(batch) == len(said)
    for number, found in said.items():
        assert found == alone[lengths[number]][: len(found)]


def test_a_row_that_leaves_takes_its_cache_along(model, alone):
    batch = Batch(model)
    numbers = {n: batch.add(prompt(n)) for n in (65, 7, 200)}
    said = {n: [] for n in numbers}
    for _ in range(10):
        tokens_ = batch.step()
        for n, number in numbers.items():
            said[n] += [tokens_[number]] if number in tokens_ else []
    cache = batch.remove(numbers[7])
    assert [type(c) for c in cache] == [ArraysCache, ArraysCache, KVCache, KVCache, KVCache]
    assert cache.offset == 7 + len(said[7])
    whole = mx.array([[*prompt(7), *said[7], 5]])
    assert_close(model(whole[:, -1:], cache.copy()), model(whole)[:, -1:], 1e-4)
    again = batch.add([5], cache=cache)
    steps = [batch.step() for _ in range(4)]
    said[200] += [found[numbers[200]] for found in steps]
    assert [found[again] for found in steps] == [
        t for t, _ in generate_step(whole[0].tolist(), model, model.make_cache(), max_tokens=4)
    ]
    while len(said[200]) < 20:
        said[200].append(batch.step()[numbers[200]])
    assert said[200] == alone[200][:20]


def test_a_long_prompt_does_not_hold_up_the_others(model, alone):
    batch = Batch(model, prefill_step_size=32)
    first = batch.add(prompt(7))
    said = [batch.step()[first]]
    late = batch.add(prompt(200))
    steps = 0
    while late not in (found := batch.step()):
        said.append(found[first])
        steps += 1
    assert steps == 200 // 32
    assert said == alone[7][: len(said)]
    assert found[late] == alone[200][0]


def test_each_row_chooses_in_its_own_way(model, alone):
    batch = Batch(model)
    banned = make_logits_processors(logit_bias={alone[65][0]: -1e9})
    a = batch.add(prompt(65), logits_processors=banned)
    b = batch.add(prompt(65), sampler=make_sampler(0.0))
    batch.step()
    found = batch.step()
    assert found[b] == alone[65][0]
    expected = generate_step(prompt(65), model, model.make_cache(), max_tokens=2, logits_processors=banned)
    assert [t for t, _ in expected][1] == found[a]


def test_a_token_is_had_while_the_next_step_computes(model, monkeypatch):
    """What is awaited of one evaluation is all of it, so tokens are asked for apart from the step that follows them."""
    batch, order = Batch(model), []
    batch.add(prompt(7))
    batch.step()
    evaluate, call = mx.async_eval, type(model).__call__
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (order.append("evaluate"), evaluate(*arrays))[1])
    monkeypatch.setattr(type(model), "__call__", lambda *a, **k: (order.append("step"), call(*a, **k))[1])
    batch.step()
    assert order == ["evaluate", "step", "evaluate"]


def test_bytes_go_when_rows_go(model):
    batch = Batch(model, prefill_step_size=256)
    assert batch.nbytes == 0
    numbers = [batch.add(prompt(n)) for n in (200, 7)]
    batch.step()
    batch.step()
    held = batch.nbytes
    batch.remove(numbers[0])
    assert 0 < batch.nbytes < held
    batch.remove(numbers[1])
    assert (len(batch), batch.nbytes, batch.step()) == (0, 0, {})


def test_what_cannot_join(model):
    batch = Batch(model)
    with pytest.raises(PromptError, match="empty"):
        batch.add([])
    with pytest.raises(PromptError, match="513 tokens exceed the context of 512"):
        batch.add([1] * 513)
    with pytest.raises(PromptError, match="70 is not a token id from 0 to 69"):
        batch.add([1, 70])
    with pytest.raises(OptionError, match="no sequence 7"):
        batch.remove(7)
    with pytest.raises(OptionError, match="step size 0"):
        Batch(model, 0)
    big = make_model(head_dim=32)
    cache = big.make_cache()
    big(tokens(7), cache)
    cache[2:] = [c.to_quantized(group_size=32, bits=8) for c in cache[2:]]
    with pytest.raises(OptionError, match="quantized"):
        Batch(big).add([1], cache=cache)
