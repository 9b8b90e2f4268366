"""Turns Metal source into CUDA, token by token; every line keeps its number.

Only spellings are changed: what a name means is settled by the shim headers and the compiler behind them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from metal_kernels.twin.attributes import ADDRESS_SPACES, CPP_ATTRIBUTES, METAL_ATTRIBUTES
from metal_kernels.twin.declarations import rewrite_array_parameters, rewrite_threadgroup_variables
from metal_kernels.twin.overloads import drop_address_space_twins
from metal_kernels.twin.tokens import NEWLINE, RewriteError, TokenList


@functools.lru_cache(maxsize=64)  # variants of a kernel share most of their text
def rewrite(source: str, file: str) -> str:
    """Metal text as CUDA; ``file`` is its name in messages.

    Raises RewriteError for an unknown attribute or an unbalanced bracket.
    """
    tokens = TokenList(source, file)
    drop_attributes(tokens)
    rewrite_threadgroup_variables(tokens, _shared_variable)
    drop_address_space_twins(tokens)
    rewrite_array_parameters(tokens)
    rewrite_literals(tokens)
    _drop_qualifiers(tokens)
    return str(tokens)


def _shared_variable(type_: str, name: str, shape: str, is_zeroed: bool) -> str:
    if is_zeroed:
        raise RewriteError(f"threadgroup variable '{name}' has an initialiser, which CUDA's __shared__ cannot have")
    return f"__shared__ __align__(16) {type_} {name}{shape};"  # as Apple aligns it, whatever the type


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


def drop_attributes(tokens: TokenList, instead: Callable[[list[str], int, int], str] = lambda *_: "") -> None:
    """Remove Metal's [[attributes]]; ``instead``: what takes the place of one, by its names, first and last token."""
    i = 0
    while i < len(tokens):
        if tokens.text(i) == "[" and tokens.text(i + 1) == "[" and tokens.text(tokens.before(i)) != "[":
            end = tokens.closing(i, "[", "]")
            names = _attribute_names(tokens, i + 2, end - 1)
            if names and names[0] not in CPP_ATTRIBUTES and tokens.text(end - 1) == "]":
                unknown = [n for n in names if n not in METAL_ATTRIBUTES]
                if unknown:
                    raise RewriteError(f"{tokens.file}:{tokens.line(i)}: unknown Metal attribute {unknown[0]!r}")
                text = instead(names, i, end)
                tokens.blank(i, end)
                if text:
                    tokens.replace(i, text + "".join(NEWLINE.findall(tokens.text(i))), "op")
            i = end
        i += 1


def rewrite_literals(tokens: TokenList) -> None:
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
