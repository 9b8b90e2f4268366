"""Drafts from the text itself: what followed its last tokens where they stood before; and how many to try, also of a model's."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import NamedTuple, Protocol

MOST_TOKENS = 7
LENGTHS = (6, 4, 3, 2)  # of n-grams, the longest first
MODEL = -1  # in the place of a length: a draft model's
FORCED = -2  # what a grammar forces, which is never wrong
SHIFT = 20  # bits of a token id within an n-gram's key
MASKS = {n: (1 << SHIFT * n) - 1 for n in LENGTHS}
# What a step of T tokens costs, over one of one token, before it was timed: 1 + SLOPE (T - 1). Bytes of mini's experts say so.
SLOPE = 0.3
DRAFT_COST = 0.25  # of a draft model's token, over one of the model, before it was timed
CERTAIN = 0.99  # the most acceptance
GAIN = 1.05  # what a step of several tokens must promise
HALF_LIFE = 16  # tokens after which what was accepted counts half
# A draft model is compared only where it drafts. So it starts with this acceptance, which counts as so many tokens, and goes back
# to it while it rests; what it knows counts half after so many tokens.
TRUST, TRUST_TOKENS, REST_HALF_LIFE = 0.75, 4, 128
TIMED = 5  # steps of each length whose median counts
# What steps of several tokens may lose: so many plain steps, and this part of the time. What they gain is credit up to a bound;
# one that took very long, such as the first of its length, is a debt up to a bound.
LOSS_STEPS, LOSS_PART, MOST_CREDIT, MOST_DEBT = 2.0, 0.01, 8.0, 0.5
FORGET_TOKENS = 256  # tokens without a draft after which times are taken again


class Draft(NamedTuple):
    """Tokens that may come next, found by the last ``length`` tokens."""

    tokens: list[int]
    length: int


class Drafter(Protocol):
    """Says which tokens may follow a text.

    Where drafting takes time, there is a method ``guess`` too: the next token as far as that is known without work, and by
    which n-gram or model more would be drafted.
    """

    def add(self, token: int) -> None:
        """Take the next token of the text."""

    def draft(self, most: int) -> Draft:
        """At most so many tokens that may come next, or none."""


@dataclass
class Counts:
    """Tokens of one answer that were drafted and read, and those of them that the model chose too."""

    drafted: int = 0
    accepted: int = 0


class PromptLookup:
    """Finds the last tokens earlier in the text, and drafts what followed them there; constant time a token.

    Args:
        tokens: The sequence so far.
        other: A text in which is looked too, though it is no part of the sequence.
    """

    def __init__(self, tokens: Sequence[int] = (), other: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._ends: dict[int, dict[int, int]] = {n: {} for n in LENGTHS}  # an n-gram's last place, but for its newest
        self._newest: dict[int, int] = {}
        self._last = 0
        self.sequence: list[int] = []
        for token in (*other, *tokens):
            self._read(token)
        self.sequence += tokens

    def __len__(self) -> int:
        """Tokens in which is looked."""
        return len(self._tokens)

    def add(self, token: int) -> None:
        """Take the next token."""
        self.sequence.append(token)
        self._read(token)

    def follow(self, tokens: Sequence[int], shared: int) -> None:
        """Go on after another sequence, which has the first ``shared`` tokens of this one; what was said here is kept."""
        if shared < len(self.sequence):
            # So that the next n-grams are those of the sequence.
            for token in tokens[max(0, shared - LENGTHS[0]) : shared]:
                self._read(token)
            del self.sequence[shared:]
        for token in tokens[shared:]:
            self.add(token)

    def _read(self, token: int) -> None:
        self._tokens.append(token)
        at = len(self._tokens)
        for n, key in self._newest.items():
            self._ends[n][key] = at - 1
        self._last = (self._last << SHIFT | token) & MASKS[LENGTHS[0]]
        self._newest = {n: self._last & mask for n, mask in MASKS.items() if at >= n}

    def draft(self, most: int) -> Draft:
        """At most so many tokens that may come next; none where nothing is found."""
        for n, key in self._newest.items():
            start = self._ends[n].get(key)
            if start is not None:
                found = self._tokens[start : start + most]
                while len(found) < most:  # the text repeats itself up to its end
                    found.append(found[len(found) - (len(self._tokens) - start)])
                return Draft(found, n)
        return Draft([], 0)


class Forcing(Protocol):
    """What an answer is held to, as `ring_mlx.generation.constraint.Constraint`."""

    def forced(self) -> list[int]:
        """Tokens that must come after those that it took."""

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of some tokens may come after those that it took."""


class ForcedOr:
    """Drafts what a constraint forces, or else what another drafter says and the constraint allows.

    The constraint has taken all tokens but the last that was added here.
    """

    def __init__(self, other: Drafter, constraint: Forcing) -> None:
        self._other, self._constraint = other, constraint
        self._guess_other: Callable[[], Draft] = getattr(other, "guess", None) or partial(other.draft, 1)
        self._forced: list[int] = []
        self._last = 0

    def add(self, token: int) -> None:
        """Take the next token."""
        self._other.add(token)
        self._last = token

    def guess(self) -> Draft:
        """The next token, if it is forced as well as one after it, or as the other drafter has it."""
        self._forced = self._constraint.forced()
        return Draft(self._forced[:1], FORCED) if len(self._forced) > 1 else self._guess_other()

    def draft(self, most: int) -> Draft:
        """At most so many tokens that may come next."""
        if len(self._forced) > 1:
            return Draft(self._forced[1 : most + 1], FORCED)
        found = self._other.draft(most)
        fitting = self._constraint.allowed([self._last, *found.tokens]) if found.tokens else 1
        return Draft(found.tokens[: max(0, fitting - 1)], found.length)


