"""The gate of drafts in a simulation without clocks: it loses next to nothing whatever comes, and is near the best fixed number."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from ring_mlx.generation.drafts import MODEL, MOST_TOKENS
from ring_mlx.generation.estimates import DRAFTED, READ
from ring_mlx.generation.pace import FORGET_TOKENS, GAIN, LOSS_PART, LOSS_STEPS, PLAIN_EVERY, Pace

LENGTH = 4  # of the n-gram that finds all drafts
H200 = {1: 1.0, 2: 1.32, 3: 1.37, 4: 1.42, 5: 1.555, 6: 1.69, 7: 1.825, 8: 1.96}  # as measured over plain decoding
CPU = {T: 1 + 0.45 * (T - 1) for T in range(1, 9)}
STEEP = {T: 1 + 0.2 * (T - 1) if T <= 4 else 6.0 for T in range(1, 9)}  # as without a kernel for more tokens
NO_USE = {T: float(T) for T in range(1, 9)}
NOISE = 0.1
LEAST = 0.98


def constant(p):
    return lambda n, draws: [p] * n


def turns(tokens, high, low):
    return lambda n, draws: [low if at // tokens % 2 else high for at in range(n)]


def bursts(n, draws):
    ps, high = [], False
    while len(ps) < n:
        high = not high
        ps += [0.95 if high else 0.05] * (1 + int(draws.expovariate(1 / (12 if high else 30))))
    return ps[:n]


RISES = {f"constant {p}": constant(p) for p in (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0)}
CHANGES = {
    "turns of 10": turns(10, 1.0, 0.0),
    "turns of 20": turns(20, 1.0, 0.0),
    "turns of 40": turns(40, 0.9, 0.0),
    "waves": lambda n, draws: [0.5 + 0.5 * math.sin(at / 80) for at in range(n)],
    "dies": lambda n, draws: [0.9 if at < n // 4 else 0.1 for at in range(n)],
    "wakes": lambda n, draws: [0.1 if at < n // 2 else 0.9 for at in range(n)],
    "bursts": bursts,
}


def told(course, n, seed):
    """Whether the draft's token in each place is right."""
    draws = random.Random(seed)
    return [draws.random() < p for p in course(n, draws)]


def run(right, costs=H200, pace=None, seed=0, noise=NOISE, spikes=0.0, length=LENGTH, a_draft=0.0, unread=0.0):
    """Tokens in the time of plain steps over the time that they took, by the true costs; the pace sees noise and spikes.

    A draft model drafts at ``a_draft`` a token, once it has read a text for ``unread``, in plain steps.
    """
    pace, draws, at, time = pace or Pace(), random.Random(-seed), 0, 0.0
    while at < len(right):
        is_model = length == MODEL
        if is_model and unread and pace.may_read(round(unread / READ)):
            pace.reading(round(unread / READ), unread)
            time, unread = time + unread, 0.0
        T = 1 + min(0 if unread else pace.wanted(length), len(right) - at - 1)
        came = 0
        while came < T - 1 and right[at + came + 1]:
            came += 1
        if T > 1 or not is_model:  # the first token was foreseen before it was known
            pace.compared(length, right[at])
        for n in range(T - 1):
            if n <= came:
                pace.compared(length, n < came, n)
        if T > 1 and a_draft:
            pace.drafting(T - 1, a_draft * (T - 1))
        pace.count(T, came + 1)
        seconds = costs[T] * max(0.3, draws.gauss(1, noise)) * (10.0 if draws.random() < spikes else 1.0)
        pace.took(T, seconds)
        time += costs[T] + a_draft * (T - 1)
        at += came + 1
    return len(right) / time


def best_fixed(right, costs=H200):
    def fixed(T):
        at, time = 0, 0.0
        while at < len(right):
            came = 0
            while came < T - 1 and at + came + 1 < len(right) and right[at + came + 1]:
                came += 1
            time, at = time + costs[T], at + came + 1
        return len(right) / time

    return max(fixed(T) for T in costs)


@pytest.mark.parametrize("name", [*RISES, *CHANGES])
def test_it_loses_next_to_nothing_and_gains_nearly_all(name):
    course = (RISES | CHANGES)[name]
    for n, seeds, near in ((256, 4, 0.86), (1000, 2, 0.9)):
        texts = [told(course, n, seed) for seed in range(seeds)]
        ratios = [run(right, seed=seed) for seed, right in enumerate(texts)]
        assert min(ratios) >= LEAST
        of_best = [ratio / best_fixed(right) for ratio, right in zip(ratios, texts, strict=True)]
        assert statistics.mean(of_best) > near


