"""Answers in OpenAI's JSON, whole and in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from ring_mlx.engine.events import AnswerText, End, Event, Revised, Statistics, ThinkingText, TokenLogprob, ToolCall
from ring_mlx.generation.thinking import end_note
from ring_mlx.serve.protocol import ApiRequest
from ring_mlx.system.terminal_text import is_seen


class Reply:
    """One answer in the making."""

    def __init__(self, request: ApiRequest, model: str) -> None:
        self.request, self._model = request, model
        self._id = f"{'cmpl' if request.is_text else 'chatcmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._thought, self._answer = "", ""
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[TokenLogprob] = []
        self._told = self._called = 0
        self._is_revised = False
        self._statistics = Statistics()

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        """Take an event; returns the pieces that a stream sends for it, except the last."""
        if isinstance(event, ThinkingText):
            self._thought += event.text
            yield self._piece({"reasoning_content": event.text})
        elif isinstance(event, AnswerText):
            self._answer += event.text
            yield self._piece({"content": event.text}, self._new_logprobs())
        elif isinstance(event, ToolCall):
            call = _call(event)
            yield self._piece({"tool_calls": [{"index": self._called, **call}]}, self._new_logprobs())
            self._calls.append(call)
            self._called += 1
        elif isinstance(event, TokenLogprob):
            self._logprobs.append(event)
        elif isinstance(event, Statistics):
            self._statistics = event
        elif isinstance(event, Revised):
            self._thought, self._answer, self._is_revised = event.thought, "", True
            self._calls, self._logprobs, self._told = [], [], 0

    def first(self) -> Iterator[dict[str, Any]]:
        """The pieces with which a stream starts."""
        if not self.request.is_text:
            yield self._piece({"role": "assistant", "content": ""})

    def last(self, event: End) -> Iterator[dict[str, Any]]:
        """The pieces with which a stream ends."""
        piece = self._piece({}, self._new_logprobs(), self._reason(event))
        if self._is_revised:
            piece["choices"][0]["message"] = self._message()
        yield piece
        if self.request.include_usage:
            yield {**self._head(streamed=True), "choices": [], "usage": usage_of(self._statistics)}

    def whole(self, event: End) -> dict[str, Any]:
        """The answer in one piece."""
        self._told = 0
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._reason(event), "logprobs": self._new_logprobs()}
        if self.request.is_text:
            choice["text"] = self._answer
        else:
            choice["message"] = self._message()
        return {**self._head(streamed=False), "choices": [choice], "usage": usage_of(self._statistics)}

    def why_empty(self, event: End) -> str:
        """The line in the server's log for an answer without call and text; else nothing."""
        if self._calls or is_seen(self._answer):
            return ""
        s = self._statistics
        tokens = s.generated_tokens, s.thinking_tokens
        return end_note(self._reason(event), *tokens, self._answer, "raise max_tokens")

    def _reason(self, event: End) -> str:
        """OpenAI's word for why the answer ended; an answer of only thought counts as cut off."""
        if self._calls:
            return "tool_calls"
        is_all_thought = bool(event.message) and self._statistics.thinking_tokens > 0 and not self._answer.strip()
        return "length" if is_all_thought else event.reason

    def _message(self) -> dict[str, Any]:
        content = None if self._calls and not self._answer.strip() else self._answer
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if thought := self._thought.strip("\r\n"):
            message["reasoning_content"] = thought
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    def _head(self, streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if self.request.is_text else "chat.completion"
        kind += ".chunk" if streamed and not self.request.is_text else ""
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

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
        new, self._told = self._logprobs[self._told :], len(self._logprobs)
        if not self.request.is_text:
            return {"content": [_chat_logprob(t) for t in new], "refusal": None}
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
        "completion_tokens_details": {"reasoning_tokens": s.thinking_tokens},
    }


def model_of(name: str, created: int, context_tokens: int | None) -> dict[str, Any]:
    """OpenAI's form of a model."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "ring-mlx",
        "context_length": context_tokens,
    }


def _call(event: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(event.arguments), ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": event.name, "arguments": arguments},
    }


def _token_name(token: bytes) -> str:
    """A token as OpenAI's completions write it: its text, or its bytes where it is a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _chat_logprob(t: TokenLogprob) -> dict[str, Any]:
    def one(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

    return {**one(t.token, t.logprob), "top_logprobs": [one(*pair) for pair in t.top]}
