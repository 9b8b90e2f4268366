"""Rows of a batch that read drafts, alone and together: tokens, draws and caches are those of plain decoding."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from metal_kernels import launch
from ring_mlx.errors import ModelError
from ring_mlx.generation.batch import Batch
from ring_mlx.generation.decoding import Picker, decode, prefill
from ring_mlx.generation.drafts import MOST_TOKENS, Draft
from ring_mlx.generation.pace import Pace
from ring_mlx.generation.sampling import SeededSampler
from ring_mlx.generation.speculation import Drafted, Speculation
from ring_mlx.generation.thinking import ThoughtBudget
from ring_mlx.model.ragged_cache import RaggedKVCache
from tests.compare import assert_close
from tests.fuzz.profile import fuzz
from tests.kernel_backends import backends
from tests.tiny import PACKABLE, make_model, tokens

MOST = 24
PROMPTS = {n: tokens(n, seed=n)[0].tolist() for n in (5, 11, 40, 23)}
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

    def take_back(self, drafter):
        assert isinstance(drafter, Spoiled)

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


def check_cache(model, cache, ids, tolerance=1e-6):
    """A cache that has read these tokens, neither more nor less.

    States differ by the rounding of float32, as those of a prompt differ with the steps in which it is read: by 5e-7 of their
    size here. Keys of later layers add up the differences of all before them.
    """
    right = model.make_cache()
    model(mx.array([ids]), right)
    assert cache.offset == len(ids)
    for mine, other in zip(cache, right, strict=True):
        if isinstance(mine, KVCache):
            for a, b in ((mine.keys, other.keys), (mine.values, other.values)):
                assert_close(a[..., : mine.offset, :], b[..., : mine.offset, :], 2 * tolerance)
        else:
            assert_close(mine[0], other[0], tolerance)


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
    """More clients than speculate together: rows are interrupted within a step of several, merged, and alone again."""
    batch, said, prompts = Batch(model), {}, {}
    for _ in range(data.draw(st.integers(8, 50))):
        action = data.draw(st.sampled_from(["step"] * 6 + ["join", "leave"])) if said else "join"
        if action == "join" and len(said) < 6:
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
    monkeypatch.setattr(Pace, "took", lambda pace, count, s, is_usual: timed.append((count, is_usual)))
    join(batch, model, alone, 5, "perfect", 3)
    for n in range(MOST - 1):
        batch.step()
        if n in (4, 9, 10, 11):  # the second token of the second step, the third step
            batch.not_timed()
    assert timed == [(4, False), (4, True), (4, True)]  # of five steps: the first of a length compiles


def together(model, alone, rules, most=MOST_TOKENS):
    """A batch in which the prompts are answered side by side, each with drafts by its own rule; and what each has said."""
    batch = Batch(model)
    return batch, {join(batch, model, alone, n, rule, most): (n, []) for n, rule in rules.items()}


def step(batch, said, alone):
    """A step, whose tokens, draws and distributions are those of each row alone."""
    given = batch.step()
    for number, token in given.items():
        n, found = said[number]
        found.append(token)
        batch.check(number)
        assert token == alone[n][len(found) - 1][0]
        assert_close(batch.logprobs(number), alone[n][len(found) - 1][1], 1e-4)
    return given


def end(batch, model, said, number):
    """Let a row leave; it has read what it was given, but for the last token of its limit if it was alone then."""
    n, found = said.pop(number)
    cache = batch.remove(number)
    is_last_unread = len(found) == MOST and cache.offset == len(PROMPTS[n]) + MOST - 1
    check_cache(model, cache, [*PROMPTS[n], *found][: -1 if is_last_unread else None])


TOGETHER = [
    {5: "perfect", 11: "perfect"},
    {5: "perfect", 11: "wrong"},
    {40: "every third", 5: "random", 11: "perfect"},
    {11: "wrong", 40: "wrong", 5: "wrong", 23: "wrong"},
    {5: "random", 40: "perfect", 23: "every third", 11: "random"},
]


@pytest.mark.parametrize("rules", TOGETHER, ids=lambda rules: "-".join(rules.values()))
def test_rows_speculate_together_and_end_when_they_do(model, alone, rules, monkeypatch):
    """Each accepts its own number of tokens a step; the others go on when one has all of its tokens."""
    widths, call = [], type(model).__call__
    monkeypatch.setattr(
        type(model), "__call__", lambda m, ids, *a, **k: widths.append(ids.shape) or call(m, ids, *a, **k)
    )
    batch, said = together(model, alone, rules)
    counts = {n: batch.counts(number) for number, (n, _) in said.items()}
    widths.clear()
    while said:
        step(batch, said, alone)
        for number in [number for number, (_, found) in said.items() if len(found) == MOST]:
            end(batch, model, said, number)
    assert (len(rules), 8) in widths
    for n, rule in rules.items():
        assert counts[n].drafted > 0
        assert (counts[n].accepted == 0) == (rule == "wrong")
    if "wrong" not in rules.values():
        assert len(widths) - len(rules) < MOST  # but for those of the checks


@pytest.mark.parametrize("take", range(1, 14))
@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_one_leaves_or_joins_at_any_point_of_a_step(model, alone, take, leaving):
    batch, said = together(model, alone, {5: "perfect", 40: "every third", 11: "random"}, 5)
    for _ in range(take):
        step(batch, said, alone)
    number = list(said)[leaving]
    if len(said[number][1]) < MOST:
        end(batch, model, said, number)
    number = join(batch, model, alone, 23, "perfect")
    said[number] = 23, []
    for _ in range(3):
        step(batch, said, alone)
        for number in [number for number, (_, found) in said.items() if len(found) == MOST]:
            end(batch, model, said, number)
    for number in list(said):
        end(batch, model, said, number)


def test_rows_that_cannot_draft_step_with_those_that_do(model, alone):
    batch, said = together(model, alone, {40: "perfect"})
    cache, logits = read(model, PROMPTS[5])
    said[batch.add([], cache=cache, logits=logits, history=PROMPTS[5], max_tokens=MOST)] = 5, []
    for _ in range(MOST):
        step(batch, said, alone)
        for number in [number for number, (_, found) in said.items() if len(found) == MOST]:
            end(batch, model, said, number)
    assert [n for n, _ in said.values()] == [5]  # which has waited for the tokens of the other
    assert len(next(iter(said.values()))[1]) >= MOST // 8


def test_more_rows_than_speculate_decode_plainly_and_fewer_again_with_drafts(model, alone):
    batch, said = together(model, alone, {5: "perfect", 40: "perfect", 23: "random", 11: "every third"})
    step(batch, said, alone)
    number = join(batch, model, alone, 40, "perfect")
    said[number] = 40, []
    for _ in range(3):
        assert len(step(batch, said, alone)) == 5
    assert batch._speculation is None
    end(batch, model, said, number)
    while all(len(found) < MOST - 8 for _, found in said.values()):
        step(batch, said, alone)
    assert batch._speculation is not None
    for number in list(said):
        end(batch, model, said, number)


@pytest.mark.parametrize("calls", range(1, 9))
def test_a_processor_that_fails_leaves_all_rows_what_they_gave(model, alone, calls, monkeypatch):
    batch, said = together(model, alone, {40: "perfect", 5: "random", 11: "perfect"}, 3)
    for _ in range(calls):
        step(batch, said, alone)

    def fail(*_):
        raise ZeroDivisionError

    (row,) = [row for row in batch._rows if row.picker.processors]
    row.picker.processors = [fail]
    with pytest.raises(ZeroDivisionError):
        list(iter(lambda: step(batch, said, alone), {}))
    for number in list(said):
        end(batch, model, said, number)


def test_logits_that_are_not_finite_end_only_the_row_that_has_them(model, alone):
    batch, said = together(model, alone, {5: "perfect", 40: "perfect"}, 3)
    for _ in range(4):
        step(batch, said, alone)
    bad, good = said
    row = batch._rows[0]
    row.picker.processors = [lambda ids, logits: logits]
    pick = row.picker.pick
    nan = mx.array([float("nan")])
    row.picker.pick = lambda *a: pick(*a)._replace(largest=nan)
    while np.isfinite(np.asarray(batch._given(bad).largest)):
        for number, token in batch.step().items():
            said[number][1].append(token)
    with pytest.raises(ModelError, match="nan"):
        batch.check(bad)
    batch.check(good)
    batch.remove(bad)
    del said[bad]
    while len(said[good][1]) < MOST - 1:
        step(batch, said, alone)
    end(batch, model, said, good)


@pytest.mark.parametrize("draws", [3_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_distribution_of_two_rows_stays_the_same(draws):
    """A chi-square test of what follows each token in either row, with random drafts and a table in place of a model."""
    table = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]]))
    random, said = np.random.default_rng(1).integers(0, 4, (2, draws + 9)).tolist(), ([0], [0])
    mx.random.seed(2)

    def forward(ids, cache, last_only=False):
        return table[ids][:, -1:] if last_only else table[ids]

    rows = [
        Drafted(Picker(mx.random.categorical, (), None), Noise(text, most))
        for text, most in zip(random, (2, 3), strict=True)
    ]
    for row in rows:
        row.picker.picked = row.picker.pick(table[:1])
    steps = Speculation(forward, [], rows, Pace(always=True).of(2))
    while min(map(len, said)) <= draws:
        for n, token in next(steps).items():
            said[n].append(token)
    for row, found in zip(rows, said, strict=True):
        counts, p, before = Counter(pairwise(found)), np.exp(np.asarray(table)), Counter(found[:-1])
        statistic = sum((counts[a, b] - (e := before[a] * p[a, b])) ** 2 / e for a in range(4) for b in range(4))
        assert draws * 0.1 < row.counts.accepted < row.counts.drafted
        assert statistic < 32.9  # 12 degrees of freedom, p = 0.001


class Noise:
    """Drafts a given text, whatever has come."""

    def __init__(self, text, most):
        self._text, self._most, self._at = text, most, 0

    def add(self, token):
        self._at += 1

    def draft(self, most):
        at = self._at % (len(self._text) - 9)
        return Draft(self._text[at : at + min(most, self._most)], 1)


@pytest.mark.parametrize("backend", backends("fast"))
def test_through_kernels(backend):
    model = make_model(**PACKABLE, num_hidden_layers=2, layer_group_size=2)
    said = {}
    for n, prompt in PROMPTS.items():
        cache, logits = read(model, prompt)
        said[n] = list(decode(logits, model, cache, mx.array(prompt), max_tokens=MOST, **how(n)))
    with launch.use(backend):
        batch, rows = together(model, said, {5: "every third", 40: "perfect", 11: "random"}, 4)
        for _ in range(8):
            for number, token in batch.step().items():
                rows[number][1].append(token)
        caches = {number: batch.remove(number) for number in rows}
    for number, (n, found) in rows.items():
        assert found == [t for t, _ in said[n][: len(found)]]
        check_cache(model, caches[number], [*PROMPTS[n], *found], 1e-4)


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0, 2), (1, 3), (3, 3)])
def test_rows_end_in_different_columns_until_they_are_flushed(counts):
    """Against a batch of the same tokens that never had more."""
    k, v = (mx.random.normal((2, 2, 12, 4)) for _ in range(2))
    padding = [0, 2]

    def filled(upto):
        c = RaggedKVCache(padding)
        c.update_and_fetch(k[:, :, :upto], v[:, :, :upto])
        return c

    cache = filled(9)
    cache.take_back(counts)
    cache.update_and_fetch(k[:, :, 9:11], v[:, :, 9:11])
    seen = np.asarray(cache.make_mask(1))[:, 0, 0]
    for flushed in (False, True):
        if flushed:
            cache.flush()
            assert not cache.is_ragged
        for b, n in enumerate(counts):
            right = mx.concatenate([k[b, :, padding[b] : 9 - n], k[b, :, 9:11]], axis=1)
            start = int(cache.left_padding[b])
            assert int(cache.offset[b]) == right.shape[1]
            assert mx.array_equal(cache.keys[b, :, start : start + right.shape[1]], right)
            if not flushed:
                assert seen[b].nonzero()[0].tolist() == list(range(start, start + right.shape[1] + 1))
            else:
                assert start + right.shape[1] == cache.size()
                assert mx.array_equal(cache.extract(b).keys[0], right)
    assert min(np.asarray(cache.left_padding).tolist()) == 0
