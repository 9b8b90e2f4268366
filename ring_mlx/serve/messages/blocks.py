"""Messages and tools of Anthropic's API as templates take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ring_mlx.serve.failures import bad, cannot
from ring_mlx.serve.fields import Fields, check_count
from ring_mlx.serve.left_out import LeftOut
from ring_mlx.serve.protocol import MOST_CALLS, MOST_MESSAGES, MOST_TOOLS
from ring_mlx.serve.turns import Turns

# Of a thought in place of all that the turn said before it: a stream cannot take back what it has sent.
SIGNATURE, REPLACES = "ring-mlx", "ring-mlx-replaces"
# Claude Code's note of its version and kind, which changes and is not meant for the model.
NOT_SYSTEM = "x-anthropic-billing-header:"
# Its own notes to the model beside the results of tools.
REMINDER = "<system-reminder>"
# Calls of tools that only Anthropic runs; the conversation makes sense without them.
HOSTED = ("server_tool_use", "redacted_thinking", "container_upload", "mcp_tool_use", "mcp_tool_result")


def system_of(fields: Fields) -> str:
    """The system prompt: a text, or the texts of blocks."""
    if not isinstance(fields.get("system"), list):
        return fields.text("system") or ""
    texts = [_text(block) for block in _blocks(fields, "system")]
    return "\n\n".join(text for text in texts if text and not text.startswith(NOT_SYSTEM))


def tools_of(fields: Fields, left_out: LeftOut) -> list[dict[str, Any]]:
    """The tools with a schema, as functions; those that Anthropic describes to its own models are left out."""
    tools = []
    for i, given in enumerate(fields.array("tools")):
        tool = Fields(given if isinstance(given, dict) else {}, f"tools[{i}].")
        name = tool.text("name")
        if not name:
            tool.refuse("name", "must be the name of a tool")
        if (kind := tool.text("type")) not in (None, "custom"):
            left_out.add(f"tool {kind}")
            continue
        function: dict[str, Any] = {"name": name}
        if described := tool.text("description"):
            function["description"] = described
        if tool.get("input_schema") is None:
            tool.refuse("input_schema", "must be the JSON schema of the tool's input")
        function["parameters"] = tool.object("input_schema")
        if tool.boolean("strict", False):
            function["strict"] = True
        tools.append({"type": "function", "function": function})
    check_count("tools", len(tools), MOST_TOOLS)
    return tools


class Blocks:
    """Reads messages of blocks into ``turns``; what is not used goes to ``left_out``."""

    def __init__(self, turns: Turns, left_out: LeftOut) -> None:
        self._turns, self._left_out, self._calls = turns, left_out, 0

    def read(self, fields: Fields) -> None:
        """Read ``messages``. Raises ApiError if one is wrong."""
        given = fields.array("messages")
        if not given:
            fields.refuse("messages", "must be an array with at least one message")
        check_count("messages", len(given), MOST_MESSAGES)
        for i, one in enumerate(given):
            message = Fields(one if isinstance(one, dict) else {}, f"messages[{i}].")
            role = message.text("role")
            if role == "assistant":
                self._turns.begin()
                for block in _blocks(message, "content"):
                    self._answered(block)
            elif role == "user":
                self._asked(message)
            elif role == "system":
                self._turns.put("system", "\n\n".join(map(_text, _blocks(message, "content"))))
            else:
                message.refuse("role", "must be user, assistant or system")
        check_count("tool calls", self._calls, MOST_CALLS, "messages")

    def _answered(self, block: Fields) -> None:
        kind = block.get("type")
        if kind == "text":
            self._turns.say(_text(block))
        elif kind == "thinking":
            if block.get("signature") == REPLACES:
                self._turns.take_back()
            self._turns.think(block.text("thinking") or "")
        elif kind == "tool_use":
            if not (name := block.text("name")):
                block.refuse("name", "must be the name of a tool")
            self._calls += 1
            self._turns.call(name, block.object("input"), block.text("id"))
        elif kind in HOSTED or str(kind).endswith("_tool_result"):
            self._left_out.add(str(kind))
        else:
            raise _unread(block)

    def _asked(self, message: Fields) -> None:
        """Results of tools, each a message, and what the user says beside them.

        A client's own notes beside results stay with the last one: as a user's message they would begin a new turn, and
        templates leave out the thoughts before it, which then had to be read again.
        """
        results: list[tuple[str, str]] = []
        texts: list[str] = []
        for block in _blocks(message, "content"):
            if block.get("type") == "tool_result":
                results.append((block.text("tool_use_id") or "", _result(block)))
            elif text := _said(block):
                texts.append(text)
        if results and all(text.lstrip().startswith(REMINDER) for text in texts):
            results[-1] = (results[-1][0], "\n\n".join([results[-1][1], *texts]))
            texts = []
        for call_id, text in results:
            self._turns.put("tool", text, **({"tool_call_id": call_id} if call_id else {}))
        if texts or not results:
            self._turns.put("user", "\n\n".join(texts))


def _blocks(fields: Fields, name: str) -> Iterator[Fields]:
    """The blocks of a content; a text is one of them."""
    content = fields.get(name)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        fields.refuse(name, "must be text or an array of blocks")
    for i, block in enumerate(content):
        place = f"{fields.place}{name}[{i}]"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise bad(f"{place} is not a block; give an object with a type.", place, "invalid_value")
        yield Fields(block, f"{place}.")


def _text(block: Fields) -> str:
    if block.get("type") != "text":
        raise _unread(block)
    text = block.text("text")
    if text is None:
        block.refuse("text", "must be a string")
    return text


def _said(block: Fields) -> str:
    """The text of a block of a user's, or of a tool's result."""
    kind = block.get("type")
    if kind == "document":
        source = Fields(block.object("source"), f"{block.place}source.")
        if source.get("type") == "text":
            text = source.text("data") or ""
        elif source.get("type") == "content":
            text = "".join(map(_said, _blocks(source, "content")))
        else:
            raise _unread(block)
        return "\n\n".join(part for part in (block.text("title"), block.text("context"), text) if part)
    if kind == "search_result":
        heads = (block.text("title"), block.text("source"))
        return "\n".join([*(h for h in heads if h), *map(_said, _blocks(block, "content"))])
    return _text(block)


def _result(block: Fields) -> str:
    text = "" if block.get("content") is None else "\n".join(map(_said, _blocks(block, "content")))
    is_error = block.boolean("is_error", False)
    return f"Error: {text}" if is_error and not text.lower().startswith(("error", "<tool_use_error>")) else text


def _unread(block: Fields) -> Exception:
    kind = str(block.get("type"))
    source = block.get("source")
    of = f" with a source of type {str(source.get('type'))[:40]!r}" if isinstance(source, dict) else ""
    return cannot(f"{block.place}type is {kind[:40]!r}{of}; only text is read.", block.place.removesuffix("."))
