"""Several tokens a step: the same text, cache and log-probabilities as one a step, whatever is drafted."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from metal_kernels import launch
from ring_mlx.cli import main
from ring_mlx.errors import ModelError
from ring_mlx.generation.decoding import Picked, Picker, decode, prefill
from ring_mlx.generation.drafts import MOST_TOKENS, Draft, PromptLookup
from ring_mlx.generation.pace import Pace
from ring_mlx.generation.sampling import SeededSampler
from ring_mlx.generation.speculation import speculate
from ring_mlx.model.tentative import Tentative
from tests.compare import assert_close
from tests.kernel_backends import backends
from tests.tiny import PACKABLE, make_model, tokens

LENGTH = 24
PROMPT = tokens(11, seed=5)[0].tolist()
SAMPLERS = {
    "greedy": lambda: None,
    "seeded": lambda: SeededSampler(make_sampler(0.9, 0.95, 0.01, top_k=20), 7),
    "xtc": lambda: SeededSampler(make_sampler(1.0, xtc_probability=0.5, xtc_threshold=0.1), 3),
}
PROCESSORS = {"none": (), "penalties": make_logits_processors({3: 2.0}, 1.4, 20, 0.3, 20, 0.2, 20)}


@pytest.fixture(scope="module")
def model():
    return make_model()


class Told:
    """A drafter that knows what comes, and spoils what a rule says: of which token, how many tokens at most."""

    def __init__(self, text, is_spoiled=lambda at: False, most=MOST_TOKENS):
        self._text, self._is_spoiled, self._most, self._at = text, is_spoiled, most, 0

    def add(self, token):
        assert token == self._text[self._at]
        self._at += 1

    def draft(self, most):
        ahead = range(self._at, min(self._at + min(most, self._most), len(self._text)))
        return Draft([(self._text[n] + self._is_spoiled(n)) % 70 for n in ahead], 1 if ahead else 0)


class Noise:
    """Drafts a given text, whatever has come."""

    def __init__(self, text, most):
        self._text, self._most, self._at = text, most, 0

    def add(self, token):
        self._at += 1

    def draft(self, most):
        return Draft(self._text[self._at : self._at + min(most, self._most)], 1)


def read(model, prompt=PROMPT):
    cache = model.make_cache()
    *_, (_, logits) = prefill(mx.array(prompt), model, cache, [len(prompt)])
    return logits, cache


def forcing(at, ids):
    """A `next_forced` that replaces tokens from one on; it may be asked once for each token."""
    asked = itertools.count()

    def forced():
        n = next(asked) - at
        return ids[n] if 0 <= n < len(ids) else None

    return forced


def plain(model, take=LENGTH, *, max_tokens=LENGTH, **how):
    logits, cache = read(model)
    steps = decode(logits, model, cache, mx.array(PROMPT), max_tokens=max_tokens, **options(**how))
    return taken(steps, take), cache


def several(model, drafter, take=LENGTH, *, pace=None, **how):
    logits, cache = read(model)
    pace = pace or Pace(always=True)
    steps = speculate(logits, model, cache, PROMPT, drafter, pace, max_tokens=LENGTH, **options(**how))
    return taken(steps, take), cache


def options(sampler="greedy", processors="none", forced=None):
    return {
        "sampler": SAMPLERS[sampler](),
        "logits_processors": PROCESSORS[processors],
        "next_forced": forced and forcing(*forced),
    }


def taken(steps, count):
    """The first tokens of a generator that is then closed."""
    found = list(itertools.islice(steps, count))
    steps.close()
    return found


def assert_same(found, expected, tolerance=1e-6):
    (steps, cache), (right, right_cache) = found, expected
    assert [t for t, _ in steps] == [t for t, _ in right]
    for (_, a), (_, b) in zip(steps, right, strict=True):
        assert_close(a, b, 10 * tolerance)
    assert cache.offset == right_cache.offset
    for mine, other in zip(cache, right_cache, strict=True):
        if isinstance(mine, KVCache):
            for a, b in ((mine.keys, other.keys), (mine.values, other.values)):
                assert_close(a[..., : mine.offset, :], b[..., : mine.offset, :], 2 * tolerance)
        else:
            assert_close(mine[0], other[0], tolerance)


RULES = {
    "perfect": lambda at: False,
    "wrong": lambda at: True,
    "every third": lambda at: at % 3 == 2,
    "random": lambda at: at * 2654435761 % 100 < 40,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_drafter_gives_the_same(model, sampler, processors, rule):
    how = {"sampler": sampler, "processors": processors}
    expected = plain(model, **how)
    pace = Pace(always=True)
    found = several(model, Told([t for t, _ in expected[0]], RULES[rule]), pace=pace, **how)
    assert_same(found, expected)
    assert pace.tokens == LENGTH
    if rule == "perfect":
        assert pace.accepted == pace.drafted >= LENGTH - 6


@pytest.mark.parametrize("take", range(LENGTH + 1))
def test_a_stop_anywhere_leaves_what_was_given(model, take):
    expected = plain(model, take)
    text = [t for t, _ in plain(model)[0]]
    assert_same(several(model, Told(text, RULES["every third"]), take), expected)


@pytest.mark.parametrize("at", [0, 1, 4, 9, LENGTH - 3])
def test_a_forced_token_within_a_step(model, at):
    how = {"forced": (at, [9, 8, 7]), "sampler": "seeded", "processors": "penalties"}
    without = [t for t, _ in plain(model, sampler="seeded", processors="penalties")[0]]
    expected = plain(model, **how)

    assert_same(several(model, Noise(without, 7), **how), expected)


@settings(max_examples=15, deadline=None)
@given(noise=st.lists(st.integers(0, 69), min_size=LENGTH, max_size=LENGTH), take=st.integers(0, LENGTH))
def test_random_drafts(model, noise, take):
    assert_same(several(model, Noise(noise, 5), take), plain(model, take))


@pytest.mark.parametrize("draws", [3_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_distribution_stays_the_same(draws):
    """A chi-square test of what follows each token, with random drafts and a table in place of a model."""
    table = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]]))
    drafts, pace = np.random.default_rng(1).integers(0, 4, draws + 9).tolist(), Pace(always=True)
    mx.random.seed(2)

    def forward(ids, cache, last_only=False):
        return table[ids][:, -1:] if last_only else table[ids]

    how = {"max_tokens": draws, "sampler": mx.random.categorical}
    found = [t for t, _ in speculate(table[:1], forward, [], [0], Noise(drafts, 2), pace, **how)]
    counts, p = Counter(pairwise([0, *found])), np.exp(np.asarray(table))
    before = Counter([0, *found[:-1]])
    statistic = sum((counts[a, b] - (e := before[a] * p[a, b])) ** 2 / e for a in range(4) for b in range(4))
    assert draws * 0.1 < pace.accepted < pace.drafted
    assert statistic < 32.9  # 12 degrees of freedom, p = 0.001


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize("T", [2, 5, 8])
def test_through_kernels(backend, T):
    model = make_model(**PACKABLE, num_hidden_layers=2, layer_group_size=2)
    with launch.use(None):
        expected = plain(model, 10, max_tokens=10)
    text = [t for t, _ in plain(model)[0]]
    with launch.use(backend):
        logits, cache = read(model)
        drafter = Told(text, RULES["every third"], T - 1)
        steps = speculate(logits, model, cache, PROMPT, drafter, Pace(always=True), max_tokens=10)
        assert_same((list(steps), cache), expected, 1e-5)


@pytest.mark.parametrize("n", range(6))
def test_any_number_of_tokens_is_kept(model, n):
    ids = tokens(5, seed=3)
    (_, mine), (_, other) = read(model), read(model)
    tentative = Tentative(model, mine, ids.tolist())
    assert tentative.logits.shape == (1, 5, 70)
    tentative.keep([n])
    if n:
        model(ids[:, :n], other)
    assert mine.offset == other.offset == len(PROMPT) + n
    assert_close(model(tokens(3, seed=8), mine), model(tokens(3, seed=8), other), 1e-5)
    assert not hasattr(mine[0], "tentative")


def test_a_step_that_fails_leaves_the_cache_as_it_was(model, monkeypatch):
    (_, mine), (_, other) = read(model), read(model)
    last = model.layers[-1]
    whole = type(last)._feed_forward

    def feed_forward(layer, *a):
        if layer is last:
            raise MemoryError("full")
        return whole(layer, *a)

    monkeypatch.setattr(type(last), "_feed_forward", feed_forward)
    monkeypatch.setattr("ring_mlx.model.model.is_worthwhile", lambda: False)  # a compiled piece does not run it
    with pytest.raises(MemoryError):
        Tentative(model, mine, [[1, 2, 3]])
    monkeypatch.undo()
    assert mine.offset == other.offset
    assert_close(model(tokens(3, seed=8), mine), model(tokens(3, seed=8), other), 1e-6)


def test_logits_that_are_not_finite_end_the_answer_where_they_come(model):
    text = [t for t, _ in plain(model)[0]]

    def forward(ids, cache, last_only=False):
        found = model(ids, cache)
        nan = mx.array([[[float("nan") if t == text[4] else 0.0] for t in ids[0].tolist()]])
        found = found + nan
        return found[:, -1:] if last_only else found

    logits, cache = read(model)
    given, right = [], text[: text.index(text[4]) + 1]
    steps = speculate(logits, forward, cache, PROMPT, Told(text), Pace(always=True), max_tokens=LENGTH)
    with pytest.raises(ModelError, match="nan"):
        given.extend(t for t, _ in steps)
    assert given == right
    assert cache.offset == len(PROMPT) + len(right)


@pytest.mark.parametrize("fails_at", [3, 5, 9])
def test_a_processor_that_fails_within_a_step_leaves_what_was_given(model, fails_at):
    def process(ids, logits):
        if ids.size == len(PROMPT) + fails_at:
            raise ZeroDivisionError
        return logits

    text = [t for t, _ in plain(model)[0]]
    logits, cache = read(model)
    sampler = SeededSampler(lambda logprobs: mx.argmax(logprobs, axis=-1), 1)
    how = {"sampler": sampler, "logits_processors": [process], "max_tokens": LENGTH}
    steps = speculate(logits, model, cache, PROMPT, Told(text, most=3), Pace(always=True), **how)
    given = []
    with pytest.raises(ZeroDivisionError):
        given.extend(t for t, _ in steps)
    assert given == text[: len(given)]
    assert cache.offset == len(PROMPT) + len(given)
    assert sampler.drawn == len(given) + 1  # of the token that was picked, but not yielded
    other = read(model, PROMPT + given)[1]
    assert_close(model(tokens(3, seed=8), cache), model(tokens(3, seed=8), other), 1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_each_token_is_compared_once_with_its_draft(model, rule, monkeypatch):
    pace, hits = Pace(always=True), []
    monkeypatch.setattr(pace, "compared", lambda length, hit, at=0: hits.append(hit))
    several(model, Told([t for t, _ in plain(model)[0]], RULES[rule]), pace=pace)
    assert hits == [not RULES[rule](at) for at in range(LENGTH)]


def test_memory_is_given_back_as_often_as_by_plain_decoding(model, monkeypatch):
    text, cleared = [t for t, _ in plain(model)[0]], []
    monkeypatch.setattr("ring_mlx.generation.speculation.CLEAR_EVERY_TOKENS", 5)
    logits, cache = read(model)
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(None))
    list(speculate(logits, model, cache, PROMPT, Told(text, most=2), Pace(always=True), max_tokens=LENGTH))
    assert len(cleared) == LENGTH // 5


class Timed(Pace):
    """A pace that wants drafts as it is told, and keeps what it is told of times."""

    def __init__(self, wanted=(), **how):
        super().__init__(**how)
        self._wanted, self.times, self.unusual = iter(wanted), [], []

    def wanted(self, *lengths):
        return super().wanted(*lengths) if self.always else next(self._wanted, 0)

    def took(self, tokens, seconds, is_usual=True):
        (self.times if is_usual else self.unusual).append((tokens, seconds))
        super().took(tokens, seconds, is_usual)


class Gpu:
    """A clock and a model on it: steps run one after the other, and are waited for where their token is used."""

    def __init__(self, monkeypatch):
        self.now, self._busy, self._ends, self._kept = 0.0, 0.0, {}, []
        monkeypatch.setattr("ring_mlx.generation.speculation.time.perf_counter", lambda: self.now)
        pick, ids = Picker.pick, Picked.ids

        def timed_pick(picker, *a):
            picked = pick(picker, *a)
            self._kept.append(picked)
            self._ends[id(picked.y)] = self._busy
            return picked

        def timed_ids(picked):
            self.now = max(self.now, self._ends[id(picked.y)])
            return ids(picked)

        monkeypatch.setattr(Picker, "pick", timed_pick)
        monkeypatch.setattr(Picked, "ids", timed_ids)

    def __call__(self, ids, cache, last_only=False):
        self._busy = max(self._busy, self.now) + 9.0 + ids.shape[1]
        return mx.zeros((1, 1 if last_only else ids.shape[1], 4))


@pytest.mark.parametrize("ones", [0, 1, 2, 5])
def test_a_step_is_timed_by_what_it_costs_itself(ones, monkeypatch):
    """Single tokens are computed while others are handled, which hides their time in the step after them."""
    pace = Timed(([0, 0, *([3] + [0] * ones) * 30])[:60])
    gpu = Gpu(monkeypatch)
    how = {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1), "max_tokens": 61}
    assert [t for t, _ in speculate(mx.zeros((1, 4)), gpu, [], [0], Noise([0] * 99, 3), pace, **how)] == [0] * 61
    assert pace.accepted > 9
    assert all(seconds == 9 + t for t, seconds in (*pace.times, *pace.unusual))  # here no launch takes time
    assert {1, 4} <= {t for t, _ in pace.times}
    after = [t for t, _ in pace.unusual].count(1)
    assert after == (len([t for t, _ in (*pace.times, *pace.unusual) if t > 1]) if ones else 1)


def test_the_first_step_of_each_length_which_compiles_is_unusual(monkeypatch):
    pace = Timed([0, 0, 0, 3, 3, 2, 3])
    gpu = Gpu(monkeypatch)
    how = {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1), "max_tokens": 31}
    assert len(list(speculate(mx.zeros((1, 4)), gpu, [], [0], Noise([0] * 99, 3), pace, **how))) == 31
    assert [t for t, _ in pace.times if t > 1] == [4, 4]
    assert [t for t, _ in pace.unusual if t > 1] == [4, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 7))
def test_a_draft_is_what_followed_the_longest_earlier_place(text, most):
    found = PromptLookup(text).draft(most)
    for n in (6, 4, 3, 2):
        places = [i for i in range(n, len(text)) if text[i - n : i] == text[-n:]]
        if places and len(text) >= n:
            expected = [*text]
            for k in range(most):
                expected.append(expected[places[-1] + k])
            assert found == (expected[len(text) :], n)
            return
    assert found == ([], 0)


REPEATING = "Repeat: one two three four five. one two three four five. one two three four"


def generate(capsys, *flags):
    code = main(["generate", "--no-store", "--temp", "0", "--json", "-p", REPEATING, *flags])
    return code, capsys.readouterr()


def test_generate_says_the_same_and_counts(capsys):
    _, off = generate(capsys, "--speculate", "off")
    _, on = generate(capsys, "--speculate", "5")
    off, on = json.loads(off.out), json.loads(on.out)
    assert on["text"] == off["text"]
    counts = on["speculation"]
    assert 0 < counts["accepted"] <= counts["drafted"]
    assert counts["tokens"] > counts["steps"]
    assert "speculation" not in off


def test_generate_refuses_what_does_not_go_together(capsys):
    code, out = generate(capsys, "--speculate", "auto", "--kv-bits", "8", "--kv-group-size", "32")
    assert code == 2
    assert "--speculate auto does not go with --kv-bits; leave one of them out" in out.err


@pytest.mark.parametrize("value", ["8", "0", "on", "-1", "2.5"])
def test_generate_refuses_other_numbers(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate(capsys, f"--speculate={value}")
    assert f"{value!r} is not off, auto or a whole number from 1 to 7" in capsys.readouterr().err
