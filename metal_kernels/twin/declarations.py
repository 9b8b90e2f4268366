"""Declarations that the target languages spell otherwise: threadgroup variables and array parameters."""

from __future__ import annotations

from collections.abc import Callable

from metal_kernels.twin.attributes import ADDRESS_SPACES
from metal_kernels.twin.tokens import TokenList

STATEMENT_STARTS = (";", "{", "}", ")", ":", "")


def rewrite_threadgroup_variables(tokens: TokenList, declare: Callable[[str, str, str, bool], str]) -> None:
    """Replace each `threadgroup T a[n], b;` by what ``declare`` makes of (type, name, shape, is zeroed)."""
    i = 0
    while i < len(tokens):
        opens = tokens.text(i) == "threadgroup" and tokens.is_code(i)
        if opens and tokens.text(tokens.before(i)) in STATEMENT_STARTS:
            i = _rewrite_variable(tokens, i, declare)
        i += 1


def _rewrite_variable(tokens: TokenList, start: int, declare: Callable[[str, str, str, bool], str]) -> int:
    """Returns the last token looked at."""
    end, commas, is_zeroed = _declaration(tokens, start)
    if end is None:
        return start
    name = _declared_name(tokens, start, commas[0] if commas else end)
    type_ = "".join(tokens.text(i) for i in range(tokens.after(start), name)).strip()
    declared = []
    first = name
    for cut in [*commas, end]:
        while not tokens.is_code(first):
            first += 1
        shape = "".join(tokens.text(i) for i in range(first + 1, cut)).strip()
        declared.append(declare(type_, tokens.text(first), shape, is_zeroed))
        first = tokens.after(cut)
    breaks = "\n" * sum(tokens.text(i).count("\n") for i in range(start, end))
    text = " ".join(declared).replace("\n", " ").rstrip(";")
    for i in range(start, end):
        tokens.replace(i, "", "space")
    tokens.replace(start, breaks + text)
    return end


def _declaration(tokens: TokenList, start: int) -> tuple[int | None, list[int], bool]:
    """The semicolon (None if this declares a pointer or a function), the commas, and whether `= {}` was there."""
    i = tokens.after(start)
    angles = 0
    commas = []
    is_zeroed = False
    while i < len(tokens):
        text = tokens.text(i)
        angles += (text == "<") - (text == ">")
        if text == "[":
            i = tokens.closing(i, "[", "]")
        elif angles == 0 and text == "=" and _is_empty_initializer(tokens, i):
            tokens.blank(i, tokens.closing(tokens.after(i), "{", "}"))
            is_zeroed = True
        elif angles == 0 and text in ("*", "&", "(", "=", "{", ")", "}"):
            return None, [], False
        elif angles == 0 and text == ",":
            commas.append(i)
        elif angles == 0 and text == ";":
            return i, commas, is_zeroed
        i = tokens.after(i)
    return None, [], False


def _is_empty_initializer(tokens: TokenList, equals: int) -> bool:
    brace = tokens.after(equals)
    return tokens.text(brace) == "{" and tokens.text(tokens.after(tokens.closing(brace, "{", "}"))) == ";"


def _declared_name(tokens: TokenList, start: int, end: int) -> int:
    """The last name before the first `[`, outside of template arguments."""
    i = tokens.after(start)
    angles = 0
    name = i
    while i < end:
        text = tokens.text(i)
        angles += (text == "<") - (text == ">")
        if angles == 0 and text == "[":
            break
        if angles == 0 and tokens.kind(i) == "name":
            name = i
        i = tokens.after(i)
    return name


def rewrite_array_parameters(tokens: TokenList) -> None:
    """`constant T s[2]` as a parameter is a pointer."""
    for i in range(len(tokens)):
        opens = tokens.text(i) in ADDRESS_SPACES and tokens.is_code(i)
        if opens and tokens.text(tokens.before(i)) in ("(", ","):
            _rewrite_array_parameter(tokens, i)


def _rewrite_array_parameter(tokens: TokenList, start: int) -> None:
    i = tokens.after(start)
    angles = 0
    while i < len(tokens):
        text = tokens.text(i)
        angles += (text == "<") - (text == ">")
        if angles == 0 and text in (",", ")", "(", ";", "{", "=", "*", "&"):
            return
        if text == "[":
            end = tokens.closing(i, "[", "]")
            name = tokens.before(i)
            is_named = tokens.kind(name) == "name" and tokens.text(tokens.before(name)) not in ADDRESS_SPACES
            if tokens.text(tokens.after(end)) in (",", ")") and is_named:
                tokens.replace(name, "*" + tokens.text(name))
                tokens.blank(i, end)
            return
        i = tokens.after(i)