@pytest.mark.parametrize("costs", [CPU, STEEP, NO_USE])
@pytest.mark.parametrize("name", ["constant 0.0", "constant 0.4", "constant 0.9", "turns of 20", "bursts"])
def test_other_machines(name, costs):
    texts = [told((RISES | CHANGES)[name], 600, seed) for seed in range(4)]
    ratios = [run(right, costs, seed=seed) for seed, right in enumerate(texts)]
    assert min(ratios) >= LEAST
    of_best = [ratio / best_fixed(right, costs) for ratio, right in zip(ratios, texts, strict=True)]
    assert statistics.mean(of_best) > 0.88


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_spikes_of_a_busy_machine(p):
    texts = [told(constant(p), 600, seed) for seed in range(6)]
    ratios = [run(right, seed=seed, noise=0.2, spikes=0.02) for seed, right in enumerate(texts)]
    assert min(ratios) >= LEAST
    assert statistics.mean(ratios) > {0.0: 0.99, 0.3: 0.99, 0.9: 2.4}[p]


@pytest.mark.parametrize("seed", range(3))
def test_drafts_that_look_right_until_they_are_read(seed):
    """The worst that can come: right wherever they are only compared, and wrong wherever they cost something."""
    pace, draws, time, n = Pace(), random.Random(seed), 0.0, 2000
    for _ in range(n):
        T = 1 + pace.wanted(LENGTH)
        pace.compared(LENGTH, True)
        if T > 1:
            pace.compared(LENGTH, False)
        pace.count(T, 1)
        pace.took(T, H200[T] * draws.gauss(1, NOISE))
        time += H200[T]
    assert time > n + LOSS_STEPS / 2
    assert time <= n * (1 + 1.1 * LOSS_PART) + 3 * LOSS_STEPS


def test_steps_that_are_not_usual_cost_credit_and_teach_nothing():
    pace = Pace()
    for _ in range(30):
        pace.compared(LENGTH, True)
    for _ in range(3):
        pace.took(1, 1.0)
    guessed = pace.costs.step(2)
    assert pace.wanted(LENGTH) == 1
    pace.count(2, 1)
    pace.took(2, 50.0, is_usual=False)  # it compiled, and its draft was wrong
    assert pace.wanted(LENGTH) == 0
    assert (pace.costs.step(2), pace.costs.plain, pace.costs.longest) == (guessed, 1.0, 1)
    for launch_s, steps in ((1.0, 150), (1.02, 300)):
        waited = 0
        while not pace.wanted(LENGTH):
            pace.took(1, launch_s, is_usual=False)
            waited += 1
            if waited > steps:
                break
        assert (waited <= steps) == (launch_s == 1.0)
        pace.count(2, 1)
        pace.took(2, 50.0, is_usual=False)
    assert pace.costs.plain == 1.0


@pytest.mark.parametrize("costs", [H200, CPU, STEEP])
def test_a_short_look_at_the_first_token_decides_as_a_whole_one(costs):
    draws, decided = random.Random(1), set()
    for _ in range(200):
        pace, rows, right = Pace(), draws.randrange(1, 4), draws.random()
        for _ in range(3):
            pace.took(1, 1.0)
        for T in range(2, 2 + draws.randrange(7)):
            pace.took(T, costs[T])
        pace._credit = LOSS_STEPS
        for at in (0, 1, 2) * draws.randrange(12):
            pace.compared(draws.choice((2, LENGTH)), draws.random() < right, at)
        lengths = [draws.choice((0, 2, LENGTH)) for _ in range(rows)]
        T, a_token = pace.best(*lengths, most_loss=LOSS_STEPS)
        wanted = pace.wanted(*lengths)
        assert wanted == (T - 1 if a_token * GAIN < 1 else 0)
        decided.add(wanted > 0)
    assert decided == {False, True}


def test_a_lucky_past_does_not_pay_for_long():
    """What was gained is credit only up to a bound, so a conversation that changes loses little from there on."""
    pace = Pace()
    run([True] * 4000, pace=pace)
    assert run([False] * 1000, pace=pace) > LEAST


def test_each_place_of_a_draft_has_its_own_chance():
    """Where only the first token is ever right, two are read, however cheap more would be."""
    pace, used = Pace(), []
    for n in range(400):
        pace.took(1, 1.0)
        T = 1 + pace.wanted(LENGTH)
        used += [T] * (n >= 40 and T > 1)
        pace.compared(LENGTH, True)
        if T > 2:
            pace.compared(LENGTH, False, 1)
        pace.count(T, min(T, 2))
        if T > 1:
            pace.took(T, H200[T])
    assert len(used) > 300
    assert statistics.mean(used) < 2.8  # it looks again now and then, at little cost
    assert max(used) > 2


