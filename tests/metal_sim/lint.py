"""Rules of Metal that clang does not enforce: names that do not exist, and pointers without an address space."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from metal_kernels.twin.tokens import tokenize

VECTOR_ELEMENTS = [
    *("float", "half", "bfloat", "bool"),
    *("int", "short", "char", "long"),
    *("uint", "ushort", "uchar", "ulong"),
]
VECTORS = frozenset(t + n for t in VECTOR_ELEMENTS for n in "234")
SCALARS = frozenset(
    [
        "float",
        "half",
        "bfloat",
        "int",
        "uint",
        "short",
        "ushort",
        "char",
        "uchar",
        "long",
        "ulong",
        "bool",
        "size_t",
        "void",
        "unsigned",
        "signed",
    ]
) | {"bfloat16_t", "float16_t"}
INTEGERS = frozenset(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64))
NOT_IN_METAL = frozenset(
    ["double", "goto", "try", "catch", "throw", "new", "delete", "virtual", "dynamic_cast", "typeid", "std"]
)
NOT_TYPES = frozenset(["const", "constexpr", "static", "volatile", "inline"])
# A program-scope statement with one of these before its '=' declares no variable.
NOT_VARIABLES = frozenset({"constant", "using", "template", "operator", "#", "("})

# Metal documents no limit; C++ asks a compiler to tell names apart by no more characters.
LONGEST_NAME = 1024


@dataclass(frozen=True)
class Word:
    """A code token and its line."""

    text: str
    kind: str
    line: int


def lint(source: str, file: str, template_types: Iterable[str] = ()) -> list[str]:
    """Messages "file:line: what" for breaches; ``template_types`` are names that the caller's template binds to types."""
    words = _words(source)
    types = SCALARS | INTEGERS | VECTORS | set(template_types) | _declared_types(words)
    found = [*_unknown_names(words), *_bare_pointers(words, types), *_program_variables(words)]
    return [f"{file}:{line}: {message}" for line, message in sorted(found)]


def lint_name(function: str) -> list[str]:
    """Why a pipeline cannot have this name, which MLX makes of the kernel's name, its template's values and types."""
    found = []
    if not re.fullmatch(r"[A-Za-z_]\w*", function, re.ASCII):
        found.append(f"{function!r} is not a name that a Metal function can have")
    if len(function) > LONGEST_NAME:
        found.append(f"a function's name of {len(function)} characters is too long: {function[:60]}...")
    return found


def _words(source: str) -> list[Word]:
    words = []
    line = 1
    for token in tokenize(source):
        if token.is_code:
            words.append(Word(token.text, token.kind, line))
        line += token.text.count("\n")
    return words


def _declared_types(words: list[Word]) -> set[str]:
    return {b.text for a, b in pairwise(words) if a.text in ("typename", "struct", "class") and b.kind == "name"}


def _unknown_names(words: list[Word]) -> list[tuple[int, str]]:
    found = [(w.line, f"'{w.text}' does not exist in Metal") for w in words if w.text in NOT_IN_METAL]
    for a, b in pairwise(words):
        if a.text == "long" and b.text == "long":
            found.append((a.line, "'long long' does not exist in Metal"))
    return found


def _bare_pointers(words: list[Word], types: set[str]) -> list[tuple[int, str]]:
    """Pointer and reference declarators whose type names no address space."""
    found = []
    start = 0
    for i, word in enumerate(words[:-1]):
        if word.text in (";", "{", "}", "(", ","):
            start = i + 1
        if word.text not in ("*", "&") or i == 0 or words[i - 1].text in ("*", "&"):
            continue
        after = words[i + 1]
        if after.text == "&" or not (after.kind == "name" or after.text in (")", ",", ">")):
            continue
        declared = [w.text for w in words[start:i]]
        core = [t for t in declared if t not in NOT_TYPES]
        if core and all(t in types for t in core):
            spaces = "device, constant, threadgroup or thread"
            found.append((word.line, f"'{' '.join(declared)}{word.text}' needs an address space ({spaces})"))
    return found


def _program_variables(words: list[Word]) -> list[tuple[int, str]]:
    """Variables outside of functions that are not in the constant address space."""
    found = []
    braces = parentheses = 0
    start = 0
    for i, word in enumerate(words):
        if word.text == "{" and "namespace" not in [w.text for w in words[max(0, i - 12) : i]]:
            braces += 1
        elif word.text == "}":
            braces = max(0, braces - 1)
        elif word.text == "(":
            parentheses += 1
        elif word.text == ")":
            parentheses -= 1
        elif word.text == "=" and braces == 0 and parentheses == 0:
            statement = {w.text for w in words[start:i]}
            if not statement & NOT_VARIABLES:
                found.append((word.line, "a program-scope variable must be in the constant address space"))
        if word.text in (";", "{", "}"):
            start = i + 1
    return found
