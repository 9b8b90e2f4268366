"""Ollama's ``/api/chat``, ``/api/tags`` and ``/api/show``, for clients that know only these."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from ring_mlx.engine.events import AnswerText, End, Event, Revised, Sampling, ThinkingText, ToolCall
from ring_mlx.serve.answer import Answer, Piece
from ring_mlx.serve.failures import ApiError, cannot
from ring_mlx.serve.fields import Fields, check_count
from ring_mlx.serve.models import Served
from ring_mlx.serve.protocol import MOST_MESSAGES, ApiRequest, parse_chat
from ring_mlx.serve.replies import chat_logprob

FAMILY = "ring-linear"
NANOSECONDS = 1_000_000_000
# Not as in OpenAI's requests, or without effect.
OWN = ("keep_alive", "messages", "options", "stream", "think", "format")


def parse_ollama(body: Mapping[str, Any], defaults: Sampling) -> ApiRequest:
    """A request to ``/api/chat``, by way of OpenAI's; errors as `ring_mlx.serve.protocol.parse_chat`."""
    fields = Fields(body)
    options = fields.object("options")
    if (most := Fields(options, "options.").integer("num_predict", -2, 1 << 53)) is not None:
        options["max_tokens"] = -1 if most < 0 else most
        del options["num_predict"]
    chat = {name: value for name, value in body.items() if name not in OWN}
    check_count("messages", len(fields.array("messages")), MOST_MESSAGES)
    chat["messages"] = [_message(m, f"messages[{n}]") for n, m in enumerate(fields.array("messages"))]
    if (form := fields.get("format")) not in (None, ""):
        if form != "json" and not isinstance(form, dict):
            fields.refuse("format", "must be json or a JSON Schema")
        whole = {"type": "json_schema", "json_schema": {"name": "format", "schema": form}}
        chat["response_format"] = {"type": "json_object"} if form == "json" else whole
    think = fields.get("think")
    if not isinstance(think, (bool, str, type(None))):
        fields.refuse("think", "must be true, false or an effort")
    chat |= {"reasoning_effort" if isinstance(think, str) else "enable_thinking": think}
    asked = {**options, **chat, "stream": fields.boolean("stream", True)}
    several = () if asked.pop("n", 1) in (None, 1) else ("n",)  # the route has one answer
    request = parse_chat(asked, defaults)
    return replace(request, left_out=(*several, *request.left_out))


def _message(given: Any, place: str) -> Any:
    if not isinstance(given, dict):
        return given
    if given.get("images"):
        raise cannot(f"{place}.images is not empty; only text is read.", f"{place}.images")
    said = {name: value for name, value in given.items() if name not in ("images", "thinking", "tool_name")}
    thought, name = Fields(given, f"{place}.").text("thinking"), given.get("tool_name") or given.get("name")
    more = {"reasoning_content": thought, "name": name}
    return said | {name: value for name, value in more.items() if value is not None}


class OllamaReply(Answer):
    """An answer in Ollama's form; a stream is lines of JSON."""

    content_type = "application/x-ndjson"
    _told = 0

    def line(self, piece: Piece) -> str:
        return json.dumps(piece, ensure_ascii=False) + "\n"

    def alive(self, progress: str) -> str:
        return self.line(self._piece({"content": ""}))

    def first(self) -> Iterator[Piece]:
        yield from ()

    def add(self, event: Event) -> Iterator[Piece]:
        self.take(event)
        if isinstance(event, ThinkingText):
            yield self._piece({"content": "", "thinking": event.text})
        elif isinstance(event, AnswerText):
            yield self._piece({"content": event.text})
        elif isinstance(event, ToolCall):
            call = self.calls[-1]
            yield self._piece({"content": "", "tool_calls": [_call(call.name, call.arguments)]})
        elif isinstance(event, Revised):
            self._told = 0

    def last(self, event: End) -> Iterator[Piece]:
        yield self._piece({"content": ""}) | self._end(event)

    def whole(self, event: End) -> dict[str, Any]:
        message: dict[str, Any] = {"content": self.text}
        if self.thought:
            message["thinking"] = self.thought
        if self.calls:
            message["tool_calls"] = [_call(call.name, call.arguments) for call in self.calls]
        return self._piece(message) | self._end(event)

    def failed(self, error: ApiError) -> Iterator[Piece]:
        yield error_body(error)

    def _piece(self, message: dict[str, Any]) -> Piece:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        new, self._told = self.logprobs[self._told :], len(self.logprobs)
        more = {"logprobs": [chat_logprob(t) for t in new]} if new else {}
        said = {"role": "assistant", **message}
        return {"model": self.model, "created_at": now, "message": said, **more, "done": False}

    def _end(self, event: End) -> dict[str, Any]:
        s = self.statistics
        read, generated = s.time_to_first_token_s, s.generated_tokens / s.generation_tps if s.generation_tps else 0.0
        done = {"done": True, "done_reason": "length" if self.reason(event) == "length" else "stop"}
        counts = {"prompt_eval_count": s.prompt_tokens, "eval_count": s.generated_tokens, "load_duration": 0}
        seconds = {"total_duration": read + generated, "prompt_eval_duration": read, "eval_duration": generated}
        return done | counts | {name: int(value * NANOSECONDS) for name, value in seconds.items()}


def _call(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Ollama's form."""
    return {"error": error.message}


def tag_of(name: str, one: Served, created: int) -> dict[str, Any]:
    """A model as ``/api/tags`` lists it; of one that is not loaded size and digest are not known."""
    loaded = None if one.engine is None else one.engine.loaded
    at = datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z")
    size, digest = (0, "") if loaded is None else (loaded.weight_bytes, loaded.info.fingerprint)
    return {"name": name, "model": name, "modified_at": at, "size": size, "digest": digest, "details": _details(one)}


def shown(one: Served) -> dict[str, Any]:
    """A model as ``/api/show`` describes it."""
    info = {"general.architecture": FAMILY, f"{FAMILY}.context_length": one.context_tokens}
    texts = dict.fromkeys(("license", "modelfile", "parameters", "template"), "")
    return {**texts, "details": _details(one), "model_info": info, "capabilities": ["completion", "tools", "thinking"]}


def _details(one: Served) -> dict[str, Any]:
    loaded = None if one.engine is None else one.engine.loaded
    level = "" if loaded is None else loaded.info.quantization
    return {"parent_model": "", "format": "mlx", "family": FAMILY, "families": [FAMILY], "parameter_size": "",
            "quantization_level": level}  # fmt: skip
