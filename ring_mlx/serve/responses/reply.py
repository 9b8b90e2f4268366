"""Answers as ``/v1/responses`` gives them, whole and as numbered events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ring_mlx.engine.events import AnswerText, End, Event, Revised, Statistics, ThinkingText, ToolCall
from ring_mlx.serve.answer import Answer, Call, Piece, new_id
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.replies import chat_logprob, drafts_of
from ring_mlx.serve.responses.request import ResponsesRequest
from ring_mlx.serve.turns import Message

PREFIX = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}
PART = {"reasoning": "reasoning_text", "message": "output_text"}


class ResponsesReply(Answer):
    """An answer whose thought, text and calls are items of their own."""

    request: ResponsesRequest

    def __init__(self, request: ResponsesRequest, model: str) -> None:
        super().__init__(request, model)
        self._id, self._created = new_id("resp_"), int(time.time())
        self._number = -1
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._said, self._told, self._begun_at = "", 0, 0

    def first(self) -> Iterator[Piece]:
        for kind in ("created", "in_progress"):
            yield self._event(kind, response=self._response("in_progress", []))

    def alive(self, progress: str) -> str:
        """An event, since some clients end a stream that has only comments for long."""
        return self.line(self._event("in_progress", response=self._response("in_progress", [])))

    def add(self, event: Event) -> Iterator[Piece]:
        self.take(event)
        if isinstance(event, ThinkingText):
            yield from self._grow("reasoning", event.text)
        elif isinstance(event, AnswerText):
            is_open = self._open is not None and self._open["type"] == "message"
            yield from self._grow("message", self.seen(event.text, is_open))
        elif isinstance(event, ToolCall):
            yield from self._close()
            yield from self._call(self.calls[-1])
        elif isinstance(event, Revised):
            yield from self._revise(event.thought)

    def last(self, event: End) -> Iterator[Piece]:
        is_cut = self.reason(event) == "length"
        yield from self._close("incomplete" if is_cut else "completed")
        response = self._finished(is_cut, self._items)
        yield self._event(response["status"], response=response)

    def failed(self, error: ApiError) -> Iterator[Piece]:
        response = self._response("failed", self._items)
        response["error"] = {"code": "server_error", "message": error.message}
        yield self._event("failed", response=response)

    def whole(self, event: End) -> dict[str, Any]:
        is_cut, items = self.reason(event) == "length", []
        if self.thought:
            items.append(self._item("reasoning", self.thought))
        if self.text.strip():
            items.append(self._item("message", self.text, "incomplete" if is_cut else "completed", self.logprobs))
        return self._finished(is_cut, [*items, *map(self._call_item, self.calls)])

    # Items

    def _grow(self, kind: str, text: str) -> Iterator[Piece]:
        """More of an item, which is begun if the last one is of another kind."""
        if not text:
            return
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            self._open, self._said, self._begun_at = self._item(kind, "", "in_progress"), "", self._told
            self._items.append(self._open)
            yield self._event("output_item.added", output_index=self._index, item={**self._open, **_empty(kind)})
            yield self._part("content_part.added", _part(kind, ""))
            if self._has_summary:
                yield self._summary("part.added", part={"type": "summary_text", "text": ""})
        self._said += text
        logprobs = {"logprobs": self._new_logprobs()} if kind == "message" else {}
        yield self._event(f"{PART[kind]}.delta", **self._where(), delta=text, **logprobs)
        if self._has_summary:
            yield self._summary("text.delta", delta=text)

    def _close(self, status: str = "completed") -> Iterator[Piece]:
        """End the open item."""
        if self._open is None:
            return
        kind = self._open["type"]
        logprobs = self.logprobs[self._begun_at :] if kind == "message" else ()
        done = {
            **self._item(kind, self._said, status if kind == "message" else "completed", logprobs),
            "id": self._open["id"],
        }
        part, where = done["content"][0], self._where()
        more = {"logprobs": part["logprobs"]} if kind == "message" else {}
        yield self._event(f"{PART[kind]}.done", **where, text=self._said, **more)
        yield self._part("content_part.done", part)
        if self._has_summary:
            yield self._summary("text.done", text=self._said)
            yield self._summary("part.done", part={"type": "summary_text", "text": self._said})
        yield self._event("output_item.done", output_index=self._index, item=done)
        self._items[-1], self._open = done, None

    def _call(self, call: Call) -> Iterator[Piece]:
        item = self._call_item(call)
        self._items.append(item)
        begun, where = (
            {**item, "arguments": "", "status": "in_progress"},
            {"item_id": item["id"], "output_index": self._index},
        )
        yield self._event("output_item.added", output_index=self._index, item=begun)
        yield self._event("function_call_arguments.delta", **where, delta=item["arguments"])
        done = {"arguments": item["arguments"], "name": item["name"]}
        yield self._event("function_call_arguments.done", **where, **done)
        yield self._event("output_item.done", output_index=self._index, item=item)

    def _revise(self, thought: str) -> Iterator[Piece]:
        """Correct what was said: an open item ends with the text that is right, and more of the thought is a new one."""
        self.held, self._told = "", 0
        closed = [item for item in self._items if item["type"] == "reasoning" and item is not self._open]
        before = "".join(item["content"][0]["text"] for item in closed)
        rest = thought.removeprefix(before) if thought.startswith(before) else thought
        if self._open is not None and self._open["type"] == "reasoning":
            more = rest[len(self._said) :] if rest.startswith(self._said) else ""
            yield from self._grow("reasoning", more)
            self._said = rest
        else:
            self._said = ""
            yield from self._close()
            yield from self._grow("reasoning", rest)
        yield from self._close()

    def _item(self, kind: str, text: str, status: str = "completed", logprobs: Any = ()) -> dict[str, Any]:
        item: dict[str, Any] = {"id": new_id(PREFIX[kind]), "type": kind, "status": status}
        if kind == "message":
            item["role"] = "assistant"
        else:
            item["summary"] = [{"type": "summary_text", "text": text}] if self.request.has_summary else []
        return {**item, "content": [_part(kind, text, [chat_logprob(t) for t in logprobs])]}

    def _call_item(self, call: Call) -> dict[str, Any]:
        namespace, name = self.request.places.get(call.name, (None, call.name))
        item = {"id": new_id("fc_"), "type": "function_call", "status": "completed", "call_id": call.id}
        item |= {"name": name, "arguments": call.text}
        return item | ({"namespace": namespace} if namespace else {})

    # Events and the response

    def _event(self, kind: str, **fields: Any) -> Piece:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number, **fields}

    def _part(self, kind: str, part: dict[str, Any]) -> Piece:
        return self._event(kind, **self._where(), part=part)

    def _summary(self, kind: str, **fields: Any) -> Piece:
        where = {k: v for k, v in self._where().items() if k != "content_index"}
        return self._event(f"reasoning_summary_{kind}", **where, summary_index=0, **fields)

    @property
    def _has_summary(self) -> bool:
        return self.request.has_summary and self._open is not None and self._open["type"] == "reasoning"

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": self._index, "content_index": 0}

    def _new_logprobs(self) -> list[dict[str, Any]]:
        new, self._told = self.logprobs[self._told :], len(self.logprobs)
        return [chat_logprob(t) for t in new]

    def _finished(self, is_cut: bool, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The response, which is kept before the client can ask for it."""
        response = self._response("incomplete" if is_cut else "completed", items)
        response["usage"] = usage_of(self.statistics)
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        if self.request.stored is not None:
            self.request.stored.put(response, self._talk())
        return response

    def _talk(self) -> list[Message]:
        """The conversation up to the end of the answer."""
        talk, answer = self.request.talk, self.message()
        if not self.request.continue_last:
            return [*talk, answer]
        texts = {name: talk[-1].get(name, "") + answer.get(name, "") for name in ("content", "reasoning_content")}
        return [*talk[:-1], answer | {name: text for name, text in texts.items() if text}]

    def _response(self, status: str, items: list[dict[str, Any]]) -> dict[str, Any]:
        sampling = self.request.sampling
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "output": items,
            "temperature": sampling.temp,
            "top_p": sampling.top_p,
            "top_logprobs": self.request.top_logprobs or 0,
            "service_tier": "default",
            "metadata": {},
            "usage": None,
            **self.request.repeated,
        }


def _part(kind: str, text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    more = {"annotations": [], "logprobs": logprobs or []} if kind == "message" else {}
    return {"type": PART[kind], "text": text, **more}


def _empty(kind: str) -> dict[str, Any]:
    return {name: [] for name in (("content", "summary") if kind == "reasoning" else ("content",))}


def usage_of(s: Statistics) -> dict[str, Any]:
    """The usage of an answer in the words of the Responses API."""
    return {
        "input_tokens": s.prompt_tokens,
        "input_tokens_details": {"cached_tokens": s.reused_tokens},
        "output_tokens": s.generated_tokens,
        "output_tokens_details": {
            "reasoning_tokens": s.thinking_tokens,
            **drafts_of(s),
        },
        "total_tokens": s.prompt_tokens + s.generated_tokens,
    }
