"""Finds the places where the next prompt can differ from this one, by rendering alternatives.

The next prompt of a conversation shares with this one what the checkpoint's template renders alike in both. That is
found by rendering the alternatives with made-up texts: another user message in the place of one (the end of the system
prompt and tools, an edit, a new branch), another answer in the place of one, and the answer to come with the user's
reply to it, in which the template leaves the thought out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.engine.snapshots.tree import common_prefix
from ring_mlx.errors import TokenizerError
from ring_mlx.generation.constraint import Constraint
from ring_mlx.generation.template_worker import common_text
from ring_mlx.generation.templates import render_text

Messages = Sequence[Mapping[str, Any]]

# Two texts without a common start, so that a text that happens to begin like one still branches off the other. The
# first letter of one melts into one token with a space before it, the figure of the other does not.
MADE_UP = ("So what", "7 zebras")
RECENT_TURNS = 8
WINDOW_TOKENS = 64


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt: text, ids, and where in the text each id ends (None where the tokenizer cannot say)."""

    text: str
    ids: list[int]
    ends: list[int] | None


@dataclass(frozen=True)
class Prepared:
    """A request's prompt, for messages what renders their alternatives, how many tokens may be generated, and what holds the
    answer to its form.
    """

    prompt: Prompt
    renderer: Renderer | None
    limit: int
    constraint: Constraint | None = None


class Renderer:
    """Renders conversations of one request, whose last message stays open if ``continue_last``."""

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        continue_last: bool = False,
    ) -> None:
        self._tokenizer, self._tools, self._options = tokenizer, tools, template_options
        self.continue_last = continue_last

    def prompt(self, messages: Messages) -> Prompt:
        """Render and encode what is to be answered. Raises TokenizerError if the template refuses the messages."""
        text = self.text(messages, self.continue_last)
        return encode(self._tokenizer, text)

    def text(self, messages: Messages, continue_last: bool = False) -> str:
        return render_text(self._tokenizer, messages, self._tools, self._options, continue_last)

    def shared(self, prompt: Prompt, alternatives: Callable[[str], Messages]) -> int | None:
        """How many tokens of a prompt every alternative keeps; None if the template refuses them."""
        points = []
        for made_up in MADE_UP:
            try:
                points.append(self._shared(prompt, self.text(alternatives(made_up))))
            except TokenizerError:
                return None
        return min(points)

    def _shared(self, prompt: Prompt, other: str) -> int:
        """The common token prefix, encoding only the neighbourhood of the place where the texts part."""
        if prompt.ends is None:
            return _common(prompt.ids, self._encode(other))
        parts_at = common_text(prompt.text, other)
        whole = bisect_right(prompt.ends, parts_at)
        start = max(0, whole - WINDOW_TOKENS)
        begin = prompt.ends[start - 1] if start else 0
        near = _common(prompt.ids[start:], self._encode(other[begin : parts_at + WINDOW_TOKENS]))
        return start + near if near or whole == start else _common(prompt.ids, self._encode(other))

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]


def encode(tokenizer: TokenizerWrapper, text: str) -> Prompt:
    """Encode rendered text; special tokens are in it already."""
    if getattr(tokenizer, "is_fast", False):
        coded = tokenizer._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return Prompt(text, [int(i) for i in coded["input_ids"]], [int(end) for _, end in coded["offset_mapping"]])
    return Prompt(text, [int(i) for i in tokenizer.encode(text, add_special_tokens=False)], None)


def branch_points(renderer: Renderer, messages: Messages, prompt: Prompt, known: int) -> dict[int, str]:
    """Places of a prompt after which another prompt may go on differently, beyond the ``known`` tokens.

    Returns what each place is, by its number of tokens: "system", "user" (before a user's message) or "answer" (before
    an answer, without the start of a thought).
    """
    points: dict[int, str] = {}
    users = [i for i, m in enumerate(messages) if m.get("role") == "user"]
    for turn in users[::-1][:RECENT_TURNS]:
        found = {renderer.shared(prompt, make): kind for kind, make in _alternatives(messages, turn)}
        beyond = {at: kind for at, kind in found.items() if at is not None and at > known}
        points = beyond | points
        if not beyond and found.keys() != {None}:
            break  # All places before it are known too.
    else:
        if users and (point := renderer.shared(prompt, lambda text: [*messages[: users[0]], _user(text)])):
            points[point] = "system"
    return {at: kind for at, kind in points.items() if known < at <= len(prompt.ids)}


def next_turn(renderer: Renderer, messages: Messages, answer: Mapping[str, Any]) -> Prompt | None:
    """The start of every next prompt after ``answer``; None if the template refuses the conversation."""
    talk = [*messages[:-1], answer] if renderer.continue_last else [*messages, answer]
    role = "tool" if answer.get("tool_calls") else "user"
    try:
        first, second = (renderer.text([*talk, {"role": role, "content": text}]) for text in MADE_UP)
    except TokenizerError:
        return None
    whole = encode(renderer._tokenizer, first)
    shared = renderer._shared(whole, second)
    return Prompt(whole.text, whole.ids[:shared], whole.ends)


def _alternatives(messages: Messages, turn: int) -> Iterator[tuple[str, Callable[[str], Messages]]]:
    """Alternatives at the user's message ``turn``: another message, or another answer to it."""
    yield "user", lambda text: [*messages[:turn], _user(text)]
    yield "answer", lambda text: [*messages[: turn + 1], {"role": "assistant", "content": text}, _user(text)]


def _user(text: str) -> Mapping[str, Any]:
    return {"role": "user", "content": text}


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return common_prefix(np.asarray(a, dtype=np.int32), np.asarray(b, dtype=np.int32))
