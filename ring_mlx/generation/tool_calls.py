"""Finds tool calls in streamed answer text.

What is valid JSON is read by `json` alone, so its values are exact: agents write files from them. Only what is not goes
through `_mended`, which knows the few slips that models make. Libraries that repair JSON guess at all others too: half a
file would be written where the text was cut.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ring_mlx.engine.events import ToolCall
from ring_mlx.generation.thought_end import CALL_END, CALL_START, tag_prefix
from ring_mlx.system.terminal_text import whole_text

MAX_LEVELS = 64
SPACE = " \t\r\n"
MOST_RESTARTS = 16  # each may look at all the text again
OUTSIDE, INSIDE = re.compile(r'["{}\[\]<]'), re.compile(r'\\.?|"', re.DOTALL)
STRING_OR_COMMA = re.compile(r'"(?:[^"\\]++|\\.)*+"?|(?<=[\w"\]}])[ \t\r\n]*,(?=[ \t\r\n]*[\]}])', re.DOTALL)
ESCAPE = re.compile(r'\\(?:(["\\/bfnrt]|u[0-9a-fA-F]{4})|.)', re.DOTALL)

Piece = str | ToolCall


class ToolCallSplitter:
    """Splits streamed text at ``<tool_call>`` blocks, which may arrive in pieces.

    The pieces' texts, and the calls' ``raw``, put together are the text. A block that is no call comes out as text.
    """

    def __init__(self) -> None:
        self._block: list[str] = []
        self._body = self._rest = ""
        self._go_on: Callable[[list[Piece]], bool] = self._text
        self._depth, self._is_quoted = 0, False

    def feed(self, text: str) -> list[Piece]:
        """Take the next text; returns pieces of text and finished calls in order."""
        self._rest += text
        out: list[Piece] = []
        while self._go_on(out):
            pass
        return [piece for piece in out if piece != ""]

    def flush(self) -> list[Piece]:
        """The text or call that is still held back, at the end: the start of a tag, a block, or a call without its end tag."""
        out: list[Piece] = []
        for _ in range(MOST_RESTARTS):
            is_value, is_whole = self._go_on == self._value, self._go_on == self._after
            if is_whole and CALL_END.startswith(self._rest):
                self._hold(len(self._rest))
            if is_whole:
                self._end_block(out)
            held = self._give_up()
            # A string that was never closed hides what follows its block.
            before, tag, after = held.partition(CALL_END) if is_value else (held, "", "")
            out += [before + tag, *self.feed(after)]
            if not after:
                break
        return [piece for piece in [*out, self._give_up()] if piece != ""]

    def _text(self, out: list[Piece]) -> bool:
        before, found, after = self._rest.partition(CALL_START)
        if found:
            out.append(before)
            self._block, self._rest, self._go_on = [found], after, self._begin
            return True
        keep = len(before) - tag_prefix(before, CALL_START)
        out.append(before[:keep])
        self._rest = before[keep:]
        return False

    def _begin(self, out: list[Piece]) -> bool:
        """Before the JSON; a tag that a text only mentions holds nothing back."""
        first = self._rest.lstrip(SPACE)
        self._hold(len(self._rest) - len(first))
        if first and first[0] in "{[":
            self._depth, self._is_quoted, self._go_on = 0, False, self._value
        elif first:
            self._rest = self._give_up_block(out)
        return bool(first)

    def _value(self, out: list[Piece]) -> bool:
        """Within the JSON, whose end is where its brackets are even: an end tag within a string does not end it."""
        at = 0
        while found := (INSIDE if self._is_quoted else OUTSIDE).search(self._rest, at):
            if found[0] == "\\":  # what it escapes is yet to come
                self._hold(found.start())
                return False
            at = found.end()
            if found[0] == '"':
                self._is_quoted = not self._is_quoted
            elif found[0] == "<":
                self._hold(found.start())
                self._rest = self._give_up_block(out)
                return True
            elif not self._is_quoted:
                self._depth += 1 if found[0] in "{[" else -1
                if self._depth == 0:
                    self._hold(at)
                    self._body, self._go_on = "".join(self._block[1:]), self._after
                    return True
        self._hold(len(self._rest))
        return False

    def _after(self, out: list[Piece]) -> bool:
        """After the JSON: the end tag, or the next call where a model left it out."""
        rest = self._rest.lstrip(SPACE)
        self._hold(len(self._rest) - len(rest))
        if rest.startswith(CALL_END):
            self._hold(len(CALL_END))
        elif rest != CALL_START and (CALL_END.startswith(rest) or CALL_START.startswith(rest)):
            return False
        elif not rest.startswith(CALL_START):
            self._rest = self._give_up_block(out)
            return True
        self._end_block(out)
        return True

    def _hold(self, count: int) -> None:
        self._block.append(self._rest[:count])
        self._rest = self._rest[count:]

    def _end_block(self, out: list[Piece]) -> None:
        raw = "".join(self._block)
        self._block, self._go_on = [], self._text
        # A list of calls is one block, which the first stands for.
        out += [ToolCall(*call, raw="" if i else raw) for i, call in enumerate(_calls(self._body))] or [raw]

    def _give_up_block(self, out: list[Piece]) -> str:
        """Take the block so far as text; returns the text to look at next."""
        out.append("".join(self._block))
        self._block, self._go_on = [], self._text
        return self._rest

    def _give_up(self) -> str:
        held = "".join(self._block) + self._rest
        self._block, self._rest, self._go_on = [], "", self._text
        return held


def with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose calls all have objects as arguments; other calls become text of the message."""
    calls, texts = [], [message.get("content") or ""]
    for call in message.get("tool_calls") or ():
        function = (call.get("function") or call) if isinstance(call, Mapping) else call
        if not isinstance(function, Mapping):
            raise TypeError("a tool call is no object")
        arguments = function.get("arguments")
        try:
            found = {} if arguments is None else json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, Mapping):
            calls.append({**call, "function": {**function, "arguments": found}})
        else:
            given = arguments if isinstance(arguments, str) else json.dumps(arguments, default=str)
            body = f'{{"name": {json.dumps(function.get("name"))}, "arguments": {given}}}'
            texts.append(f"{CALL_START}\n{body}\n{CALL_END}")
    content = "\n".join(filter(None, texts)) if len(texts) > 1 and isinstance(texts[0], str) else message.get("content")
    return {**message, "content": content, "tool_calls": calls}


