"""Answers in OpenAI's JSON, whole and in pieces."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
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
        self._has_echoed = not request.echo

    def belongs_to(self, other: Reply) -> None:
        """Be another choice of the same answer."""
        self._id, self._created = other._id, other._created

    def take(self, event: Event) -> None:
        if self.request.is_prompt_only and self._is_generated(event):
            return
        super().take(event)
        if self.request.is_prompt_only and isinstance(event, Statistics):
            self.statistics = replace(event, generated_tokens=0, thinking_tokens=0)

    def _is_generated(self, event: Event) -> bool:
        assert self.request.prepared is not None
        is_beyond = len(self.logprobs) >= len(self.request.prepared.prompt.ids)
        return isinstance(event, AnswerText) or (isinstance(event, TokenLogprob) and is_beyond)

    @property
    def mean_logprob(self) -> float:
        """Of the generated tokens, by which the best of several answers is found."""
        count = self.statistics.generated_tokens
        found = [t.logprob for t in self.logprobs[-count:] if t.logprob is not None] if count else []
        return sum(found) / len(found) if found else -math.inf

    def add(self, event: Event) -> Iterator[Piece]:
        self.take(event)
        if self.request.is_prompt_only:
            return
        if isinstance(event, AnswerText):
            yield from self._echo()
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

    def _echo(self) -> Iterator[Piece]:
        """The prompt, before what follows it."""
        if not self._has_echoed:
            self._has_echoed = True
            yield self._piece({"content": self.request.echoed}, self._new_logprobs())

    def last(self, event: End) -> Iterator[Piece]:
        yield from self.ended(event)
        if self.request.include_usage:
            yield self.usage_piece(self.statistics)

    def usage_piece(self, statistics: Statistics) -> Piece:
        return {**self._head(streamed=True), "choices": [], "usage": usage_of(statistics)}

    def ended(self, event: End) -> Iterator[Piece]:
        """The last pieces, without the usage."""
        yield from self._echo()
        piece = self._piece({}, self._new_logprobs(), self.reason(event))
        if self.is_revised:
            piece["choices"][0]["message"] = self._message()
        yield piece

    def whole(self, event: End) -> dict[str, Any]:
        self._told = 0
        choice = self._choice(self.reason(event), self._new_logprobs())
        if self.request.is_text:
            choice["text"] = self.request.echoed + self.text
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

    def _choice(self, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self.request.index, "finish_reason": reason, "logprobs": logprobs}

    def why_empty(self, event: End) -> str:
        return "" if self.request.echo else super().why_empty(event)

    def reason(self, event: End) -> str:
        return "length" if self.request.is_prompt_only else super().reason(event)

    def _piece(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = self._choice(reason, logprobs)
        if not self.request.is_text:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        piece = {**self._head(streamed=True), "choices": [choice]}
        return piece | {"usage": None} if self.request.include_usage else piece

    def _new_logprobs(self) -> dict[str, Any] | None:
        """Log-probabilities of the tokens since the last piece that had some."""
        if self.request.top_logprobs is None or not self.request.tells_logprobs:
            return None
        new, self._told = self.logprobs[self._told :], len(self.logprobs)
        if not self.request.is_text:
            return {"content": [chat_logprob(t) for t in new], "refusal": None}
        tops = [None if t.logprob is None else {_token_name(token): logprob for token, logprob in t.top} for t in new]
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
            **drafts_of(s),
        },
    }


def drafts_of(s: Statistics) -> dict[str, int]:
    """Tokens that were drafted, in OpenAI's words; other APIs have none, and their clients take further fields."""
    return {
        "accepted_prediction_tokens": s.accepted_tokens,
        "rejected_prediction_tokens": s.drafted_tokens - s.accepted_tokens,
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
    def one(token: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

    return {**one(t.token, t.logprob), "top_logprobs": [one(*pair) for pair in t.top]}
