"""Finds tool calls in streamed answer text; knows the tags and JSON, not the tools."""

from __future__ import annotations

import json
from typing import Any

from ring_mlx.session_events import ToolCall
from ring_mlx.thinking import tag_prefix

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
MAX_LEVELS = 64


class ToolCallSplitter:
    """Splits streamed text at ``<tool_call>`` blocks, which may arrive in pieces."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = False

    def feed(self, text: str) -> list[str | ToolCall]:
        """Take the next text; returns pieces of text and finished calls in order.

        A block that is not ``{"name": ..., "arguments": ...}`` comes out as the text that it is.
        """
        self._held += text
        out: list[str | ToolCall] = []
        while True:
            tag = CALL_END if self._inside else CALL_START
            before, found, after = self._held.partition(tag)
            if not found:
                break
            out.append(_parse(before) if self._inside else before)
            self._inside, self._held = not self._inside, after
        if not self._inside:
            keep = tag_prefix(self._held, CALL_START)
            out.append(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
        return [piece for piece in out if piece != ""]

    def flush(self) -> str:
        """What is still held back, at the end of the text: the start of a tag, or a call that was never closed."""
        held = (CALL_START if self._inside else "") + self._held
        self._held, self._inside = "", False
        return held


def _parse(body: str) -> str | ToolCall:
    try:
        call = _whole_letters(json.loads(body))
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _whole_letters(json.loads(arguments or "{}"))
        if isinstance(call["name"], str) and isinstance(arguments, dict) and _levels(arguments) <= MAX_LEVELS:
            return ToolCall(call["name"], arguments)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    return CALL_START + body + CALL_END


def _whole_letters(value: Any) -> Any:
    """Halves of surrogate pairs, which JSON can write but no text can hold, become U+FFFD."""
    text = json.dumps(value, ensure_ascii=False)
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value if whole == text else json.loads(whole)


def _levels(value: Any) -> int:
    """How deep a value is nested, as far as `MAX_LEVELS`: what is deeper cannot be written everywhere."""
    layer, levels = [value], 0
    while layer and levels <= MAX_LEVELS:
        parents, layer = layer, []
        for v in parents:
            layer += v.values() if isinstance(v, dict) else v if isinstance(v, list) else ()
        levels += 1
    return levels
