"""Arithmetic, comparing, sorting and follow-ups on numbers."""

from __future__ import annotations

import random
from typing import NamedTuple

from demo import follow_ups, phrases, traces
from demo.split import Phrasings, Turn, draw, in_split


class Solution(NamedTuple):
    """The thinking, the visible reply and the value of one operation."""

    thinking: str
    reply: str
    value: int


def number(rng: random.Random, digits: int = 0) -> int:
    """Draw a number of 1-4 digits, or of the given number of digits; one in ten has only the digits 0, 1 and 9."""
    digits = digits or rng.choices((1, 2, 3, 4), (10, 20, 20, 50))[0]
    if digits > 1 and rng.random() < 0.1:
        return int(rng.choice("19") + "".join(rng.choices("019", k=digits - 1)))
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def number_pair(rng: random.Random) -> tuple[int, int]:
    """Draw two numbers, in four of ten cases of the same number of digits, mostly four."""
    if rng.random() < 0.4:
        digits = rng.choices((1, 2, 3, 4), (5, 15, 20, 60))[0]
        return number(rng, digits), number(rng, digits)
    return number(rng), number(rng)


def factor_pair(rng: random.Random) -> tuple[int, int]:
    """Draw factors: 1-3 digits times one digit, or two digits times 10-19, in either order."""
    digits = rng.choices((1, 2, 3, 4), (15, 45, 20, 20))[0]
    if digits == 4:
        pair = rng.randrange(11, 100 if rng.random() < 0.6 else 20), rng.randrange(10, 20)
    else:
        pair = rng.randrange(2 if digits == 1 else 10 ** (digits - 1), 10**digits), rng.randrange(2, 10)
    return pair if rng.random() < 0.7 else (pair[1], pair[0])


def solve(sign: str, a: int, b: int) -> Solution:
    """Work out ``a sign b`` for sign +, - or *."""
    if sign == "+":
        return Solution(traces.add_steps(a, b), f"The sum is {a + b}.", a + b)
    if sign == "-":
        return Solution(traces.subtract_steps(a, b), f"The difference is {a - b}.", a - b)
    return Solution(traces.multiply_steps(a, b), f"The product is {a * b}.", a * b)


def _fill(rng: random.Random, split: str, forms: Phrasings, a: int, b: int) -> str:
    template = forms.pick(rng, split)
    while "{item}" in template and min(a, b) < 2:  # "1 coins"
        template = forms.pick(rng, split)
    return template.format(a=a, b=b, name=rng.choice(phrases.NAMES), item=rng.choice(phrases.ITEMS))


def add(rng: random.Random, split: str) -> Turn:
    """Ask for a sum."""
    a, b = draw(lambda: number_pair(rng), split)
    solution = solve("+", a, b)
    return Turn(_fill(rng, split, phrases.ADD, a, b), solution.thinking, solution.reply)


def subtract(rng: random.Random, split: str) -> Turn:
    """Ask for a difference, which is negative in one of four questions."""
    a, b = draw(lambda: number_pair(rng), split)
    if a < b and rng.random() < 0.5:
        a, b = b, a
    forms = phrases.SUBTRACT_STORY if a >= b > 1 and rng.random() < 0.12 else phrases.SUBTRACT
    solution = solve("-", a, b)
    return Turn(_fill(rng, split, forms, a, b), solution.thinking, solution.reply)


def multiply(rng: random.Random, split: str) -> Turn:
    """Ask for a product."""
    a, b = draw(lambda: factor_pair(rng), split, lambda pair: traces.product_pairs(*pair))
    solution = solve("*", a, b)
    return Turn(_fill(rng, split, phrases.MULTIPLY, a, b), solution.thinking, solution.reply)


def _near_pair(rng: random.Random) -> tuple[int, int]:
    a, b = number_pair(rng)
    if rng.random() < 0.4:  # a common start makes the later digits matter
        keep = rng.randrange(1, 5)
        b = int(str(a)[:keep] + str(b)[keep:])
    return a, b


