"""Answers as Anthropic's Messages API gives them, whole and as events, and its form of errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ring_mlx.engine.events import AnswerText, End, Event, Revised, ThinkingText, ToolCall
from ring_mlx.serve.answer import Answer, Piece, new_id
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.messages.blocks import REPLACES, SIGNATURE
from ring_mlx.serve.protocol import ApiRequest
from ring_mlx.serve.replies import drafts_of

REASONS = {"tool_calls": "tool_use", "length": "max_tokens", "stop": "end_turn"}
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}


class MessagesReply(Answer):
    """An answer whose thought, text and calls are content blocks."""

    call_prefix = "toolu_"

    def __init__(self, request: ApiRequest, model: str) -> None:
        super().__init__(request, model)
        self._id = new_id("msg_")
        self._index, self._open = -1, ""

    def first(self) -> Iterator[Piece]:
        usage = self._usage() | {"output_tokens": 0}
        yield {"type": "message_start", "message": self._message([], None, None, usage)}

    def alive(self, progress: str) -> str:
        return self.line({"type": "ping"})

    def add(self, event: Event) -> Iterator[Piece]:
        self.take(event)
        if isinstance(event, ThinkingText):
            yield from self._grow("thinking", event.text)
        elif isinstance(event, AnswerText):
            yield from self._grow("text", self.seen(event.text, self._open == "text"))
        elif isinstance(event, ToolCall):
            call = self.calls[-1]
            yield from self._begin({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            yield self._delta("input_json_delta", partial_json=call.text)
            yield from self._close()
        elif isinstance(event, Revised):
            yield from self._revise(event.thought)

    def last(self, event: End) -> Iterator[Piece]:
        yield from self._close()
        reason, stop = self._stop(event)
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": stop},
            "usage": self._usage(),
        }
        yield {"type": "message_stop"}

    def failed(self, error: ApiError) -> Iterator[Piece]:
        yield error_body(error)

    def whole(self, event: End) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if self.thought:
            content.append({"type": "thinking", "thinking": self.thought, "signature": SIGNATURE})
        if self.text.strip():
            content.append({"type": "text", "text": self.text})
        content += [{"type": "tool_use", "id": c.id, "name": c.name, "input": c.arguments} for c in self.calls]
        return self._message(content, *self._stop(event), self._usage())

    # Blocks

    def _grow(self, kind: str, text: str) -> Iterator[Piece]:
        """More of a block, which is begun if the last one is of another kind."""
        if not text:
            return
        if self._open != kind:
            yield from self._begin({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
        yield self._delta(f"{kind}_delta", **{kind: text})

    def _begin(self, block: dict[str, Any]) -> Iterator[Piece]:
        yield from self._close()
        self._index, self._open = self._index + 1, block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _close(self, signature: str = SIGNATURE) -> Iterator[Piece]:
        if self._open == "thinking":
            yield self._delta("signature_delta", signature=signature)
        if self._open:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = ""

    def _revise(self, thought: str) -> Iterator[Piece]:
        """Begin again: a thought that replaces, when the client sends it back, what was sent before it."""
        self.held = ""
        if self._index < 0:
            return
        yield from self._close()
        yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
        if thought:
            yield self._delta("thinking_delta", thinking=thought)
        yield from self._close(REPLACES)

    def _delta(self, kind: str, **fields: Any) -> Piece:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **fields}}

    # The message

    def _stop(self, event: End) -> tuple[str, str | None]:
        if event.stop_text and not self.calls:
            return "stop_sequence", event.stop_text
        return REASONS.get(self.reason(event), "end_turn"), None

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self.model}
        return {**head, "content": content, "stop_reason": reason, "stop_sequence": stop, "usage": usage}

    def _usage(self) -> dict[str, Any]:
        """Tokens that were read count apart from those known from snapshots."""
        s, prepared = self.statistics, self.request.prepared
        prompt = s.prompt_tokens if prepared is None else len(prepared.prompt.ids)
        return {
            "input_tokens": prompt - s.reused_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": s.reused_tokens,
            "output_tokens": s.generated_tokens,
            **drafts_of(s),
        }


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's form; clients look for its words where a prompt is too long."""
    kind = TYPES.get(error.status, "invalid_request_error")
    text = f"prompt is too long: {error.message}" if error.code == "context_length_exceeded" else error.message
    return {"type": "error", "error": {"type": kind, "message": text}}
