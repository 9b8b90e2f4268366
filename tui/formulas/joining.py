"""Parts of a formula in a row: the spaces between them, their scripts, and fractions on one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tui.formulas import symbols
from tui.formulas.boxes import Box, row, stack, text_box

_MARKS = r"[\u0300-\u036f\u20d0-\u20ff\u00b2\u00b3\u00b9\u2070-\u209c\u02b0-\u02ff\u1d2c-\u1d6a\u1d9b-\u1dbf\u2c7c\u2c7d′″‴°!]"
_CALL = r"(?:\([^()]*\))?"
_MARK_KINDS = ("open", "bin", "rel")
_ONE = re.compile(rf"\d+(?:[.,]\d+)?{_MARKS}*|[√∛∜]?[d∂Δδ]?[^\W\d_]{_MARKS}*{_CALL}|∞|\([^()]*\){_MARKS}*")
_PRODUCT = re.compile(rf"-?[^\s+\-±∓*/=<>≤≥,;:|→·×⋅∘(){{}}\[\]]+{_CALL}{_MARKS}*")


@dataclass(frozen=True)
class Atom:
    """A part of a row.

    Args:
        box: What is seen of it.
        kind: As TeX's: "ord", "op" (large), "fn" (a word), "bin", "rel", "open", "close"; "frac" is on one line, "tall"
            needs room at its sides, "space" is one, "text" brings its own.
        limits: Scripts stand above and below.
        up: The script above.
        down: The script below.
        spaced: The source has a space before it that TeX would not need.
        parted: The source has any space before it.
    """

    box: Box
    kind: str = "ord"
    limits: bool = False
    up: Box | None = None
    down: Box | None = None
    spaced: bool = False
    parted: bool = False

    @classmethod
    def of(cls, text: str) -> Atom:
        """An atom whose kind is that of its character."""
        kinds = {"rel": symbols.RELATIONS, "bin": symbols.BINARY, "open": symbols.OPEN, "close": symbols.CLOSE}
        kind = next((kind for kind, texts in kinds.items() if text in texts), "ord")
        is_arrow = "\u2190" <= text[:1] <= "\u21ff" or "\u27f0" <= text[:1] <= "\u27ff"
        return cls(text_box(text), "rel" if is_arrow else kind)


def joined(atoms: Sequence[Atom], is_tight: bool) -> Box:
    """Atoms in a row; ``is_tight`` leaves out the spaces that only make it look better."""
    boxes = []
    for n, atom in enumerate(atoms):
        gap = _gap(atoms, n, is_tight)
        boxes += [text_box(gap)] * bool(gap)
        box = _finished(atom)
        if atom.kind == "frac" and not (atom.up or atom.down) and _touches(atoms, n):
            box = row([text_box("("), box, text_box(")")])
        boxes.append(box)
    return row(boxes) if boxes else Box()


def _touches(atoms: Sequence[Atom], n: int) -> bool:
    """Whether a fraction on one line has a neighbour that would seem to be a part of it."""
    before = atoms[n - 1].kind if n else ""
    after = atoms[n + 1].kind if n + 1 < len(atoms) else ""
    return before in ("ord", "close", "frac", "fn") or after in ("ord", "open", "frac", "fn")


def _is_binary(atoms: Sequence[Atom], n: int) -> bool:
    is_between = 0 < n < len(atoms) - 1
    return (
        atoms[n].kind == "bin" and is_between and atoms[n - 1].kind not in ("bin", "rel", "open", "op", "fn", "space")
    )


def _is_word(atom: Atom) -> bool:
    return atom.kind in ("fn", "op") and atom.box.lines[atom.box.base].isascii()


def _edge(atom: Atom, at: int) -> str:
    """The first or the last character of words, which may be a space of their own."""
    return atom.box.lines[atom.box.base][at:][:1] if atom.kind == "text" else ""


def _gap(atoms: Sequence[Atom], n: int, is_tight: bool) -> str:
    """The space before an atom."""
    if not n:
        return ""
    before, atom = atoms[n - 1], atoms[n]
    kinds = {before.kind, atom.kind}
    has_own = "space" in kinds or _edge(before, -1) == " " or _edge(atom, 0) == " "
    if has_own or (before.kind == "open" and atom.kind != "open") or atom.kind == "close":
        return ""
    is_word = (_is_word(before) and atom.kind not in _MARK_KINDS) or (_is_word(atom) and before.kind not in _MARK_KINDS)
    if is_tight:
        return " " if is_word else ""
    if "rel" in kinds:
        return " " if kinds != {"rel"} or atom.parted else ""
    for at in (n, n - 1):
        if _is_binary(atoms, at):
            return " " if atoms[at].parted or atoms[at + 1].parted else ""
    is_sign = before.kind == "op" and not _is_word(before)
    is_large = is_sign or (atom.kind == "op" and before.kind not in _MARK_KINDS) or "tall" in kinds
    return " " if atom.spaced or is_word or is_large else ""


def _finished(atom: Atom) -> Box:
    """An atom with its scripts."""
    if atom.up is None and atom.down is None:
        return atom.box
    if atom.limits:
        boxes = [box for box in (atom.up, atom.box, atom.down) if box is not None]
        return stack(boxes, int(atom.up is not None))
    box = row([text_box("("), atom.box, text_box(")")]) if atom.kind == "frac" else atom.box
    return scripted(box, atom.up, atom.down)


def scripted(box: Box, up: Box | None, down: Box | None) -> Box:
    """A box with scripts beside it, at its corners if it is tall."""
    above = _script(up.text, symbols.SUPERSCRIPTS, "^") if up is not None else ""
    below = _script(down.text, symbols.SUBSCRIPTS, "_") if down is not None else ""
    if box.height == 1:
        return row([box, text_box(below + above)])
    column = [above, *[""] * (box.height - 2), below]
    return row([box, Box(tuple(column), box.base)])


def _script(text: str, letters: dict[str, str], mark: str) -> str:
    text = text.replace("∘", "°") if mark == "^" else text
    if all(letter in letters for letter in text):
        return "".join(letters[letter] for letter in text)
    if text in ("*", "∗", "†", "‡"):
        return text
    return f"{mark}{text}" if len(text) == 1 or re.fullmatch(r"\([^()]*\)", text) else f"{mark}({text})"


def over(above: Box, below: Box) -> Box:
    """A fraction on one line; brackets say what belongs to it."""
    top, bottom = above.text, below.text
    top = top if _PRODUCT.fullmatch(top) else f"({top})"
    return text_box(f"{top}/{bottom if _ONE.fullmatch(bottom) else f'({bottom})'}")


def rooted(box: Box, sign: str) -> Box:
    """A root; brackets say what belongs to it."""
    if box.height == 1 and _ONE.fullmatch(box.text):
        return row([text_box(sign), box])
    return row([text_box(f"{sign}("), box, text_box(")")])
