"""How many drafted tokens to try: as many as pay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from operator import mul

from ring_mlx.generation.drafts import FORCED, MODEL, MOST_TOKENS
from ring_mlx.generation.estimates import SLOW, Acceptance, StepCosts

# What a step of several tokens must promise, over plain steps: to begin, and to go on.
GAIN, GAIN_ON = 1.06, 1.02
# Before anything is known, what finds a draft is right with this probability, which counts as so many tokens. A draft model is
# compared only where it drafts; so it is trusted at first, and again while it rests.
DOUBT, DOUBT_TOKENS = 0.25, 1.0
TRUST, TRUST_TOKENS, REST_KEPT = 0.75, 4.0, 0.5 ** (1 / 64)
CERTAIN = 0.99  # the most acceptance
LATER_TOKENS = 4.0  # as so many tokens counts that a draft's later token is right as often as the one before
# What drafts may lose, in plain steps: so many, and this part of the time. What they gain is credit up to a bound, and so is debt.
LOSS_STEPS, LOSS_PART, MOST_CREDIT, MOST_DEBT = 1.0, 0.01, 8.0, 0.5
FORGET_TOKENS = 256  # tokens without a draft after which high costs are guessed again
PLAIN_EVERY = 256  # steps of several tokens in a row after which plain ones are timed again


@dataclass
class Pace:
    """How many tokens to draft: as many as promise the most tokens a second, or none.

    With T - 1 drafted tokens, where the k-th is right with probability a_k if those before it are, a step gives

        G(T) = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_(T-1)

    tokens on average, at the cost c(T) of a step of T tokens; T is chosen for the largest G(T) / c(T). a_1 is known of plain steps
    as well, where a draft is only compared with what came. No step may lose more than the credit that is left: drafts
    together lose at most ``LOSS_STEPS`` plain steps and ``LOSS_PART`` of the time, whatever comes.

    Args:
        most: Drafted tokens at most.
        always: Draft ``most`` wherever something is found, whatever it costs.
        costs: What steps cost.
        rows: Sequences that step together; see `of`.
    """

    most: int = MOST_TOKENS
    always: bool = False
    costs: StepCosts = field(default_factory=StepCosts)
    rows: int = 1
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    tokens: int = 0
    _seen: dict[int, list[Acceptance]] = field(
        default_factory=dict
    )  # by length of the n-gram, or MODEL; by the draft's token
    _is_on: bool = False
    _rested: int = 0
    _since_plain: int = 0
    _ran: set[int] = field(default_factory=set)
    _given: float = 0.0  # by the last step to a row, until its time is known
    _unpaid: float = 0.0  # seconds of drafting since the last step
    _is_disturbed: bool = False  # a draft model has read a text within the present step
    _credit: float = LOSS_STEPS  # in plain steps
    _wish: float = 0.0  # of credit for what a draft model is to read next
    _others: dict[int, Pace] = field(default_factory=dict)  # by rows

    def of(self, rows: int) -> Pace:
        """The pace of so many sequences that step together: of acceptance it knows the same, but its costs are its own."""
        if rows == self.rows:
            return self
        if rows not in self._others:
            self._others[rows] = Pace(self.most, self.always, StepCosts(rows), rows, _seen=self._seen)
        return self._others[rows]

    def wanted(self, *lengths: int) -> int:
        """How many tokens to draft, for each row by an n-gram of this length or by a model; 0 is a row that drafts nothing."""
        if self.always:
            return self.most
        if not self.costs.is_known:
            return 0
        first = sum(next(self._acceptances(length)) for length in lengths if length)
        if first < self.costs.least_right * len(lengths):  # mostly so where drafts are wrong, and known at little cost
            self._is_on = False
            return 0
        T, a_token = self.best(*lengths, most_loss=self._credit)
        self._is_on = T > 1 and a_token * (GAIN_ON if self._is_on else GAIN) < 1
        return T - 1 if self._is_on else 0

    def best(self, *lengths: int, most_loss: float = float("inf")) -> tuple[int, float]:
        """The tokens of a row of the step that promises most, and its cost a token of a row, in plain steps.

        It loses at most ``most_loss``, where all drafts are wrong, and is at most twice as long as one that was timed; a step of one
        token costs 1.
        """
        found, given, longest = (1, 1.0), 1.0, 2 * self.costs.longest
        come = [accumulate(self._acceptances(length), mul) for length in lengths if length]
        a_draft = self.costs.drafted * lengths.count(MODEL) if MODEL in lengths else 0.0
        for T, each in enumerate(zip(*come, strict=True), start=2):
            given += sum(each) / len(lengths)
            cost = self.costs.step(T) + a_draft * (T - 1)
            if longest >= T and cost - 1 <= most_loss and cost / given < found[1]:
                found = T, cost / given
        return found

    def compared(self, length: int, hit: bool, at: int = 0) -> None:
        """Take whether a draft's token, found by an n-gram of this length, was right where those before it were."""
        seen = self._seen.setdefault(length, [])
        while len(seen) <= at:
            seen.append(Acceptance())
        before = list(islice(self._acceptances(length), at)) if at else []
        seen[at].add(hit, *((before[-1], LATER_TOKENS) if before else _prior(length)))
        for later in seen[at + 1 :] if not at else ():
            later.forget(REST_KEPT)

    def count(self, tokens: int, *given: int) -> None:
        """Take a step of so many tokens a row, of which ``given`` were yielded of each row."""
        self.steps, self.tokens, self._given = self.steps + 1, self.tokens + sum(given), sum(given) / len(given)
        self.drafted += (tokens - 1) * len(given)
        self.accepted += sum(max(0, n - 1) for n in given)

    def took(self, tokens: int, seconds: float, is_usual: bool = True) -> None:
        """Take how long a step of so many tokens took, without drafting.

        One that compiled something, or that is plain and came after one of several tokens, is not ``is_usual``: its loss
        counts, but it says nothing of later ones.
        """
        costs = self.costs
        if tokens > 1:
            self._rested, self._since_plain = 0, self._since_plain + 1
            usual = costs.step(tokens)
            if costs.plain and not self._is_disturbed:
                if is_usual:
                    costs.add_step(tokens, seconds)
                cost = min(seconds / costs.plain, SLOW * usual) + self._unpaid / costs.plain
                self._pay(cost - self._given if self._given else 0.0, cost)
            if self._since_plain >= PLAIN_EVERY:
                costs.renew()
        elif not self._is_disturbed and is_usual:
            self._rested, self._since_plain = self._rested + 1, 0
            costs.add_plain(seconds)
            self._pay(0.0, 1.0)
        elif not self._is_disturbed and costs.plain:
            self._pay(min(seconds / costs.plain, SLOW) - 1, 1.0)
        if self._rested >= FORGET_TOKENS:
            self._rested = 0
            costs.forget()
        if self._rested:
            for seen in self._seen.get(MODEL, ()):
                seen.forget(REST_KEPT)
        self._given, self._unpaid, self._is_disturbed = 0, 0.0, False

    def has_run(self, tokens: int) -> bool:
        """Whether a step of so many tokens ran before; the first one of several compiles what later ones run."""
        is_known = tokens == 1 or tokens in self._ran
        self._ran.add(tokens)
        return is_known

    def drafting(self, tokens: int, seconds: float) -> None:
        """Take how long a model took to draft so many tokens."""
        self.costs.add_drafted(tokens, seconds)
        self._unpaid = seconds

    def may_read(self, tokens: int) -> bool:
        """Whether a draft model may read so many tokens of a text now: it promises to pay, and the credit covers it."""
        if self.always:
            return True
        cost = tokens * self.costs.read
        is_wanted = self.costs.is_known and self.best(MODEL)[1] * GAIN < 1
        self._wish = cost if is_wanted else 0.0
        return is_wanted and cost <= self._credit

    def reading(self, tokens: int, seconds: float) -> None:
        """Take how long a draft model took to read so many tokens of a text."""
        self.costs.add_read(tokens, seconds)
        self._is_disturbed, self._wish = True, 0.0
        if self.costs.plain:
            cost = seconds / self.costs.plain
            self._pay(cost, cost)

    def line(self) -> str:
        """The counts in a line."""
        a_step = self.tokens / self.steps if self.steps else 0.0
        return f"Drafts: {self.accepted} of {self.drafted} tokens accepted, {a_step:.2f} tokens a step"

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {name: getattr(self, name) for name in ("drafted", "accepted", "steps", "tokens")}

    def _pay(self, lost: float, time: float) -> None:
        """Count what was lost, or minus what was gained, in a time; both in plain steps."""
        most = MOST_CREDIT + self._wish
        self._credit = min(max(self._credit - lost, -MOST_DEBT) + LOSS_PART * time, max(most, self._credit))

    def _acceptances(self, length: int) -> Iterator[float]:
        """The probability of each token of a draft, where those before it are right."""
        a, weight = _prior(length)
        seen = self._seen.get(length, ())
        for n in range(self.most):
            a = min(seen[n](a, weight), CERTAIN) if n < len(seen) else a
            weight = LATER_TOKENS
            yield a


def _prior(length: int) -> tuple[float, float]:
    """What is expected of a source of which nothing is known, and as how many tokens that counts."""
    if length == FORCED:
        return CERTAIN, TRUST_TOKENS
    return (TRUST, TRUST_TOKENS) if length == MODEL else (DOUBT, DOUBT_TOKENS)
