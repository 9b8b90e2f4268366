"""Builds the assistant's message from generated tokens, and gives each new part of it as an event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ring_mlx.engine.events import AnswerText, Event, Revised, ThinkingText, ToolCall
from ring_mlx.generation.stream import GenerationEvent
from ring_mlx.generation.thinking import Opening, ThoughtSplitter
from ring_mlx.generation.thought_end import tag_prefix
from ring_mlx.generation.tool_calls import ToolCallSplitter
from ring_mlx.system.terminal_text import whole_text


class MessageBuilder:
    """The message so far.

    Line breaks around a thought are the template's, not the thought's or the answer's.

    Args:
        before: The message that the model continues, or None.
        has_tools: Whether the model was given tools; without any, what looks like a call is text.
        one_call: The first call ends the message.
    """

    def __init__(
        self, before: Mapping[str, Any] | None = None, has_tools: bool = False, one_call: bool = False
    ) -> None:
        self.thinking_tokens, self._one_call = 0, one_call
        self._calls = ToolCallSplitter() if has_tools else None
        self._found: list[ToolCall] = []
        self._held: list[str | ToolCall] = []
        self._opening = Opening()
        self._thought, self._answer = self._before = ("", "") if before is None else _parts(before)

    def add(self, e: GenerationEvent) -> Iterator[Event]:
        """Take one generated token; the last one has a finish reason."""
        self.thinking_tokens = e.thinking_tokens
        if e.revised is not None:
            yield self._revise(e.revised[0])
        else:
            yield from self._think(e.thinking_text)
        text = e.answer_text if e.revised is None else e.revised[1]
        pieces: list[str | ToolCall] = [text] if self._calls is None else self._calls.feed(text)
        if self._calls is not None and e.finish_reason is not None:
            pieces += self._calls.flush()
        for piece in self._certain(pieces, e.is_certain):
            yield from self._say(piece)

    def message(self) -> dict[str, Any]:
        """The assistant's turn, as templates want it."""
        message: dict[str, Any] = {"role": "assistant", "content": self._answer}
        if thought := self._thought.strip("\r\n"):
            message["reasoning_content"] = thought
        if self._found:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}} for c in self._found
            ]
        return message

    def _certain(self, pieces: list[str | ToolCall], is_certain: bool) -> list[str | ToolCall]:
        """The events that are certain: a call, and what follows it, only if it cannot turn out to be part of a thought.

        Texts can be taken back, calls may have been executed by then.
        """
        held = [*self._held, *pieces]
        count = next((n for n, piece in enumerate(held) if isinstance(piece, ToolCall)), len(held))
        count = len(held) if is_certain else count
        self._held = held[count:]
        return held[:count]

    def _think(self, text: str) -> Iterator[Event]:
        if text := text if self._thought else text.lstrip("\r\n"):
            self._thought += text
            yield ThinkingText(text)

    def _revise(self, thought: str) -> Event:
        """Begin again with another thought, to which the text so far belongs."""
        self._calls = ToolCallSplitter() if self._calls is not None else None
        self._found, self._held, self._answer, self._opening = [], [], "", Opening()
        self._thought = "".join([*self._before, thought]).lstrip("\r\n")
        return Revised(self._thought)

    @property
    def is_full(self) -> bool:
        """Whether nothing more belongs to the message."""
        return self._one_call and bool(self._found)

    def _say(self, piece: str | ToolCall) -> Iterator[Event]:
        if self.is_full:
            return
        if isinstance(piece, ToolCall):
            self._found.append(piece)
            yield piece
            return
        if self.thinking_tokens and not self._answer:
            piece = self._opening.feed(piece)
        if piece:
            self._answer += piece
            yield AnswerText(piece)


def _parts(message: Mapping[str, Any]) -> tuple[str, str]:
    """The thought and the answer of a message."""
    splitter = ThoughtSplitter()
    parts = splitter.feed_last(whole_text(str(message.get("content") or "")))
    thought, answer = splitter.revised or parts
    return whole_text(str(message.get("reasoning_content") or "")) + thought, answer


class StopText:
    """Lets text through up to the first of some stop sequences; ``found`` is that one, or ""."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit, self.found = False, ""

    def feed(self, text: str) -> str:
        """Take the next text; returns what is certainly before a stop sequence."""
        if self.hit or not self._stops:
            return "" if self.hit else text
        text = self._held + text
        found = [(at, s) for at, s in ((text.find(s), s) for s in self._stops) if at >= 0]
        if found:
            at, self.found = min(found)
            self.hit, self._held = True, ""
            return text[:at]
        keep = max(tag_prefix(text, s) for s in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was held back, at the end of all text."""
        held, self._held = self._held, ""
        return held
