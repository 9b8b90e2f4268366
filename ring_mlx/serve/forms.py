"""The form that a client asks an answer to have: JSON, a grammar, a pattern or calls of tools, alike on all routes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ring_mlx.generation.forms import ANY_OBJECT, CallForm, Form, TextForm
from ring_mlx.serve.failures import bad, cannot
from ring_mlx.serve.fields import Fields

FORMS = ("grammar", "json_schema", "regex")  # fields of a form's own, as llama.cpp and others have them
MODES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}
ONE = ("function", "tool")


@dataclass(frozen=True)
class Choice:
    """Whether tools may, must or must not be called, and which; None are all."""

    mode: str = "auto"
    names: tuple[str, ...] | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the model is told of the tools."""
        return self.mode != "none"


def choice_of(fields: Fields) -> Choice:
    """The ``tool_choice``: a word, or an object with a type. Raises ApiError if it is neither."""
    given = fields.get("tool_choice")
    choice: dict[str, Any] = given if isinstance(given, dict) else {"type": "auto" if given is None else given}
    kind = choice.get("type")
    if isinstance(kind, str) and kind in MODES:
        return Choice(MODES[kind])
    if kind in ONE:
        return Choice("required", (_name(fields, choice),))
    if kind == "allowed_tools":
        inner = choice.get("allowed_tools")
        allowed = Fields(inner if isinstance(inner, dict) else choice, "tool_choice.")
        names = tuple(_name(fields, tool) for tool in allowed.array("tools"))
        if (mode := allowed.text("mode") or "auto") not in ("auto", "required") or not names:
            fields.refuse("tool_choice", "must have a mode, auto or required, and at least one tool")
        return Choice(mode, names)
    return fields.refuse("tool_choice", f"must be {', '.join(MODES)} or name a tool")


def _name(fields: Fields, tool: Any) -> str:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        fields.refuse("tool_choice", "must name a tool")
    return str(name)


def text_form_of(form: Mapping[str, Any], origin: str, schema_in: str = "") -> TextForm | None:
    """The form of a text; None is any text.

    Args:
        form: With a type: text, json_object or json_schema.
        origin: What the client calls it.
        schema_in: Where the schema is within it, besides ``schema``.

    Raises ApiError 400 for a wrong value, 422 for another type.
    """
    kind = form.get("type")
    if kind in (None, "text"):
        return None
    if kind == "json_object" and form.get("schema") is None:  # with one it is llama.cpp's json_schema
        return TextForm("schema", ANY_OBJECT, origin)
    if kind not in ("json_object", "json_schema"):
        raise cannot(f"{origin} {str(kind)[:40]!r} is not supported; ask for text, json_object or json_schema.", origin)
    outer = Fields(form, f"{origin}.")
    inner = Fields(outer.object(schema_in), f"{origin}.{schema_in}.") if schema_in and schema_in in form else outer
    if inner.get("schema") is None:
        inner.refuse("schema", "must be a JSON Schema")
    return _schema(inner, "schema")


def _schema(fields: Fields, name: str) -> TextForm:
    return TextForm("schema", json.dumps(fields.object(name)), f"{fields.place}{name}")


def own_form_of(fields: Fields, other: TextForm | None) -> TextForm | None:
    """The form by a field of its own, or else the other one. Raises ApiError 400 if there are two."""
    found = [form for form in (other, *(_own(fields, name) for name in FORMS)) if form is not None]
    if len(found) > 1:
        names = " and ".join(form.origin for form in found)
        raise bad(f"{names} are two forms of one answer; send one.", found[1].origin, "invalid_value")
    return found[0] if found else None


def _own(fields: Fields, name: str) -> TextForm | None:
    if not fields.get(name):
        return None
    if name == "json_schema":
        return _schema(fields, name)
    return TextForm("grammar" if name == "grammar" else "regex", fields.text(name) or "", name)


def form_of(text: TextForm | None, tools: Sequence[Mapping[str, Any]], choice: Choice, one_call: bool) -> Form | None:
    """The form of an answer that may call these tools; None is any answer. Raises ApiError 400 if a tool is not there."""
    if not choice.is_wanted:
        return None if text is None else Form(text)
    calls = tuple(_call(i, tool["function"]) for i, tool in enumerate(tools))
    if choice.names is not None:
        gone = set(choice.names) - {call.name for call in calls}
        if gone:
            raise bad(f"tool_choice names {min(gone)!r}, which is not among tools.", "tool_choice", "invalid_value")
        calls = tuple(call for call in calls if call.name in choice.names)
    if choice.mode == "required":
        if not calls:
            raise bad("tool_choice wants a call, but there are no tools.", "tool_choice", "invalid_value")
        return Form(None, calls, True, one_call or choice.names is not None)
    if text is not None:
        return Form(text, calls, False, one_call)
    return Form(None, calls) if choice.names is not None or any(call.is_strict for call in calls) else None


def _call(at: int, function: Mapping[str, Any]) -> CallForm:
    given = function.get("parameters")
    if given is None:
        given = {"additionalProperties": False}
    origin = f"tools[{at}].parameters"
    if not isinstance(given, dict):
        raise bad(f"{origin} is no object; give a JSON Schema.", origin, "invalid_value")
    return CallForm(function["name"], json.dumps({**given, "type": "object"}), function.get("strict") is True, origin)
