"""Separates thought from answer in streamed text, and ends a thought that exceeds its budget.

An answer may begin in four ways, which `Start` names: within a thought, likely or unlikely so, or outside. Two are
certain from the prompt; where the prompt says nothing, the model's text decides: a ``<think>`` at its very start opens
a thought, and what comes before a lone ``</think>`` was one. Once the first thought has ended, tags are text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ring_mlx.errors import OptionError
from ring_mlx.generation.thought_end import THINK_END, THINK_START, Place, ThoughtEnd
from ring_mlx.system.terminal_text import is_seen

ASSISTANT, ROLE = "<role>ASSISTANT</role>", "<role>"
STARTS = ("auto", "open", "closed")
MOST_ROOM, LEAST_LIMIT = 1024, 64
Start = Literal["open", "likely", "unlikely", "closed"]


@dataclass(frozen=True)
class Thinking:
    """How a model's answers start, and how many tokens are kept for the answer after a thought.

    Args:
        start: "auto" (as the prompt and the model's text say), "open" (answers start within a thought) or "closed"
            (they start outside; only a ``<think>`` opens one).
        answer_room: Tokens kept for the answer, at most half of all: a thought that is open when only so many are left
            is closed. None is a quarter of all, at most 1,024, and nothing where there are less than 64; 0 lets a
            thought run to the end.
    """

    start: str = "auto"
    answer_room: int | None = None

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise OptionError(f"thinking start {self.start!r} is unknown; give {', '.join(STARTS)}.")
        if self.answer_room is not None and self.answer_room < 0:
            raise OptionError(f"answer room {self.answer_room} is negative; give 0 or more.")

    def budget(self, limit: int) -> int | None:
        """Tokens of a thought, its end included, where ``limit`` tokens may be generated; None is no bound."""
        if self.answer_room is not None:
            room = min(self.answer_room, limit // 2)
        else:
            room = min(limit // 4, MOST_ROOM) if limit >= LEAST_LIMIT else 0
        return limit - room if room else None


def end_note(reason: str, tokens: int, thinking_tokens: int, text: str, remedy: str) -> str:
    """A note about an answer that was cut off or is only a thought; else nothing.

    ``remedy`` says how to get the rest of an answer that was cut off.
    """
    if is_seen(text):
        return f"the answer was cut off after {tokens:,} tokens; {remedy}." if reason == "length" else ""
    if tokens == 1 and reason == "stop":
        why = "the model ended it at once"
    elif text.strip():
        why = "nothing of it can be seen"
    else:
        count = f"{tokens:,} tokens" if tokens != 1 else "1 token"
        why = f"all {count} were thought" if thinking_tokens else f"{count} and no text came"
    return f"the answer is empty: {why}; {remedy if reason == 'length' else 'ask again or in other words'}."


class Opening:
    """Drops the blank lines between a thought and its answer; the answer's first line keeps its indentation."""

    def __init__(self) -> None:
        self._held: str | None = ""

    def feed(self, text: str) -> str:
        """Take the answer's next text; returns what is certainly more than a blank line."""
        if self._held is None:
            return text
        self._held += text
        kept = self._held.lstrip()
        if not kept:
            return ""
        blank = self._held[: len(self._held) - len(kept)]
        self._held = None
        return blank[blank.rfind("\n") + 1 :] + kept


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt leaves a thought open for the model to continue."""
    splitter = splitter_after(prompt)
    return splitter.inside and splitter.start == "open"


def splitter_after(prompt: str, start: str = "auto", is_likely: bool = False) -> ThoughtSplitter:
    """The splitter for a model's text after a rendered prompt.

    Only what follows the last assistant role counts, so a user who writes about tags changes nothing; without a role
    the prompt must end in a tag. Where no tag says so, a thought is likely after that role, and unlikely after other
    prompts, unless ``is_likely``, and where the prompt begins the answer with text.
    """
    if start == "closed":
        return ThoughtSplitter("closed")
    _, role, tail = prompt.rpartition(ASSISTANT)
    role = "" if ROLE in tail else role
    if not role:
        tail = next((tag for tag in (THINK_START, THINK_END) if prompt.rstrip().endswith(tag)), "")
        tail = THINK_START + tail if tail == THINK_END else tail
    if start == "open":
        return ThoughtSplitter("open", tail)
    return ThoughtSplitter("likely" if (role or is_likely) and not tail.strip() else "unlikely", tail)


class ThoughtSplitter:
    """Splits streamed text at the thinking tags, which may arrive in pieces.

    Text that may be either is given out by ``start``, and `revised` is set if that turns out wrong: at a
    lone ``</think>`` after an unlikely thought, and at the end of a likely one that was never closed. A ``</think>`` in
    code ends a thought only if the text ends without another; `ring_mlx.generation.thought_end` says what code is.
    What the prompt has said already, such as ``<think>``, is not given out.
    """

    def __init__(self, start: Start = "unlikely", said: str = "") -> None:
        self.start: Start = start
        self.revised: tuple[str, str] | None = None
        self._end, self._is_plain = ThoughtEnd(), False
        self._lead, self._has_begun, self._ended = "", False, False
        self._given: list[str] = []
        self._held, self._base, self._pieces, self._thinking_tokens = "", 0, 0, 0
        self.feed(said)
        self._has_begun = self._has_begun and (self._ended or bool("".join([*self._given, self._held]).strip()))
        self._lead = ""
        self._base += len(self._held)
        self._origin, self._held, self._given, self.revised = self._base, "", [], None
        self._pieces = self._thinking_tokens = 0

    @property
    def inside(self) -> bool:
        """Whether the text so far ends inside a thought, as far as is known."""
        return not self._ended and self.start in ("open", "likely")

    @property
    def may_be_closed(self) -> bool:
        """Whether a thought goes on that can be closed: no tag in code may have ended it already."""
        return self.inside and not self._end.is_in_doubt

    @property
    def is_certain(self) -> bool:
        """Whether the text given out as the answer will never be revised."""
        return self._ended or self.start != "unlikely"

    @property
    def thinking_tokens(self) -> int:
        """How many pieces were fed that belong to the thought, tags included."""
        return self._pieces if self.inside else self._thinking_tokens

    def feed(self, text: str) -> tuple[str, str]:
        """Take the next text; returns what it adds to the thought and to the answer, without tags.

        The start of what may become a tag is held back until it is clear. Where `revised` is set, it is the whole
        thought and answer so far, this text included.
        """
        self._pieces += 1
        self.revised = None
        if self._ended:
            return "", text
        if self._has_begun:
            return self._go_on(text)
        self._lead += text
        start = self._lead.lstrip()
        if not start or (len(start) < len(THINK_START) and THINK_START.startswith(start)):
            return "", ""
        return self._begin(start)

    def flush(self) -> tuple[str, str]:
        """The text that is still held back, at the end; sets `revised` as `feed` does."""
        self.revised = None
        if self._ended:
            return "", ""
        if not self._has_begun:
            self._has_begun, self._held, self._lead = True, self._lead, ""
        self._end.look("", self._pieces, last=True)
        found = self._end.found
        if found is None and self.start in ("open", "likely"):
            found = self._end.in_code(is_certain=self.start == "open")
        if found is not None:
            return self._close(found)
        held, self._held = self._held, ""
        if self.start == "open":
            return held, ""
        if self.start == "likely" and self._given:
            held = "".join([*self._given, held])
            self.revised = ("", held)
        self._ended, self._thinking_tokens = True, 0
        return "", held

    def feed_last(self, text: str) -> tuple[str, str]:
        fed, revised = self.feed(text), self.revised
        held = self.flush()
        self.revised = self.revised or revised
        return fed[0] + held[0], fed[1] + held[1]

    def end_at_first(self) -> None:
        """Every ``</think>`` ends the thought from now on, in code or not."""
        self._is_plain = self._end.is_plain = True
        self._end.leave_code()

    def close_next(self) -> None:
        """The next ``</think>`` ends the thought, in code or not."""
        self._end.leave_code()

    def _begin(self, start: str) -> tuple[str, str]:
        """The text has more than space: it opens a thought, or it does not."""
        text, self._lead, self._has_begun = self._lead, "", True
        if start.startswith(THINK_START):
            self.start, self._end = "open", ThoughtEnd()
            self._end.is_plain = self._is_plain
            self._base = self._origin = 0
            text = text.replace(THINK_START, "", 1)
        elif self.start == "closed":
            self._ended = True
            return "", text
        return self._go_on(text)

    def _go_on(self, text: str) -> tuple[str, str]:
        sure = self._end.look(text, self._pieces)
        self._held += text
        if self._end.found is not None:
            return self._close(self._end.found)
        new, self._held = self._held[: sure - self._base], self._held[sure - self._base :]
        self._base = sure
        if new:
            self._given.append(new)
        return (new, "") if self.inside else ("", new)

    def _close(self, place: Place) -> tuple[str, str]:
        was_inside = self.inside
        self._ended, self._thinking_tokens = True, place.pieces
        if (was_inside and place.at >= self._base) or not self._given:
            thought, answer = _parted(self._held, place.at - self._base)
        else:
            self.revised = _parted("".join([*self._given, self._held]), place.at - self._origin)
            thought, answer = self.revised
            thought = "" if was_inside else thought
        self._held, self._given = "", []
        return thought, answer


class ThoughtBudget:
    """Ends a thought after a number of tokens, in the form that the model was trained to end it.

    Args:
        budget: Tokens before its end, from the first one on; 0 closes the thought at once.
        closing: The ids of a closed thought's end, tag included.
        close_next: Called before the tag comes.
    """

    def __init__(
        self,
        budget: int,
        closing: Sequence[int],
        is_thinking: Callable[[], bool],
        close_next: Callable[[], None] = lambda: None,
    ) -> None:
        self._left, self._closing, self._is_thinking = budget, list(closing), is_thinking
        self._close_next = close_next
        self._forced: list[int] = []
        self._done = False

    def next_forced(self) -> int | None:
        """The id that must come next, or None where the model may choose. Call once before each token."""
        if self._forced:
            return self._forced.pop(0)
        if self._left > 0:
            self._left -= 1
            return None
        if self._done or not self._is_thinking():
            return None
        self._done = True
        self._close_next()
        self._forced = self._closing[1:]
        return self._closing[0]


def _parted(text: str, at: int) -> tuple[str, str]:
    """The text before and after the tag at a place, which may begin before the text."""
    return text[: max(0, at)], text[max(0, at + len(THINK_END)) :]
