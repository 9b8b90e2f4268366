"""Turns Metal source into C++ for clang or into CUDA, token by token; every line keeps its number.

Knows the spelling of both languages and nothing of types: what a name means is settled by the shim headers and the
compiler behind them.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable
from enum import Enum

from metal_kernels.twin.attributes import ADDRESS_SPACES, CPP_ATTRIBUTES, METAL_ATTRIBUTES, VECTORS
from metal_kernels.twin.declarations import rewrite_array_parameters, rewrite_threadgroup_variables
from metal_kernels.twin.overloads import drop_address_space_twins, drop_qualified_members
from metal_kernels.twin.tokens import NEWLINE, RewriteError, TokenList

__all__ = ["Dialect", "RewriteError", "rewrite"]


class Dialect(Enum):
    """What the rewritten text is for."""

    STRICT = "clang, address spaces kept: for checking types"
    ERASED = "clang, address spaces gone: for running"
    CUDA = "NVRTC"


@functools.lru_cache(maxsize=64)  # variants of a kernel share most of their text
def rewrite(source: str, file: str, dialect: Dialect) -> tuple[str, frozenset[int]]:
    """The source in the given dialect, and the ids of its function constants.

    Args:
        source: Metal text.
        file: Its name in messages; also seeds the ids of threadgroup variables.
        dialect: The target.

    Raises:
        RewriteError: For an unknown attribute or an unbalanced bracket.
    """
    tokens = TokenList(source, file)
    constants = _drop_attributes(tokens)
    if dialect is Dialect.STRICT:
        drop_qualified_members(tokens)
    if dialect is Dialect.CUDA:
        rewrite_threadgroup_variables(tokens, _shared_variable)
    else:
        rewrite_threadgroup_variables(tokens, _simulated_variable(file))
    if dialect is not Dialect.STRICT:
        drop_address_space_twins(tokens)
    rewrite_array_parameters(tokens)
    _rewrite_literals(tokens)
    if dialect is Dialect.CUDA:
        _drop_qualifiers(tokens)
    else:
        _rewrite_vector_construction(tokens)
    return str(tokens), frozenset(constants)


def _shared_variable(type_: str, name: str, shape: str, is_zeroed: bool) -> str:
    if is_zeroed:
        raise RewriteError(f"threadgroup variable '{name}' has an initialiser, which CUDA's __shared__ cannot have")
    return f"__shared__ __align__(16) {type_} {name}{shape};"  # as Apple aligns it, whatever the type


def _simulated_variable(file: str) -> Callable[[str, str, str, bool], str]:
    """Declares a threadgroup variable as a reference into the simulator's arena, under an id that is unique enough."""
    base = (zlib.crc32(file.encode()) & 0xFFFF) << 12
    count = iter(range(1 << 12))

    def declare(type_: str, name: str, shape: str, is_zeroed: bool) -> str:
        zeroed = ", true" if is_zeroed else ""
        return f'threadgroup auto& {name} = msl_tg<{type_} {shape}>({base + next(count)}u, "{name}"{zeroed});'

    return declare


def _attribute_names(tokens: TokenList, first: int, last: int) -> list[str]:
    """Names between [[ and ]] that are outside of parentheses."""
    names = []
    depth = 0
    for i in range(first, last):
        if tokens.text(i) == "(":
            depth += 1
        elif tokens.text(i) == ")":
            depth -= 1
        elif depth == 0 and tokens.kind(i) == "name":
            names.append(tokens.text(i))
    return names


def _drop_attributes(tokens: TokenList) -> set[int]:
    """Remove Metal's [[attributes]]; a function constant becomes a constexpr with the value MSL_FC_id."""
    constants = set()
    i = 0
    while i < len(tokens):
        is_attribute = tokens.text(i) == "[" and tokens.text(i + 1) == "[" and tokens.text(tokens.before(i)) != "["
        if is_attribute:
            end = tokens.closing(i, "[", "]")
            names = _attribute_names(tokens, i + 2, end - 1)
            if names and names[0] not in CPP_ATTRIBUTES and tokens.text(end - 1) == "]":
                unknown = [n for n in names if n not in METAL_ATTRIBUTES]
                if unknown:
                    raise RewriteError(f"{tokens.file}:{tokens.line(i)}: unknown Metal attribute {unknown[0]!r}")
                constant = _function_constant(tokens, i, end) if names == ["function_constant"] else None
                tokens.blank(i, end)
                if constant is not None:
                    constants.add(constant)
                    breaks = "".join(NEWLINE.findall(tokens.text(i)))
                    tokens.replace(i, f" = MSL_FC_{constant}{breaks}", "op")
            i = end
        i += 1
    return constants


def _function_constant(tokens: TokenList, first: int, last: int) -> int | None:
    """Id of a declared function constant, whose `constant` becomes `static constexpr`; None for another use."""
    if tokens.text(tokens.after(last)) != ";":
        return None
    number = next(tokens.text(i) for i in range(first, last) if tokens.kind(i) == "number")
    i = tokens.before(first)
    while i >= 0 and tokens.text(i) not in ("constant", ";", "{", "}"):
        i = tokens.before(i)
    if tokens.text(i) == "constant":  # otherwise a macro says it
        tokens.replace(i, "static constexpr")
    return int(number)


def _rewrite_literals(tokens: TokenList) -> None:
    """1.0h and 1.0bf become conversions."""
    for i in range(len(tokens)):
        text = tokens.text(i)
        if tokens.kind(i) != "number" or text.lower().startswith("0x"):
            continue
        if re.search(r"h$", text, re.IGNORECASE):
            tokens.replace(i, f"((half){text[:-1]}f)", "number")
        elif re.search(r"bf$", text, re.IGNORECASE):
            tokens.replace(i, f"((bfloat){text[:-2]}f)", "number")


def _drop_qualifiers(tokens: TokenList) -> None:
    """CUDA knows no address spaces: `constant` is const and the others vanish."""
    for i in range(len(tokens)):
        if tokens.kind(i) == "name" and tokens.text(i) in ADDRESS_SPACES | {"thread", "kernel"}:
            tokens.replace(i, "const" if tokens.text(i) == "constant" else "")


def _rewrite_vector_construction(tokens: TokenList) -> None:
    """clang's vector types have no constructors: float4(a, b) becomes msl_mk<float4 >(a, b)."""
    for i in range(len(tokens)):
        text = tokens.text(i)
        if tokens.kind(i) != "name" or (text not in VECTORS and text != "vec"):
            continue
        if tokens.text(tokens.before(i)) in ("operator", "using", "struct", "class", ".", "->"):
            continue
        end = i
        if text == "vec":
            if tokens.text(tokens.after(i)) != "<":
                continue
            try:
                end = tokens.closing(tokens.after(i), "<", ">")
            except RewriteError:
                continue
        if tokens.text(tokens.after(end)) == "(":
            _construct(tokens, i, end)


def _construct(tokens: TokenList, first: int, last: int) -> None:
    before = tokens.before(first)
    space = ""
    if tokens.text(before) == "::" and tokens.text(tokens.before(before)) == "metal":
        qualifier = tokens.before(before)
        tokens.replace(qualifier, "", "space")
        tokens.replace(before, "", "space")
        space, before = "metal::", tokens.before(qualifier)
    if tokens.text(before) != "operator":
        tokens.replace(first, f"msl_mk<{space}{tokens.text(first)}")
        tokens.replace(last, tokens.text(last) + " >", "op")
