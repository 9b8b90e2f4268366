"""Input items and tools of the Responses API as templates take them."""

from __future__ import annotations

from typing import Any

from ring_mlx.serve.failures import bad, cannot
from ring_mlx.serve.fields import Fields, check_count
from ring_mlx.serve.left_out import LeftOut
from ring_mlx.serve.protocol import (
    MOST_CALLS,
    MOST_MESSAGES,
    MOST_TOOLS,
    ROLES,
    arguments_of,
    check_calls,
    text_of,
)
from ring_mlx.serve.responses.stored import Stored
from ring_mlx.serve.turns import Turns

MOST_ITEMS = 2 * (MOST_MESSAGES + MOST_CALLS)
TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
THOUGHTS = {"reasoning_text": "text", "summary_text": "text", "text": "text"}
CALLS = ("function_call", "custom_tool_call")
RESULTS = ("function_call_output", "custom_tool_call_output")
# Calls of tools that only OpenAI runs or describes; the conversation makes sense without them.
HOSTED = {
    *("web_search_call", "file_search_call", "image_generation_call", "code_interpreter_call", "tool_search_call"),
    *("local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output", "tool_search_output"),
    *("apply_patch_call", "apply_patch_call_output", "computer_call", "computer_call_output"),
    *("mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "mcp_call"),
}


class Items:
    """Reads items into ``turns``; what is not used goes to ``left_out``."""

    def __init__(self, turns: Turns, stored: Stored, left_out: LeftOut) -> None:
        self._turns, self._stored, self._left_out = turns, stored, left_out
        self._referred: set[str] = set()

    def read(self, given: Any) -> None:
        """Read the value of ``input``. Raises ApiError if it is wrong."""
        if isinstance(given, str):
            self._turns.put("user", given)
            return
        items = Fields({"input": given}).array("input")
        check_count("items", len(items), MOST_ITEMS, "input")
        check_calls(
            [{"function": item} for item in items if isinstance(item, dict) and item.get("type") in CALLS], "input"
        )
        for i, item in enumerate(items):
            if not isinstance(item, dict):
                raise bad(f"input[{i}] is not an object; give an item.", f"input[{i}]", "invalid_value")
            self._item(Fields(item, f"input[{i}]."))

    def _item(self, fields: Fields) -> None:
        kind = fields.text("type") or "message"
        if kind == "item_reference":
            fields = self._referred_to(fields)
            kind = fields.get("type")
        if kind == "message":
            self._message(fields)
        elif kind == "reasoning":
            self._reasoning(fields)
        elif kind in CALLS:
            self._call(fields, kind)
        elif kind in RESULTS:
            if fields.get("output") is None:
                fields.refuse("output", "must be text or an array of text parts")
            result = {"tool_call_id": call_id} if (call_id := fields.text("call_id")) else {}
            self._turns.put("tool", text_of(fields, "output", TEXTS, "input"), **result)
        elif kind in HOSTED:
            self._left_out.add(kind)
        else:
            raise cannot(f"{fields.place}type {kind[:40]!r} is not supported; leave the item out.", "input")

    def _referred_to(self, fields: Fields) -> Fields:
        name = fields.text("id") or ""
        if name in self._referred:
            fields.refuse("id", "was referred to before")
        self._referred.add(name)
        return Fields(self._stored.item(name, f"{fields.place}id"), fields.place)

    def _message(self, fields: Fields) -> None:
        role = fields.text("role")
        if role not in ROLES or role == "tool":
            fields.refuse("role", "must be system, developer, user or assistant")
        if fields.get("content") is None:
            fields.refuse("content", "must be text or an array of text parts")
        text = text_of(fields, "content", TEXTS, "input")
        if role != "assistant":
            self._turns.put(ROLES[role], text)
            return
        if self._turns.has_text_last:
            self._turns.begin()
        self._turns.say(text)

    def _reasoning(self, fields: Fields) -> None:
        if self._turns.has_answer:
            self._turns.begin()
        thought = text_of(fields, "content", THOUGHTS, "input") or text_of(fields, "summary", THOUGHTS, "input")
        if fields.get("encrypted_content") is not None and not thought:
            self._left_out.add("encrypted_content")
        self._turns.think(thought)

    def _call(self, fields: Fields, kind: str) -> None:
        name = fields.text("name")
        if not name:
            fields.refuse("name", "must be the name of a tool")
        is_custom = kind == "custom_tool_call"
        arguments = {"input": fields.text("input") or ""} if is_custom else arguments_of(fields.get("arguments"))
        self._turns.call(joined(fields.text("namespace"), name), arguments, fields.text("call_id"))


def joined(namespace: str | None, name: str) -> str:
    """The one name by which the model calls a tool of a namespace."""
    return f"{namespace.removesuffix('__')}__{name}" if namespace else name


class Tools:
    """The function tools among those of a request; ``places`` has namespace and name of those that are in one."""

    def __init__(self, fields: Fields, left_out: LeftOut) -> None:
        self.functions: list[dict[str, Any]] = []
        self.places: dict[str, tuple[str, str]] = {}
        self._left_out = left_out
        self._read(fields)

    def _read(self, fields: Fields, namespace: str | None = None) -> None:
        for i, tool in enumerate(fields.array("tools")):
            inner = Fields(tool if isinstance(tool, dict) else {}, f"{fields.place}tools[{i}].")
            kind = inner.text("type")
            if kind == "function":
                self._function(inner, namespace)
            elif kind == "namespace" and namespace is None:
                self._read(inner, _name(inner))
            elif kind:
                self._left_out.add(f"tool {inner.text('name') or kind}")
            else:
                inner.refuse("type", "must be the kind of a tool, such as function")
        check_count("tools", len(self.functions), MOST_TOOLS)

    def _function(self, tool: Fields, namespace: str | None) -> None:
        name, described = _name(tool), tool.text("description")
        function: dict[str, Any] = {"name": joined(namespace, name)}
        if namespace:
            self.places[function["name"]] = namespace, name
        if described is not None:
            function["description"] = described
        if tool.get("parameters") is not None:
            function["parameters"] = tool.object("parameters")
        if tool.boolean("strict", False):
            function["strict"] = True
        self.functions.append({"type": "function", "function": function})


def _name(tool: Fields) -> str:
    name = tool.text("name")
    if not name:
        tool.refuse("name", "must be the name of a tool")
    return name
