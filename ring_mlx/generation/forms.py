"""What an answer must look like, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TextForm:
    """What the text of an answer must be.

    Args:
        kind: "schema" (JSON that a JSON Schema allows), "grammar" (GBNF or Lark) or "regex".
        text: The schema as JSON, the grammar or the pattern.
        origin: What to call it in errors, such as the field of a request.
    """

    kind: Literal["schema", "grammar", "regex"]
    text: str
    origin: str = "form"


@dataclass(frozen=True)
class CallForm:
    """A tool that may be called.

    Args:
        name: Of the tool.
        schema: What its arguments must be, as JSON.
        is_strict: A schema that cannot be kept is refused; else any object is let through in its place.
        origin: As of `TextForm`.
    """

    name: str
    schema: str
    is_strict: bool
    origin: str = "tools"


@dataclass(frozen=True)
class Form:
    """What an answer must be after its thought.

    Args:
        text: Of a text; None is any text.
        calls: The tools that may be called.
        must_call: It must be a call, or several, without text.
        is_single: At most one call where it must be one.
    """

    text: TextForm | None = None
    calls: tuple[CallForm, ...] = ()
    must_call: bool = False
    is_single: bool = False


ANY_OBJECT = '{"type": "object"}'
