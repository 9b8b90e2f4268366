"""Rows of a batch that read drafts while they are alone: tokens, draws and caches are those of plain decoding."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ring_mlx.errors import ModelError
from ring_mlx.generation.batch import Batch
from ring_mlx.generation.decoding import decode, prefill
from ring_mlx.generation.drafts import MOST_TOKENS, Draft, Pace
from ring_mlx.generation.sampling import SeededSampler
from ring_mlx.generation.thinking import ThoughtBudget
from tests.compare import assert_close
from tests.fuzz.profile import fuzz
from tests.tiny import make_model, tokens

MOST = 24
PROMPTS = {n: tokens(n, seed=n)[0].tolist() for n in (5, 11, 40)}
RULES = {
    "perfect": lambda at: False,
    "wrong": lambda at: True,
    "every third": lambda at: at % 3 == 2,
    "random": lambda at: at * 2654435761 % 100 < 40,
}


@pytest.fixture(scope="module")
def model():
    return make_model()


def how(n):
    """How the row of a prompt chooses: greedily; hot, with penalties and bias; hot, with forced tokens."""
    if n == 5:
        return {}
    found = {"sampler": SeededSampler(make_sampler(0.9, 0.95, top_k=20), n)}
    if n == 11:
        return found | {"logits_processors": make_logits_processors({3: 2.0}, 1.4, 20, 0.3, 20, 0.2, 20)}
    return found | {"next_forced": ThoughtBudget(7, [9, 8, 7], lambda: True).next_forced}


def read(model, prompt):
    cache = model.make_cache()
    *_, (_, logits) = prefill(mx.array(prompt), model, cache, [len(prompt)])
    return cache, logits


@pytest.fixture(scope="module")
def alone(model):
    """What each prompt is answered by plain decoding."""
    said = {}
    for n, prompt in PROMPTS.items():
        cache, logits = read(model, prompt)
        steps = decode(logits, model, cache, mx.array(prompt), max_tokens=MOST, **how(n))
        said[n] = [(token, logprobs) for token, logprobs in steps]
    return said


class Source:
    """Drafts the right text, spoiled by a rule."""

    def __init__(self, text, rule, most=MOST_TOKENS):
        self.pace, self._text, self._rule, self._most = Pace(most, always=True), text, RULES[rule], most

    def drafter(self, seen):
        assert list(seen) == self._text[: len(seen)]
        return Spoiled(self, len(seen))

    def ahead(self, at, most):
        ahead = range(at, min(at + most, len(self._text)))
        return Draft([(self._text[n] + self._rule(n)) % 70 for n in ahead], 1 if ahead else 0)


class Spoiled:
    def __init__(self, source, at):
        self._source, self._at = source, at

    def add(self, token):
        assert token == self._source._text[self._at]
        self._at += 1

    def draft(self, most):
        return self._source.ahead(self._at, most)


def join(batch, model, alone, n, rule="every third", most=MOST_TOKENS):
    """Let a prompt join, half of them as a server's do; returns its number."""
    source = Source([*PROMPTS[n], *(t for t, _ in alone[n])], rule, most)
    if n == 11:
        cache, _ = read(model, PROMPTS[n][:-1])
        start = {"prompt": PROMPTS[n][-1:], "cache": cache}
    else:
        cache, logits = read(model, PROMPTS[n])
        start = {"prompt": [], "cache": cache, "logits": logits}
    return batch.add(**start, history=PROMPTS[n], drafts=source, max_tokens=MOST, **how(n))


