"""Fields of a JSON object with their types and ranges checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from ring_mlx.generation.sampling_ranges import OutOfRangeError, Range
from ring_mlx.serve.failures import ApiError, bad
from ring_mlx.system.terminal_text import whole_text

MOST_LEVELS, MOST_VALUES, MOST_DIGITS = 64, 1 << 18, 64
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
TOKEN, QUOTE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL), 0x22


class Fields:
    """A JSON object that gives checked values; what is absent or null is the default.

    ``place`` is what to call it in messages, such as ``messages[2].``.
    """

    def __init__(self, values: Mapping[str, Any], place: str = "") -> None:
        self.values, self.place = values, place

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def boolean(self, name: str, default: bool) -> bool:
        return bool(self._of(bool, name, default, "must be true or false"))

    def within(self, name: str, values: Range) -> Any:
        """A number among the values of a setting."""
        value = self.values.get(name)
        try:
            return None if value is None else values.check(value, f"{self.place}{name}")
        except OutOfRangeError as e:
            raise bad(f"{e}; send one.", f"{self.place}{name}", "invalid_value") from None

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, f"must be a whole number from {low} to {high}")
        return int(value)

    def text(self, name: str) -> str | None:
        found: str | None = self._of(str, name, None, "must be a string")
        return found

    def object(self, name: str) -> dict[str, Any]:
        """An object; empty where it is absent."""
        return dict(self._of(dict, name, {}, "must be an object"))

    def array(self, name: str) -> list[Any]:
        """An array; empty where it is absent."""
        return list(self._of(list, name, [], "must be an array"))

    def _of(self, kind: type, name: str, default: Any, why: str) -> Any:
        value = self.values.get(name)
        if value is not None and not isinstance(value, kind):
            self.refuse(name, why)
        return default if value is None else value

    def either(self, name: str, other: str) -> str:
        """Which of two names of one field is given; refuses two values that differ."""
        first, second = self.values.get(name), self.values.get(other)
        if second is None or first == second:
            return name
        if first is not None:
            self.refuse(other, f"contradicts {name}; send one of them")
        return other

    def refuse(self, name: str, why: str) -> NoReturn:
        seen = json.dumps(self.values.get(name))
        seen = seen if len(seen) <= 40 else f"{seen[:40]}..."
        raise bad(f"{self.place}{name} is {seen}; it {why}.", f"{self.place}{name}", "invalid_value")


def check_count(what: str, count: int, most: int, param: str | None = None) -> None:
    if count > most:
        raise bad(f"{count} {what} are more than {most}; send fewer.", param or what, "invalid_value")


def read_object(body: bytes) -> dict[str, Any]:
    """A request's body as the JSON object that it must be.

    Raises ApiError if `read_json` cannot read it, or it is not an object.
    """
    try:
        value = read_json(body)
    except ValueError as e:
        raise bad(f"the body is not JSON ({str(e)[:100]}); send one object.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad("the body is not a JSON object; send one.", code="invalid_json")
    return value


def read_json(text: bytes) -> Any:
    """The value of JSON text, after a check that parsing takes little time: no other thread can run meanwhile.

    Raises ValueError if it is not UTF-8, not JSON, or has a number of too many digits; ApiError if it has too many
    values, or is nested too deeply.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:
        _check_count(text)
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=refuse, parse_int=_parse_int)
    except RecursionError:
        raise _too_deep() from None
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS + 1):
        level = [v for v in level if isinstance(v, (dict, list))]
        level = [v for outer in level for v in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return whole_text(value) if HALF_PAIR.search(text) else value
    raise _too_deep()


def _check_count(text: bytes) -> None:
    """Count values outside of strings."""
    values = 0
    for match in TOKEN.finditer(text):
        values += text[match.start()] != QUOTE
        if values > MOST_VALUES:
            raise ApiError(413, f"the JSON has more than {MOST_VALUES} values; send fewer.", code="body_too_large")


def _parse_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:  # the time for them grows with their square
        raise ValueError(f"a number has more than {MOST_DIGITS} digits")
    return int(digits)


def _too_deep() -> ApiError:
    return bad(f"the body is nested more than {MOST_LEVELS} levels deep; send plain messages.", code="invalid_json")
