"""JSON Schemas on their way to llguidance: what has no effect there is tidied away, and what it refuses is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ring_mlx.errors import GrammarError

ONE = {
    *("additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then"),
    *("unevaluatedItems", "unevaluatedProperties"),
}
LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
NAMED = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
# Bounds that large are rounded, or taken for the largest integer of 64 bits, which then would be allowed.
FARTHEST = 1 << 53
LOWER, UPPER = ("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")
# What else says something of properties or items, so that "unevaluated" is more than "additional" there.
APPLICATORS = {
    *("$dynamicRef", "$ref", "allOf", "anyOf", "contains", "dependentSchemas", "else", "if", "not", "oneOf", "then"),
}
UNEVALUATED = {"unevaluatedItems": "items", "unevaluatedProperties": "additionalProperties"}
# The formats of strings that are more than a remark here.
FORMATS = {
    *("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid"),
}
MOST_TRIES = 300
MOST_PROPERTIES = 2_500  # of one object; the work grows with their square


def below(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas directly within one, each with its path from there; definitions come first."""
    if not isinstance(schema, dict):
        return
    for key in sorted(schema, key=lambda key: (key not in ("$defs", "definitions"), key)):
        value = schema[key]
        if key in ONE:
            yield key, value
        elif key in LISTS and isinstance(value, list):
            yield from ((f"{key}[{i}]", each) for i, each in enumerate(value))
        elif key in NAMED and isinstance(value, dict):
            yield from ((f"{key}.{name}", each) for name, each in value.items())


def tidied(schema: dict[str, Any], origin: str) -> list[str]:
    """Take away what means nothing, in place; returns the paths of keywords that meant something to their author.

    Options of llguidance itself go, so that no client gives them, and keywords that the specification lets a reader pass over:
    formats that are not known, and halves of pairs. Counts such as 2.0 become integers. Raises GrammarError if an object has too
    many properties, or a number must be larger than is exact.
    """
    told: list[str] = []
    schema.pop("x-guidance", None)
    left: list[tuple[str, Any]] = [(origin, schema)]
    while left:
        path, s = left.pop()
        if not isinstance(s, dict):
            continue
        properties = s.get("properties")
        if isinstance(properties, dict) and len(properties) > MOST_PROPERTIES:
            why = f"{path} has {len(properties)} properties, more than {MOST_PROPERTIES}; nest some of them."
            raise GrammarError(why, origin)
        for name in (*LOWER, *UPPER):
            bound = s.get(name)
            if isinstance(bound, (int, float)) and (bound if name in LOWER else -bound) > FARTHEST:
                raise GrammarError(f"{path}.{name} is beyond 2**53; answers cannot be held to it.", origin)
        if isinstance(s.get("format"), str) and s["format"] not in FORMATS:
            told.append(f"{path}.format")
            del s["format"]
        for name in COUNTS:
            if isinstance(s.get(name), float) and s[name].is_integer():
                s[name] = int(s[name])
        for name, plain in UNEVALUATED.items():
            if name in s and plain not in s and not APPLICATORS & s.keys():
                s[plain] = s.pop(name)
        _drop_halves(s)
        left += [(f"{path}.{step}", each) for step, each in below(s)]
    return told


def _drop_halves(s: dict[str, Any]) -> None:
    if "if" not in s or not {"then", "else"} & s.keys():
        for name in ("if", "then", "else"):
            s.pop(name, None)
    if "contains" not in s:
        s.pop("minContains", None)
        s.pop("maxContains", None)
    if s.get("uniqueItems") is False:
        del s["uniqueItems"]


def blamed(schema: dict[str, Any], message: str, problem: Callable[[dict[str, Any]], str]) -> str:
    """The path of the part of a schema that has a problem by itself: ``problem`` says of it what it says of the whole."""
    path, here, tries = "", schema, 0
    shared: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    is_deeper = True
    while is_deeper:
        is_deeper = False
        for step, each in below(here):
            tries += 1
            if tries > MOST_TRIES:
                return path
            if isinstance(each, dict) and each and problem(shared | each) == message:
                path, here, is_deeper = f"{path}.{step}", each, True
                break
    return path