@dataclass
class Pace:
    """How many tokens to draft: as many as promise the most tokens a second, or none.

    With T - 1 drafted tokens, each accepted with probability a, a step gives ``(1 - a^T) / (1 - a)`` tokens on average and costs
    the time of T tokens. Acceptance is known of plain steps as well, where a draft is only compared with what came.

    Args:
        most: Drafted tokens at most.
        always: Draft ``most`` wherever something is found, whatever it costs.
    """

    most: int = MOST_TOKENS
    always: bool = False
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    tokens: int = 0
    _hits: dict[int, float] = field(default_factory=dict)  # by length of the n-gram, or MODEL
    _compared: dict[int, float] = field(default_factory=dict)
    _times: dict[int, deque[float]] = field(default_factory=dict)  # by tokens of the step
    _drafting: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED))  # of a draft model's token
    _rested: int = 0
    _ran: set[int] = field(default_factory=set)
    _given: int = 0  # by the last step, until its time is known
    _plain: float = 0.0  # seconds of a plain step of late, on average
    _unpaid: float = 0.0  # seconds of drafting, and minus those of the tokens that it gave, since the last step
    _credit: float = LOSS_STEPS  # in plain steps

    def wanted(self, length: int) -> int:
        """How many tokens to draft by an n-gram of this length, or by a model."""
        if self.always:
            return self.most
        plain, a = self._time(1), self._acceptance(length)
        # A step gives 1 / (1 - a) tokens at most, and takes no less time than a plain one.
        is_hopeless = GAIN * (1 - a) > 1
        if plain is None or self._credit <= 0 or is_hopeless:
            return 0
        T, a_token = self.best(length)
        return T - 1 if a_token < plain / GAIN else 0

    def best(self, length: int) -> tuple[int, float]:
        """The tokens of the step that promises most, and its seconds a token, so far as times are known."""
        a, plain = self._acceptance(length), self._time(1) or 1.0
        a_draft = 0.0
        if length == MODEL:
            a_draft = statistics.median(self._drafting) if self._drafting else plain * DRAFT_COST
        costs = (
            (T, (self._time(T) or plain * (1 + SLOPE * (T - 1))) + a_draft * (T - 1)) for T in range(2, self.most + 2)
        )
        return min(((T, cost * (1 - a) / (1 - a**T)) for T, cost in costs), key=itemgetter(1))

    def compared(self, length: int, hit: bool) -> None:
        """Take whether a drafted token, found by an n-gram of this length, was right."""
        kept = 0.5 ** (1 / HALF_LIFE)
        self._hits[length] = self._hits.get(length, 0.0) * kept + hit
        self._compared[length] = self._compared.get(length, 0.0) * kept + 1

    def count(self, tokens: int, given: int) -> None:
        """Take a step of so many tokens, of which ``given`` were yielded."""
        self.steps, self.tokens, self._given = self.steps + 1, self.tokens + given, given
        self.drafted, self.accepted = self.drafted + tokens - 1, self.accepted + max(0, given - 1)

    def took(self, tokens: int, seconds: float) -> None:
        """Take how long a step of so many tokens took, without drafting."""
        self._times.setdefault(tokens, deque(maxlen=TIMED)).append(seconds)
        self._settle(tokens, seconds)
        self._rested = 0 if tokens > 1 else self._rested + 1
        if self._rested >= FORGET_TOKENS:
            self._rested, self._times = 0, {1: self._times[1]}
        if self._rested and MODEL in self._compared:
            for counts in (self._hits, self._compared):
                counts[MODEL] *= 0.5 ** (1 / REST_HALF_LIFE)

    def has_run(self, tokens: int) -> bool:
        """Whether a step of so many tokens ran before; the first one of several compiles what later ones run."""
        is_known = tokens == 1 or tokens in self._ran
        self._ran.add(tokens)
        return is_known

    def drafting(self, tokens: int, seconds: float) -> None:
        """Take how long a model took to draft so many tokens."""
        self._drafting.append(seconds / tokens)
        self._unpaid = seconds

    def line(self) -> str:
        """The counts in a line."""
        a_step = self.tokens / self.steps if self.steps else 0.0
        return f"Drafts: {self.accepted} of {self.drafted} tokens accepted, {a_step:.2f} tokens a step"

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {name: getattr(self, name) for name in ("drafted", "accepted", "steps", "tokens")}

    def _time(self, tokens: int) -> float | None:
        found = self._times.get(tokens)
        return statistics.median(found) if found else None

    def _settle(self, tokens: int, seconds: float) -> None:
        """Count what a step lost or gained against plain steps for the tokens that it gave."""
        if tokens == 1:
            self._plain += (seconds - self._plain) * (1 / HALF_LIFE if self._plain else 1)
        elif self._plain and self._given:
            self._credit += self._given - (seconds + self._unpaid) / self._plain
        if self._plain:
            self._credit = min(max(self._credit + LOSS_PART * seconds / self._plain, -MOST_DEBT), MOST_CREDIT)
        self._given, self._unpaid = 0, 0.0

    def _acceptance(self, length: int) -> float:
        if length == FORCED:
            return CERTAIN
        hits, compared = self._hits.get(length, 0.0), self._compared.get(length, 0.0)
        if length == MODEL:
            return (hits + TRUST * TRUST_TOKENS) / (compared + TRUST_TOKENS)
        return min(hits / (compared + 1), CERTAIN)
