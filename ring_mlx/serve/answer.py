"""One answer in the making, whatever the form in which its client gets it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ring_mlx.engine.events import (
    AnswerText,
    End,
    Event,
    PrefillProgress,
    Revised,
    Statistics,
    ThinkingText,
    TokenLogprob,
    ToolCall,
)
from ring_mlx.generation.thinking import end_note
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.protocol import ApiRequest
from ring_mlx.system.terminal_text import is_seen

if TYPE_CHECKING:
    from ring_mlx.serve.engine import Engine

Piece = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A tool call with the id that the client gets for it."""

    id: str
    name: str
    arguments: dict[str, Any]

    @property
    def text(self) -> str:
        """The arguments as JSON."""
        return json.dumps(self.arguments, ensure_ascii=False)


class Answer:
    """Collects the events of a request; its subclasses say what a client gets for each."""

    content_type: ClassVar[str] = "text/event-stream; charset=utf-8"
    call_prefix: ClassVar[str] = "call_"
    last_line: ClassVar[str] = ""

    def __init__(self, request: ApiRequest, model: str) -> None:
        self.request, self.model = request, model
        self.thought, self.text = "", ""
        self.calls: list[Call] = []
        self.logprobs: list[TokenLogprob] = []
        self.is_revised = False
        self.held = ""
        self.statistics = Statistics()

    def enter(self, engine: Engine) -> None:
        """Let the model's thread begin. Raises ApiError 503 if too many wait."""
        engine.enter(self.request)

    def leave(self, engine: Engine) -> None:
        """Let go of what is not wanted any more."""
        engine.drop(self.request)

    def next_event(self, timeout: float) -> Any:
        """The next event or failure. Raises queue.Empty if none comes in so many seconds."""
        return self.request.events.get(timeout=timeout)

    @property
    def every_call(self) -> list[Call]:
        """The calls of the answer."""
        return self.calls

    def take(self, event: Event) -> None:
        """Note what an event adds."""
        if isinstance(event, ThinkingText):
            self.thought += event.text
        elif isinstance(event, AnswerText):
            self.text += event.text
        elif isinstance(event, ToolCall):
            self.calls.append(Call(new_id(self.call_prefix), event.name, dict(event.arguments)))
        elif isinstance(event, TokenLogprob):
            self.logprobs.append(event)
        elif isinstance(event, PrefillProgress):
            self.statistics = Statistics(reused_tokens=event.reused)
        elif isinstance(event, Statistics):
            self.statistics = event
        elif isinstance(event, Revised):
            self.thought, self.text, self.is_revised = event.thought, "", True
            self.calls, self.logprobs = [], []

    def add(self, event: Event) -> Iterator[Piece]:
        """Take an event; returns the pieces that a stream sends for it, except the last."""
        raise NotImplementedError

    def first(self) -> Iterator[Piece]:
        """The pieces with which a stream starts."""
        raise NotImplementedError

    def last(self, event: End) -> Iterator[Piece]:
        """The pieces with which a stream ends."""
        raise NotImplementedError

    def whole(self, event: End) -> dict[str, Any]:
        """The answer in one piece."""
        raise NotImplementedError

    def failed(self, error: ApiError) -> Iterator[Piece]:
        """The pieces with which a stream ends that has failed."""
        raise NotImplementedError

    def line(self, piece: Piece) -> str:
        """A piece as a server-sent event; its type is the event's name where it has one."""
        name = f"event: {piece['type']}\n" if "type" in piece else ""
        return f"{name}data: {json.dumps(piece, ensure_ascii=False)}\n\n"

    def alive(self, progress: str) -> str:
        """What a stream sends while there is nothing to say."""
        return f": {progress}\n\n"

    def seen(self, text: str, is_begun: bool) -> str:
        """The part of a stream's text to send: blanks wait for what can be seen, for most stand between calls."""
        text, self.held = self.held + text, ""
        if not is_begun and not text.strip():
            text, self.held = "", text
        return text

    def message(self) -> dict[str, Any]:
        """The assistant's turn, as templates want it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if thought := self.thought.strip("\r\n"):
            message["reasoning_content"] = thought
        if self.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.calls
            ]
        return message

    def why_empty(self, event: End) -> str:
        """The line in the server's log for an answer without call and text; else nothing."""
        if self.calls or is_seen(self.text):
            return ""
        s = self.statistics
        return end_note(self.reason(event), s.generated_tokens, s.thinking_tokens, self.text, "raise max_tokens")

    def reason(self, event: End) -> str:
        """OpenAI's word for why the answer ended; an answer of only thought counts as cut off."""
        if self.calls:
            return "tool_calls"
        is_all_thought = bool(event.message) and self.statistics.thinking_tokens > 0 and not self.text.strip()
        return "length" if is_all_thought else event.reason


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}{uuid.uuid4().hex}"
