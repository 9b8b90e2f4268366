"""Definitions that differ only in address spaces: where a target has no such spaces, one of them has to go."""

from __future__ import annotations

from metal_kernels.twin.attributes import ADDRESS_SPACES
from metal_kernels.twin.tokens import TokenList

NOT_IN_KEY = ADDRESS_SPACES | {"thread", "METAL_FUNC", "inline", "constexpr"}


def drop_address_space_twins(tokens: TokenList) -> None:
    """Of definitions in one scope that are equal but for their address spaces, keep the first."""
    scopes: list[dict[str, bool]] = [{}]
    i = 0
    while i < len(tokens):
        if tokens.is_code(i) and tokens.text(i) == "{":
            start = _definition_start(tokens, i)
            head = [tokens.text(k) for k in range(start + 1, i) if tokens.is_code(k)]
            seen = scopes[-1]
            if _is_definition(head):
                has_space = any(x in ADDRESS_SPACES or x == "thread" for x in head)
                key = _definition_key(head)
                if key in seen and (has_space or seen[key]):
                    i = _drop_definition(tokens, start, i, head) + 1
                    continue
                seen[key] = has_space
            scopes.append({})
        elif tokens.is_code(i) and tokens.text(i) == "}" and len(scopes) > 1:
            scopes.pop()
        i += 1


def _definition_start(tokens: TokenList, brace: int) -> int:
    """The token before the head of the definition whose body opens at ``brace``."""
    i = tokens.before(brace)
    depth = 0
    while i >= 0:
        text = tokens.text(i)
        if text in (")", "]"):
            depth += 1
        elif text in ("(", "["):
            depth -= 1
        elif depth <= 0 and (text in (";", "{", "}") or _is_access_label(tokens, i)):
            break
        i = tokens.before(i)
    return i


def _is_access_label(tokens: TokenList, colon: int) -> bool:
    return tokens.text(colon) == ":" and tokens.text(tokens.before(colon)) in ("public", "private", "protected")


def _is_type(head: list[str]) -> bool:
    return any(x in ("struct", "class") for x in head) and "(" not in head


def _is_definition(head: list[str]) -> bool:
    return ")" in head or (_is_type(head) and "<" in head[1:])


def _definition_key(head: list[str]) -> str:
    """The head without address spaces and, for a constructor, without its initialisers."""
    if not _is_type(head) and ":" in head:
        for i in range(1, len(head)):
            before = head[:i]
            if head[i] == ":" and before.count("(") == before.count(")") and ")" in before:
                head = before
                break
    return " ".join(x for x in head if x not in NOT_IN_KEY)


def _drop_definition(tokens: TokenList, start: int, brace: int, head: list[str]) -> int:
    """Remove the definition; returns its closing brace."""
    closing = tokens.closing(brace, "{", "}")
    end = closing
    if _is_type(head) and tokens.text(tokens.after(closing)) == ";":
        end = tokens.after(closing)
    tokens.blank(start + 1, end)
    return closing