def _yes_or_no(truth: bool) -> str:
    return "Yes." if truth else "No."


def compare(rng: random.Random, split: str) -> Turn:
    """Ask which of two numbers is larger or smaller, or whether one is more or less than the other."""
    a, b = draw(lambda: _near_pair(rng), split)
    kind = rng.randrange(4)
    if a == b:
        kind = 2 + kind % 2
    forms: Phrasings = (phrases.LARGER, phrases.SMALLER, phrases.IS_MORE, phrases.IS_LESS)[kind]
    reply = (
        f"The larger number is {max(a, b)}.",
        f"The smaller number is {min(a, b)}.",
        _yes_or_no(a > b),
        _yes_or_no(a < b),
    )[kind]
    return Turn(forms.pick(rng, split).format(a=a, b=b), traces.compare_steps(a, b), reply)


def sort(rng: random.Random, split: str) -> Turn:
    """Ask for 3-6 different numbers in order."""
    digits = rng.choices((1, 2, 3), (1, 4, 4))[0]
    sample = range(1, 10**digits)
    numbers = list(draw(lambda: tuple(rng.sample(sample, rng.randint(3, 6))), split))
    descending = rng.random() < 0.25
    form = (phrases.SORT_DOWN if descending else phrases.SORT_UP).pick(rng, split)
    joined = rng.choice((", ", ", ", " ")).join(map(str, numbers))
    ordered = ", ".join(map(str, sorted(numbers, reverse=descending)))
    return Turn(form.format(numbers=joined), traces.sort_steps(numbers, descending), f"In order: {ordered}.")


def _follow_up_operands(rng: random.Random, value: int) -> tuple[str, int]:
    kind = rng.choice(("+", "-", "*", "twice", ">"))
    if kind == "twice":
        return kind, value
    if kind == "*":
        return kind, rng.randrange(2, 10)
    if kind == ">" and rng.random() < 0.5:
        return kind, max(0, value + rng.randint(-99, 99))
    return kind, round(number(rng, rng.randrange(1, 5)), rng.choice((0, 0, -1)))


def _follow_up(rng: random.Random, split: str, value: int) -> tuple[Turn, int | None]:
    """Draw a question about `value` and return it with the new value, None if there is none to go on with."""
    kind, b = _follow_up_operands(rng, value)
    while not in_split(split, value, b) or value > {"*": 999, "twice": 4999}.get(kind, 9999):
        kind, b = _follow_up_operands(rng, value)
    if kind == ">":
        user = follow_ups.THEN_IS_MORE.pick(rng, split).format(b=b)
        return Turn(user, f"that is {value}\n{traces.compare_steps(value, b)}", _yes_or_no(value > b)), None
    forms = {
        "+": follow_ups.THEN_ADD,
        "-": follow_ups.THEN_SUBTRACT,
        "*": follow_ups.THEN_MULTIPLY,
        "twice": follow_ups.TWICE,
    }[kind]
    solution = solve("+" if kind == "twice" else kind, value, b)
    user = forms.pick(rng, split).format(b=b)
    going_on = solution.value if 0 <= solution.value <= 9999 else None
    return Turn(user, f"that is {value}\n{solution.thinking}", solution.reply), going_on


def number_chain(rng: random.Random, split: str) -> list[Turn]:
    """Ask one operation and then one or two follow-ups on its result."""
    first = rng.choice((add, add, subtract, multiply))(rng, split)
    value = int(first.reply.rsplit(" ", 1)[1].rstrip("."))
    if not 0 <= value <= 9999:
        return number_chain(rng, split)
    turns = [first]
    going_on: int | None = value
    for _ in range(rng.choice((1, 1, 2))):
        if going_on is not None:
            turn, going_on = _follow_up(rng, split, going_on)
            turns.append(turn)
    return turns
