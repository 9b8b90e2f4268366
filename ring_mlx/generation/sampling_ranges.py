"""The values that each setting of an answer may have, the same in options, requests, the chat and `Session`."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from dataclasses import dataclass
from numbers import Real
from typing import cast

from ring_mlx.model.config_values import shown

MOST = 1 << 53  # what every JSON reader keeps exactly
MOST_CONTEXT = 1 << 24
MOST_BIAS = 1e30  # beyond, a sum of two is no longer a float32
REST = -1  # as ``max_tokens``: as many as the context has room for


class OutOfRangeError(ArgumentTypeError, ValueError):
    """A value that a setting may not have; argparse shows its text."""


@dataclass(frozen=True)
class Range:
    """A setting of `Sampling` and its values from ``least`` to ``greatest``, whole where these are ints, or in ``also``.

    ``about`` describes it, with the default in brackets.
    """

    name: str
    about: str
    least: float
    greatest: float
    also: tuple[int, ...] = ()

    @property
    def is_whole(self) -> bool:
        return isinstance(self.least, int)

    @property
    def words(self) -> str:
        """The values, such as "a number from 0 to 1"."""
        kind = "a whole number" if self.is_whole else "a number"
        least, greatest = (str(e) if isinstance(e, int) else f"{e:.10g}" for e in (self.least, self.greatest))
        ends = f"from {least} {'up' if self.greatest == MOST else f'to {greatest}'}"
        return " or ".join([f"{kind} {ends}", *map(str, self.also)])

    def read(self, text: str) -> float:
        """The value in a text; raises OutOfRangeError if there is none."""
        for kind in (int, float):
            try:
                return self.check(kind(text))
            except OutOfRangeError:
                raise
            except ValueError:
                pass
        raise self.refusal(text)

    def check(self, value: object, name: str = "") -> float:
        """A value as an int or a float; raises OutOfRangeError, with the name it was sent as, if it is none."""
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self.refusal(value, name)
        number = cast(float, value)
        if not (self.least <= number <= self.greatest or number in self.also):
            raise self.refusal(value, name)
        if not self.is_whole:
            return float(number)
        if number != math.floor(number):
            raise self.refusal(value, name)
        return int(number)

    def refusal(self, value: object, name: str = "") -> OutOfRangeError:
        """The message about a value that is not allowed."""
        return OutOfRangeError(f"{name or self.name} {shown(value, 40)} is not {self.words}")


RANGES = {
    r.name: r
    for r in (
        Range("temp", "temperature; 0 is greedy (the checkpoint's, else 0.6)", 0.0, 100.0),
        Range("top_p", "nucleus probability; 0 is the likeliest only (the checkpoint's, else 1)", 0.0, 1.0),
        Range("min_p", "least probability, relative to the best (the checkpoint's, else 0)", 0.0, 1.0),
        Range("top_k", "only the k likeliest; 0 is all (the checkpoint's, else 0)", 0, MOST),
        Range("xtc_probability", "how often XTC applies (0)", 0.0, 1.0),
        Range("xtc_threshold", "threshold of XTC (0.1)", 0.0, 0.5),
        Range("min_tokens_to_keep", "the fewest tokens that --min-p keeps (1)", 1, MOST_CONTEXT),
        Range("seed", "repeats an answer", -(1 << 63), (1 << 64) - 1),
        Range("repetition_penalty", "penalty for repeated tokens; 1 is none (the checkpoint's, else 1)", 0.01, 100.0),
        Range("repetition_context_size", "how many of the last tokens count (20)", 1, MOST_CONTEXT),
        Range("presence_penalty", "subtracted from logits of tokens seen (0)", -100.0, 100.0),
        Range("presence_context_size", "how many of the last tokens count (20)", 1, MOST_CONTEXT),
        Range("frequency_penalty", "subtracted for each time a token was seen (0)", -100.0, 100.0),
        Range("frequency_context_size", "how many of the last tokens count (20)", 1, MOST_CONTEXT),
        Range("logit_bias", "added to a token's logit", -MOST_BIAS, MOST_BIAS),
        Range(
            "max_tokens", "tokens of an answer, thought included; -1 is what the context holds (-1)", 1, MOST, (REST,)
        ),
        Range("thinking_budget", "close the thought after this many tokens", 0, MOST),
    )
}


def value_range(name: str) -> Range:
    """The values of a setting, by its name in RANGES."""
    return RANGES[name]


def within(max_tokens: int, room: int) -> int:
    """How many tokens an answer may have if the context has room for ``room``."""
    return room if max_tokens == REST else min(int(max_tokens), room)
