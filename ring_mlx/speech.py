"""Generated tokens to a session's events and to the assistant's message; knows text, not models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ring_mlx.generation import GenerationEvent
from ring_mlx.session_events import AnswerText, Event, ThinkingText, ToolCall
from ring_mlx.thinking import ThoughtSplitter
from ring_mlx.tool_calls import ToolCallSplitter


class Speech:
    """What the model has said.

    Line breaks around a thought are the template's, not the thought's or the answer's.

    Args:
        before: The message that the model continues, or None.
        has_tools: Whether the model was given tools; without any, what looks like a call is text.
    """

    def __init__(self, before: Mapping[str, Any] | None = None, has_tools: bool = False) -> None:
        self.tokens: list[int] = []
        self.thinking_tokens = 0
        self._last: GenerationEvent | None = None
        self._calls = ToolCallSplitter() if has_tools else None
        self._found: list[ToolCall] = []
        self._thought = self._answer = ""
        if before is not None:
            splitter = ThoughtSplitter()
            fed, held = splitter.feed(str(before.get("content") or "")), splitter.flush()
            self._thought, self._answer = fed[0] + held[0], fed[1] + held[1]

    @property
    def last(self) -> GenerationEvent:
        """The latest event; there is one once a token has been generated."""
        assert self._last is not None
        return self._last

    def add(self, e: GenerationEvent) -> Iterator[Event]:
        """Take one generated token; the last one has a finish reason."""
        self._last = e
        self.tokens.append(e.token)
        self.thinking_tokens += e.thinking
        thought = e.thinking_text if self._thought else e.thinking_text.lstrip("\n")
        if thought:
            self._thought += thought
            yield ThinkingText(thought)
        pieces: list[str | ToolCall] = [e.answer_text] if self._calls is None else self._calls.feed(e.answer_text)
        if self._calls is not None and e.finish_reason is not None:
            pieces += self._calls.flush()
        for piece in pieces:
            yield from self._say(piece)

    def message(self) -> dict[str, Any]:
        """The assistant's turn, as templates want it."""
        message: dict[str, Any] = {"role": "assistant", "content": self._answer}
        if thought := self._thought.strip("\n"):
            message["reasoning_content"] = thought
        if self._found:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}} for c in self._found
            ]
        return message

    def _say(self, piece: str | ToolCall) -> Iterator[Event]:
        if isinstance(piece, ToolCall):
            self._found.append(piece)
            yield piece
            return
        if self.thinking_tokens and not self._answer:
            piece = piece.lstrip()
        if piece:
            self._answer += piece
            yield AnswerText(piece)
