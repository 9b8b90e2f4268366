"""Answers in OpenAI's JSON, whole and in pieces."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from ring_mlx.engine.events import AnswerText, End, Event, Revised, Statistics, ThinkingText, TokenLogprob, ToolCall
from ring_mlx.serve.answer import Answer, Call, Piece, new_id
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.protocol import ApiRequest


class Reply(Answer):
    """An answer as OpenAI's chat and completion routes give it."""

    last_line = "data: [DONE]\n\n"

    def __init__(self, request: ApiRequest, model: str) -> None:
        super().__init__(request, model)
        self._id = new_id("cmpl-" if request.is_text else "chatcmpl-")
        self._created = int(time.time())
        self._told = 0

    def add(self, event: Event) -> Iterator[Piece]:
        self.take(event)
        if isinstance(event, ThinkingText):
            yield self._piece({"reasoning_content": event.text})
        elif isinstance(event, AnswerText):
            yield self._piece({"content": event.text}, self._new_logprobs())
        elif isinstance(event, ToolCall):
            call = {"index": len(self.calls) - 1, **_call(self.calls[-1])}
            yield self._piece({"tool_calls": [call]}, self._new_logprobs())
        elif isinstance(event, Revised):
            self._told = 0

    def first(self) -> Iterator[Piece]:
        if not self.request.is_text:
            yield self._piece({"role": "assistant", "content": ""})

    def last(self, event: End) -> Iterator[Piece]:
        piece = self._piece({}, self._new_logprobs(), self.reason(event))
        if self.is_revised:
            piece["choices"][0]["message"] = self._message()
        yield piece
        if self.request.include_usage:
            yield {**self._head(streamed=True), "choices": [], "usage": usage_of(self.statistics)}

    def whole(self, event: End) -> dict[str, Any]:
        self._told = 0
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.reason(event), "logprobs": self._new_logprobs()}
        if self.request.is_text:
            choice["text"] = self.text
        else:
            choice["message"] = self._message()
        return {**self._head(streamed=False), "choices": [choice], "usage": usage_of(self.statistics)}

    def failed(self, error: ApiError) -> Iterator[Piece]:
        yield error.body()

    def _message(self) -> dict[str, Any]:
        message = self.message()
        if self.calls:
            message["content"] = self.text if self.text.strip() else None
            message["tool_calls"] = [_call(call) for call in self.calls]
        return message

    def _head(self, streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if self.request.is_text else "chat.completion"
        kind += ".chunk" if streamed and not self.request.is_text else ""
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def _piece(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": logprobs}
        if not self.request.is_text:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        piece = {**self._head(streamed=True), "choices": [choice]}
        return piece | {"usage": None} if self.request.include_usage else piece

    def _new_logprobs(self) -> dict[str, Any] | None:
        """Log-probabilities of the tokens since the last piece that had some."""
        if self.request.top_logprobs is None:
            return None
        new, self._told = self.logprobs[self._told :], len(self.logprobs)
        if not self.request.is_text:
            return {"content": [chat_logprob(t) for t in new], "refusal": None}
        tops = [{_token_name(token): logprob for token, logprob in t.top} for t in new]
        return {
            "tokens": [_token_name(t.token) for t in new],
            "token_logprobs": [t.logprob for t in new],
            "top_logprobs": tops if self.request.top_logprobs else None,
            "text_offset": [t.offset for t in new],
        }


def usage_of(s: Statistics) -> dict[str, Any]:
    """The usage of an answer in OpenAI's form."""
    return {
        "prompt_tokens": s.prompt_tokens,
        "completion_tokens": s.generated_tokens,
        "total_tokens": s.prompt_tokens + s.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": s.reused_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": s.thinking_tokens,
            "accepted_prediction_tokens": s.accepted_tokens,
            "rejected_prediction_tokens": s.drafted_tokens - s.accepted_tokens,
        },
    }


def model_of(name: str, created: int, context_tokens: int | None, is_anthropic: bool = False) -> dict[str, Any]:
    """OpenAI's form of a model, for Anthropic's clients with what they look for besides."""
    model = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "ring-mlx",
        "context_length": context_tokens,
    }
    if is_anthropic:
        when = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        model |= {"type": "model", "display_name": name, "created_at": when, "max_input_tokens": context_tokens}
    return model


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}


def _token_name(token: bytes) -> str:
    """A token as OpenAI's completions write it: its text, or its bytes where it is a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def chat_logprob(t: TokenLogprob) -> dict[str, Any]:
    def one(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

    return {**one(t.token, t.logprob), "top_logprobs": [one(*pair) for pair in t.top]}