def check_cache(model, cache, ids):
    """A cache that has read these tokens, neither more nor less."""
    right = model.make_cache()
    model(mx.array([ids]), right)
    assert cache.offset == len(ids)
    for mine, other in zip(cache, right, strict=True):
        if isinstance(mine, KVCache):
            for a, b in ((mine.keys, other.keys), (mine.values, other.values)):
                assert_close(a[..., : mine.offset, :], b[..., : mine.offset, :], 1e-5)
        else:
            assert_close(mine[0], other[0], 1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", PROMPTS)
def test_a_lone_row_says_the_same(model, alone, n, rule):
    batch = Batch(model)
    number = join(batch, model, alone, n, rule)
    for token, logprobs in alone[n]:
        assert batch.step() == {number: token}
        batch.check(number)
        assert_close(batch.logprobs(number), logprobs, 1e-4)
    counts = batch.counts(number)
    if rule == "perfect":
        assert counts.accepted == counts.drafted > MOST // 2
    elif rule == "wrong":
        assert (counts.accepted, counts.drafted > 0) == (0, True)
    cache = batch.remove(number)
    check_cache(model, cache, [*PROMPTS[n], *(t for t, _ in alone[n][:-1])])


@pytest.mark.parametrize("rule", ["perfect", "every third"])
@pytest.mark.parametrize("take", range(1, MOST))
def test_a_row_that_leaves_takes_along_what_was_given(model, alone, take, rule):
    batch = Batch(model)
    number = join(batch, model, alone, 11, rule)
    for _ in range(take):
        batch.step()
    cache = batch.remove(number)
    assert len(batch) == batch.nbytes == 0
    check_cache(model, cache, [*PROMPTS[11], *(t for t, _ in alone[11][:take])])


@fuzz(8)
@given(data=st.data())
def test_rows_that_join_and_leave_at_any_token(model, alone, data):
    """Two clients and a third: a row is interrupted within a step of several, merged, and alone again."""
    batch, said, prompts = Batch(model), {}, {}
    for _ in range(data.draw(st.integers(8, 50))):
        action = data.draw(st.sampled_from(["step"] * 6 + ["join", "leave"])) if said else "join"
        if action == "join" and len(said) < 3:
            n = data.draw(st.sampled_from(sorted(PROMPTS)))
            rule, most = data.draw(st.sampled_from(sorted(RULES))), data.draw(st.integers(1, 7))
            number = join(batch, model, alone, n, rule, most)
            said[number], prompts[number] = [], n
        elif action == "leave":
            leave(batch, model, data.draw(st.sampled_from(sorted(said))), said, prompts)
        else:
            for number, token in batch.step().items():
                said[number].append(token)
                batch.check(number)
        for number, found in list(said.items()):
            assert found == [t for t, _ in alone[prompts[number]][: len(found)]]
            if len(found) == MOST - 1:  # a merged row's last token is fed as well
                leave(batch, model, number, said, prompts)
    for number in list(said):
        leave(batch, model, number, said, prompts)


def leave(batch, model, number, said, prompts):
    cache, found = batch.remove(number), said.pop(number)
    unread = prompts[number] == 11 and not found  # its last token is read by the first step
    check_cache(model, cache, [*PROMPTS[prompts[number]][: -1 if unread else None], *found])


def test_logits_that_are_not_finite_end_the_row_that_has_them(alone):
    model = make_model()
    batch = Batch(model)
    number = join(batch, model, alone, 5, "perfect", 3)
    for token, _ in alone[5][:6]:
        assert batch.step() == {number: token}
    model.lm_head.weight = model.lm_head.weight * float("nan")
    for token, _ in alone[5][6:9]:  # two were read before, and the third was picked
        assert batch.step() == {number: token}
    with pytest.raises(ModelError, match="nan"):
        batch.step()


def test_a_step_during_which_other_work_ran_is_not_timed(model, alone, monkeypatch):
    batch, timed = Batch(model), []
    monkeypatch.setattr(Pace, "took", lambda pace, count, seconds: timed.append(count))
    join(batch, model, alone, 5, "perfect", 3)
    for n in range(MOST - 1):
        batch.step()
        if n in (4, 9, 10, 11):  # the second token of the second step, the third step
            batch.not_timed()
    assert timed == [4, 4]  # of five steps: the first of a length is not timed either
