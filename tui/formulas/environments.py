"""Matrices, cases and aligned lines of a formula."""

from __future__ import annotations

from collections.abc import Sequence

from tui.formulas.boxes import Box, UnshownError, bracketed, grid, row, stack, text_box

MATRICES = {
    "matrix": "  ", "pmatrix": "()", "bmatrix": "[]", "Bmatrix": "{}", "vmatrix": "||", "Vmatrix": "‖‖",
    "smallmatrix": "  ", "psmallmatrix": "()", "bsmallmatrix": "[]", "array": "  ",
}  # fmt: skip
CASES = {"cases": "{ ", "dcases": "{ ", "rcases": " }"}
ALIGNED = frozenset(["align", "aligned", "alignat", "alignedat", "flalign", "split", "eqnarray"])
CENTRED = frozenset(["gather", "gathered", "multline", "equation", "displaymath", "math"])
NAMES = ALIGNED | CENTRED | MATRICES.keys() | CASES.keys()
Rows = Sequence[Sequence[Box]]


def drawn(name: str, rows: Rows, columns: str, is_flat: bool) -> Box:
    """An environment, without a star in its name; ``columns`` are an array's alignments."""
    if is_flat:
        return _on_one_line(name, rows)
    if name in MATRICES:
        before, after = map(str.strip, MATRICES[name])
        return bracketed(before, grid(rows, "".join(c for c in columns if c in "lcr") or "c"), after)
    if name in CASES:
        before, after = map(str.strip, CASES[name])
        gaps = [text_box(" " if side else "") for side in (before, after)]
        return bracketed(before, row([gaps[0], grid(rows, "l"), gaps[1]]), after)
    if name in ALIGNED:
        return grid(rows, "rl", (" ", "    "))
    return stack([row(cells) for cells in rows], (len(rows) - 1) // 2, "c" if name.startswith("g") else "l")


def _on_one_line(name: str, rows: Rows) -> Box:
    lines = (" ".join(filter(None, (cell.text.strip() for cell in cells))) for cells in rows)
    inner = "; ".join(filter(None, lines))
    if not inner:
        raise UnshownError
    before, after = map(str.strip, {**MATRICES, **CASES}.get(name, "  "))
    if name in MATRICES and not before:
        before, after = "(", ")"
    return text_box(f"{before}{inner}{after}" if name in MATRICES else f"{before} {inner} {after}".strip())
