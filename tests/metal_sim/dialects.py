"""Metal source as C++ for clang, to check its types or to run it, or as the twin's CUDA; every line keeps its number."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from enum import Enum

from metal_kernels.twin.attributes import ADDRESS_SPACES
from metal_kernels.twin.declarations import rewrite_array_parameters, rewrite_threadgroup_variables
from metal_kernels.twin.overloads import drop_address_space_twins
from metal_kernels.twin.rewrite import drop_attributes, rewrite_literals
from metal_kernels.twin.rewrite import rewrite as rewrite_to_cuda
from metal_kernels.twin.tokens import RewriteError, TokenList
from tests.metal_sim.lint import VECTORS


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
    if dialect is Dialect.CUDA:
        return rewrite_to_cuda(source, file), frozenset()
    tokens, constants = TokenList(source, file), set[int]()

    def declared(names: list[str], first: int, last: int) -> str:
        constant = _function_constant(tokens, first, last) if names == ["function_constant"] else None
        if constant is None:
            return ""
        constants.add(constant)
        return f" = MSL_FC_{constant}"

    drop_attributes(tokens, declared)
    if dialect is Dialect.STRICT:
        _drop_qualified_members(tokens)
    rewrite_threadgroup_variables(tokens, _simulated_variable(file))
    if dialect is Dialect.ERASED:
        drop_address_space_twins(tokens)
    rewrite_array_parameters(tokens)
    rewrite_literals(tokens)
    _rewrite_vector_construction(tokens)
    return str(tokens), frozenset(constants)


def _simulated_variable(file: str) -> Callable[[str, str, str, bool], str]:
    """Declares a threadgroup variable as a reference into the simulator's arena, under an id that is unique enough."""
    base = (zlib.crc32(file.encode()) & 0xFFFF) << 12
    count = iter(range(1 << 12))

    def declare(type_: str, name: str, shape: str, is_zeroed: bool) -> str:
        zeroed = ", true" if is_zeroed else ""
        return f'threadgroup auto& {name} = msl_tg<{type_} {shape}>({base + next(count)}u, "{name}"{zeroed});'

    return declare


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


def _drop_qualified_members(tokens: TokenList) -> None:
    """Remove member functions that are qualified with an address space other than thread: clang's C++ has none."""
    i = 0
    while i < len(tokens):
        if tokens.text(i) in ADDRESS_SPACES and tokens.is_code(i):
            i = _drop_qualified_member(tokens, i)
        i += 1


def _drop_qualified_member(tokens: TokenList, qualifier: int) -> int:
    """Returns the last token looked at."""
    before = tokens.before(qualifier)
    while tokens.text(before) in ("const", "noexcept"):
        before = tokens.before(before)
    after = tokens.after(qualifier)
    while tokens.text(after) in ("const", "noexcept"):
        after = tokens.after(after)
    if tokens.text(before) != ")" or tokens.text(after) not in ("{", ":", ";"):
        return qualifier
    end = after
    while tokens.text(end) not in ("{", ";"):
        end = tokens.after(end)
    if tokens.text(end) == "{":
        end = tokens.closing(end, "{", "}")
    start = _opening_parenthesis(tokens, before)
    while start >= 0 and tokens.text(start) not in (";", "{", "}"):
        start = tokens.before(start)
    tokens.blank(start + 1, end)
    return end


def _opening_parenthesis(tokens: TokenList, closing: int) -> int:
    """The token before the parenthesis that ``closing`` closes."""
    depth = 1
    i = tokens.before(closing)
    while depth:
        if tokens.text(i) == ")":
            depth += 1
        elif tokens.text(i) == "(":
            depth -= 1
        i = tokens.before(i)
    return i


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
