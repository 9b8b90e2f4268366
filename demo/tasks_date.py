"""Weekdays, months and dates of a year without a leap day."""

from __future__ import annotations

import random

from demo import phrases, traces
from demo.phrases import MONTH_DAYS, MONTHS, WEEKDAYS
from demo.split import Turn, draw


def _plural(n: int, unit: str) -> str:
    return unit if n == 1 else f"{unit}s"


def _walk(names: tuple[str, ...], start: str, steps: int) -> list[str]:
    """Return the start and the names after it (before it for negative steps), each step numbered."""
    at, way = names.index(start), 1 if steps >= 0 else -1
    shown = [f"{i} {names[(at + way * i) % len(names)]}" for i in range(1, abs(steps) + 1)]
    return [start, *shown]


def weekday(rng: random.Random, split: str) -> Turn:
    """Ask for the day of the week some days before or after one."""
    day, n = draw(lambda: (rng.choice(WEEKDAYS), rng.randint(1, rng.choice((7, 30, 100)))), split)
    back = rng.random() < 0.4
    weeks, rest = divmod(n, 7)
    walk = _walk(WEEKDAYS, day, -rest if back else rest)
    form = (phrases.DAY_BEFORE if back else phrases.DAY_AFTER).pick(rng, split)
    thinking = f"{n}=7*{weeks}+{rest}\n{', '.join(walk)}"
    return Turn(form.format(n=n, days=_plural(n, "day"), day=day), thinking, f"That is {walk[-1].split()[-1]}.")


def _month_and_distance(rng: random.Random) -> tuple[str, int]:
    n = 1 if rng.random() < 0.4 else rng.randint(2, 11)
    return rng.choice(MONTHS), -n if rng.random() < 0.4 else n


def month(rng: random.Random, split: str) -> Turn:
    """Ask for the month 1-11 months before or after one."""
    name, distance = draw(lambda: _month_and_distance(rng), split)
    n = abs(distance)
    forms = (phrases.MONTH_AFTER, phrases.MONTH_BEFORE)
    if n == 1 and rng.random() < 0.8:
        forms = (phrases.NEXT_MONTH, phrases.PREVIOUS_MONTH)
    user = forms[distance < 0].pick(rng, split).format(n=n, months=_plural(n, "month"), month=name)
    walk = _walk(MONTHS, name, distance)
    return Turn(user, ", ".join(walk), f"That is {walk[-1].split()[-1]}.")


def _days(name: str) -> int:
    return MONTH_DAYS[MONTHS.index(name)]


def _days_before(name: str) -> int:
    return sum(MONTH_DAYS[: MONTHS.index(name)])


def _date(rng: random.Random) -> tuple[str, int]:
    name = rng.choice(MONTHS)
    return name, rng.randint(1, _days(name))


def month_length(rng: random.Random, split: str) -> Turn:
    """Ask for the days of one month or of two together."""
    names: tuple[str, ...] = draw(
        lambda: tuple(rng.sample(MONTHS, rng.choice((1, 2)))),
        split,
        lambda names: [(_days(names[0]), _days(names[1]))] if len(names) == 2 else [],
    )
    facts = ", ".join(f"{name} has {_days(name)}" for name in names)
    if len(names) == 1:
        user = phrases.MONTH_LENGTH.pick(rng, split).format(month=names[0])
        return Turn(user, facts, f"The number of days is {_days(names[0])}.")
    a, b = map(_days, names)
    user = phrases.TWO_MONTHS_LENGTH.pick(rng, split).format(month=names[0], other=names[1])
    return Turn(user, f"{facts}\n{traces.add_steps(a, b)}", f"The number of days is {a + b}.")


def day_of_year(rng: random.Random, split: str) -> Turn:
    """Ask which day of the year a date is."""
    name, n = draw(lambda: _date(rng), split, lambda date: [(_days_before(date[0]), date[1])])
    before = _days_before(name)
    user = phrases.DAY_OF_YEAR.pick(rng, split).format(month=name, n=n)
    return Turn(user, f"days before {name}: {before}\n{traces.add_steps(before, n)}", f"It is day {before + n}.")


def _date_pairs(name: str, start: int, n: int) -> list[tuple[int, int]]:
    return [(start, n), (start + n, _days(name))][: 2 if start + n > _days(name) else 1]


def date_after(rng: random.Random, split: str) -> Turn:
    """Ask for the date 1-27 days after one, at most one month on."""
    name, start, n = draw(lambda: (*_date(rng), rng.randint(1, 27)), split, lambda operands: _date_pairs(*operands))
    user = phrases.DATE_AFTER.pick(rng, split).format(n=n, days=_plural(n, "day"), month=name, start=start)
    total, days = start + n, _days(name)
    steps = f"{traces.add_steps(start, n)}\n{name} has {days} days: {total}{traces.sign(total, days)}{days}"
    if total <= days:
        return Turn(user, steps, f"Date: {name} {total}.")
    following = MONTHS[(MONTHS.index(name) + 1) % 12]
    return Turn(
        user, f"{steps}, so {following}\n{traces.subtract_steps(total, days)}", f"Date: {following} {total - days}."
    )
