"""Tells thought from answer in streamed text, and ends a thought that exceeds its budget; knows text, not models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

THINK_START, THINK_END = "<think>", "</think>"
ASSISTANT = "<role>ASSISTANT</role>"


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt leaves a thought open for the model to continue.

    Only what follows the last assistant role counts, so a user who writes about tags changes nothing; without a role
    the prompt must end in the tag.
    """
    head, role, tail = prompt.rpartition(ASSISTANT)
    if not role:
        return head.rstrip().endswith(THINK_START) or tail.rstrip().endswith(THINK_START)
    return tail.rfind(THINK_START) > tail.rfind(THINK_END)


class ThoughtSplitter:
    """Splits streamed text at the thinking tags, which may arrive in pieces.

    Args:
        inside: Whether the text starts within a thought.
    """

    def __init__(self, inside: bool = False) -> None:
        self.inside = inside
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """Take the next text; returns what it adds to the thought and to the answer, without tags.

        The start of what may become a tag is held back until it is clear.
        """
        text = self._held + text
        parts = {True: "", False: ""}
        while True:
            tag = THINK_END if self.inside else THINK_START
            before, found, after = text.partition(tag)
            if not found:
                break
            parts[self.inside] += before
            self.inside, text = not self.inside, after
        keep = tag_prefix(text, tag)
        self._held = text[len(text) - keep :]
        parts[self.inside] += text[: len(text) - keep]
        return parts[True], parts[False]

    def flush(self) -> tuple[str, str]:
        """What is still held back, at the end of the text."""
        held, self._held = self._held, ""
        return (held, "") if self.inside else ("", held)


class ThoughtBudget:
    """Ends a thought after a number of tokens, in the form that the model was trained to end it.

    Args:
        budget: Thinking tokens allowed; 0 closes the thought at once.
        closing: The ids of a closed thought's end, tag included.
        is_thinking: Tells whether the text so far is within a thought.
    """

    def __init__(self, budget: int, closing: Sequence[int], is_thinking: Callable[[], bool]) -> None:
        self._left, self._closing, self._is_thinking = budget, list(closing), is_thinking
        self._forced: list[int] = []
        self._done = False

    def next_forced(self) -> int | None:
        """The id that must come next, or None where the model may choose. Call once before each token."""
        if self._forced:
            return self._forced.pop(0)
        if self._done or not self._is_thinking():
            return None
        if self._left > 0:
            self._left -= 1
            return None
        self._done = True
        self._forced = self._closing[1:]
        return self._closing[0]


def tag_prefix(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that starts ``tag``."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