def _calls(body: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of a block's calls; empty if any of it is no call."""
    try:
        found = _read(body)
        return [_call(call) for call in (found if isinstance(found, list) else [found])]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []


def _call(call: Any) -> tuple[str, dict[str, Any]]:
    name, arguments = call["name"], call.get("arguments")
    if arguments is None:
        arguments = call.get("parameters")
    if isinstance(arguments, str):
        arguments = _read(arguments) if arguments.strip() else None
    arguments = {} if arguments is None else arguments
    is_named = isinstance(name, str) and name.strip()
    if not is_named or not isinstance(arguments, dict) or _levels(arguments) > MAX_LEVELS:
        raise ValueError("it is no call")
    return whole_text(name), whole_text(arguments)


def _read(text: str) -> Any:
    """The value of JSON, also with raw tabs and line breaks and the errors that `_mended` corrects."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_float)
    except ValueError:
        return json.loads(_mended(text), parse_constant=_refuse, parse_float=_float, strict=False)


def _mended(text: str) -> str:
    r"""JSON without commas before a closing bracket, and with ``\d`` as a backslash and d, and ``\'`` as ``'``."""
    return STRING_OR_COMMA.sub(lambda m: ESCAPE.sub(_escape, m[0]) if m[0][0] == '"' else "", text)


def _escape(found: re.Match[str]) -> str:
    return found[0] if found[1] else "'" if found[0] == "\\'" else "\\" + found[0]


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def _levels(value: Any) -> int:
    """How deep a value is nested, up to `MAX_LEVELS`; deeper ones cannot be written everywhere."""
    layer, levels = [value], 0
    while layer and levels <= MAX_LEVELS:
        parents, layer = layer, []
        for v in parents:
            layer += v.values() if isinstance(v, dict) else v if isinstance(v, list) else ()
        levels += 1
    return levels
