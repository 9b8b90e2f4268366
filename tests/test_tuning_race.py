"""Which way is the fastest beyond the noise, on a clock that only runs move."""

from __future__ import annotations

import pytest

from metal_kernels.choices import MLX
from ring_mlx.tuning.race import LEAST_ROUNDS, NO_TIME, SLOW, Budget, race
from tests.run_clock import SECRET, Clock


@pytest.fixture
def clock():
    return Clock()


def raced(clock, ways, default="kernel", seconds=10.0):
    return race("norm_qmv/1", ways, default, Budget(seconds, clock))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"kernel": 0.1, MLX: 0.2}, "kernel"),
        ({"kernel": 0.1, MLX: 0.08}, MLX),
        ({"kernel": 0.1, MLX: 0.2, "half": 0.09}, "half"),
        ({"kernel": 0.1, MLX: 0.2, "half": 0.09, "double": 0.08}, "double"),
        ({"kernel": 0.1, MLX: 0.2, "half": 0.0995}, "kernel"),  # less than 1 %
        ({"kernel": 0.1, MLX: 0.0995}, MLX),  # but nothing slower than MLX
        ({"kernel": 0.1, MLX: 0.085, "half": 0.09}, MLX),
        ({MLX: 0.1, "kernel": 0.05}, "kernel"),
    ],
)
def test_the_faster_is_chosen(clock, seconds, expected):
    ways = {name: clock.way(name, s) for name, s in seconds.items()}
    verdict = raced(clock, ways, default=next(iter(seconds)))
    assert verdict.chosen == expected
    assert verdict.seconds == pytest.approx(seconds)
    assert verdict.gain == pytest.approx(1 - seconds[expected] / seconds[verdict.default])


@pytest.mark.parametrize(("wobble", "expected"), [(0.0005, "half"), (0.02, "kernel")])
def test_the_default_stays_within_the_noise(clock, wobble, expected):
    ways = {
        "kernel": clock.way("kernel", 0.1, wobble=wobble),
        MLX: clock.way(MLX, 0.2),
        "half": clock.way("half", 0.097, wobble=-wobble),
    }
    assert raced(clock, ways).chosen == expected


def test_what_may_be_slower_than_mlx_is_not_chosen(clock):
    """MLX's median is the least, but too noisy to be ahead; what is ahead without doubt is behind it."""
    ways = {
        "kernel": clock.way("kernel", 0.1),
        MLX: clock.way(MLX, 0.08, wobble=0.06),
        "half": clock.way("half", 0.09),
    }
    verdict = raced(clock, ways)
    assert verdict.seconds[MLX] < verdict.seconds["half"]
    assert verdict.chosen == "kernel"


def test_what_slows_all_down_alike_changes_nothing(clock):
    """A chip that gets hot: the way that runs later in each round would lose where rounds did not turn around."""
    ways = {name: clock.way(name, 0.05) for name in ("kernel", MLX, "half")}
    heat = [1.0]

    def hotter(run):
        def hot(times):
            heat[0] *= 1.01
            clock.now += 0.05 * times * (heat[0] - 1)
            run(times)

        return hot

    assert raced(clock, {name: hotter(run) for name, run in ways.items()}).chosen == "kernel"


def test_ways_take_turns_forwards_and_backwards(clock):
    raced(clock, {"kernel": clock.way("k", 0.1), MLX: clock.way("m", 0.099), "half": clock.way("h", 0.098)})
    timed = "".join(clock.order[6:])
    assert [timed[i : i + 3] for i in range(0, 12, 3)] == ["hmk", "kmh", "hmk", "kmh"]


def test_what_is_behind_after_some_rounds_is_timed_no_further(clock):
    raced(clock, {"kernel": clock.way("k", 0.1), MLX: clock.way("m", 0.15), "half": clock.way("h", 0.098)})
    assert clock.order.count("m") == 2 + LEAST_ROUNDS
    assert clock.order.count("h") > 2 + LEAST_ROUNDS


def test_short_runs_are_timed_several_at_once(clock):
    ways = {"kernel": clock.way("k", 0.001), MLX: clock.way("m", 0.002)}
    verdict = raced(clock, ways)
    assert clock.now > 2 * LEAST_ROUNDS * 10 * 0.001
    assert verdict.seconds["kernel"] == pytest.approx(0.001)


@pytest.mark.parametrize("slow", [0.5, 3.0, 9.0])
def test_a_way_that_takes_forever_ends_with_its_first_runs(clock, slow):
    ways = {"kernel": clock.way("kernel", 0.05), MLX: clock.way(MLX, slow), "half": clock.way("half", 0.04)}
    verdict = raced(clock, ways)
    assert clock.now <= 10.0 + 0.05
    assert clock.order.count(MLX) <= 2
    assert verdict.out[MLX] in (SLOW, NO_TIME)


def test_nothing_is_chosen_that_was_not_held_against_mlx(clock):
    ways = {"kernel": clock.way("kernel", 0.5), MLX: clock.way(MLX, 0.5, first=6), "half": clock.way("half", 0.1)}
    verdict = raced(clock, ways)
    assert verdict.out[MLX] == NO_TIME
    assert verdict.chosen == "kernel"
    ways[MLX] = clock.failing(MLX)
    assert raced(clock, ways).chosen == "half"


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.9, 1.4, 3.0])
def test_the_budget_is_kept_whatever_it_is(clock, seconds):
    ways = {name: clock.way(name, 0.1, first=0.2) for name in ("kernel", MLX, "half", "double")}
    verdict = raced(clock, ways, seconds=seconds)
    assert clock.now <= max(seconds, 0.4) + 0.3
    assert set(verdict.seconds) | set(verdict.out) >= {MLX, "half", "double"}
    assert verdict.chosen == "kernel"


def test_a_way_that_raises_is_out_and_says_why(clock):
    ways = {"kernel": clock.way("kernel", 0.1), MLX: clock.way(MLX, 0.2), "half": clock.failing("half")}
    verdict = raced(clock, ways)
    assert verdict.out == {"half": SECRET}
    assert verdict.chosen == "kernel"


def test_where_the_default_raises_nothing_is_chosen(clock):
    verdict = raced(clock, {"kernel": clock.failing("kernel"), MLX: clock.way(MLX, 0.1)})
    assert verdict.chosen == "kernel"
    assert verdict.out["kernel"] == SECRET