def test_what_was_slow_once_is_tried_again():
    pace = Pace()
    pace.took(1, 1.0)
    for T in range(2, 9):
        pace.took(T, 50.0)
    for _ in range(FORGET_TOKENS):
        assert pace.wanted(LENGTH) == 0
        pace.compared(LENGTH, True)
        pace.took(1, 1.0)
    assert pace.wanted(LENGTH) > 0


def test_a_machine_that_becomes_faster_is_noticed():
    """Plain steps are timed now and then also where drafts are always right."""
    pace = Pace()
    run([True] * 2000, NO_USE | {8: 4.0}, pace, noise=0.0)
    assert pace.wanted(LENGTH) == MOST_TOKENS
    ratio = run([True] * 16 * PLAIN_EVERY, {1: 0.2, **dict.fromkeys(range(2, 9), 4.0)}, pace, noise=0.0)
    assert pace.wanted(LENGTH) == 0
    assert ratio > 2.2  # where eight at once would give 2


def test_nothing_is_drafted_before_a_plain_step_was_timed():
    pace = Pace()
    for _ in range(30):
        pace.compared(LENGTH, True)
    assert pace.wanted(LENGTH) == 0
    for _ in range(3):
        pace.took(1, 1.0)
    assert pace.wanted(LENGTH) == 1  # longer steps follow those that were timed
    assert pace.wanted(2) == 0  # of which nothing is known
    assert pace.wanted(0) == 0
    assert Pace(3, always=True).wanted(LENGTH) == 3


def test_rows_have_their_own_costs_and_share_what_is_right():
    pace = Pace()
    for _ in range(30):
        pace.compared(LENGTH, True)
    three = pace.of(3)
    assert pace.of(1) is pace
    assert pace.of(3) is three.of(3) is three
    for _ in range(3):
        three.took(1, 1.0)
    assert pace.wanted(LENGTH) == 0
    assert three.wanted(LENGTH, LENGTH, LENGTH) > 0
    assert three.best(LENGTH, LENGTH, LENGTH)[1] < three.best(LENGTH, LENGTH, 0)[1] < three.best(LENGTH, 0, 0)[1]
    three.count(4, 4, 1, 2)
    assert (three.drafted, three.accepted, three.tokens) == (9, 4, 7)


# A draft model, of which nothing is known before it has drafted


@pytest.mark.parametrize(("p", "least"), [(0.0, LEAST), (0.3, LEAST), (0.5, LEAST), (0.7, 1.05), (0.9, 1.7)])
def test_a_draft_model(p, least):
    texts = [told(constant(p), 800, seed) for seed in range(4)]
    assert min(run(right, seed=seed, length=MODEL, a_draft=0.15) for seed, right in enumerate(texts)) > least


@pytest.mark.parametrize("unread", [0.5, 4.0, 12.0])
def test_a_draft_model_that_is_never_right_reads_within_the_bound(unread):
    for n in (256, 3000):
        pace = Pace()
        assert run([False] * n, pace=pace, length=MODEL, a_draft=0.15, unread=unread) > LEAST


def test_a_draft_model_that_pays_reads_a_long_text_when_its_credit_covers_it():
    pace = Pace()
    slow = run(told(constant(0.9), 3000, 1), pace=pace, length=MODEL, a_draft=0.15, unread=12.0)
    assert 1.1 < slow < 2.0
    assert run(told(constant(0.9), 600, 2), pace=pace, length=MODEL, a_draft=0.15, unread=6.0) > 1.6  # the next answer


def test_a_draft_model_rests_while_it_does_not_pay_and_is_tried_again():
    pace = Pace()
    for _ in range(3):
        pace.took(1, 1.0)
    assert pace.wanted(MODEL) > 0
    pace.compared(MODEL, False)
    pace.compared(MODEL, False)
    assert pace.wanted(MODEL) == 0  # two mistakes are enough
    rested = 0
    while not pace.wanted(MODEL):
        pace.took(1, 1.0)
        rested += 1
    assert 10 < rested < 1000
    for _ in range(30):
        for at in range(4):
            pace.compared(MODEL, True, at)
    assert pace.wanted(MODEL) > 0


def test_the_price_of_drafts_counts():
    pace = Pace()
    for _ in range(3):
        pace.took(1, 1.0)
    for _ in range(30):
        pace.compared(MODEL, True)
    assert pace.best(MODEL)[1] == pytest.approx((1 + 0.3 + DRAFTED) / 2, rel=0.05)
    assert pace.wanted(MODEL) == 1
    for _ in range(5):
        pace.drafting(2, 2.0)  # as dear as the model's own
    assert pace.wanted(MODEL) == 0
