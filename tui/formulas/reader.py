"""The structure of a formula in LaTeX: groups, scripts, rows and cells; `tui.formulas.formula` adds the commands."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from tui.formulas.boxes import Box, UnshownError, row, text_box
from tui.formulas.environments import ALIGNED, CENTRED, NAMES, drawn
from tui.formulas.joining import Atom, joined

DEEPEST = 40  # groups in each other
TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|%[^\n]*(?:\n\s*)?|\s+|.", re.DOTALL)
_ENDS = frozenset(("}", "&", r"\\", r"\right", r"\middle", r"\end", r"\cr"))
_PRIMES = frozenset("′″‴")


class Style(NamedTuple):
    """How a part is drawn: ``is_flat`` on one line, ``is_tight`` without optional spaces, ``is_display`` with tall fractions."""

    is_flat: bool = True
    is_tight: bool = False
    is_display: bool = False

    @property
    def inner(self) -> Style:
        """Of numerators and cells: fractions in them are on one line."""
        return self._replace(is_display=False)


SCRIPT = Style(is_tight=True)


class Reader:
    """Reads one formula from its start to its end; every method goes on where the last one ended.

    Args:
        tex: The formula.
        depth: Of the groups around it.
    """

    def __init__(self, tex: str, depth: int = 0) -> None:
        self._tokens = [t for t in TOKEN.findall(tex) if t[0] != "%"]
        self._at, self._depth = 0, depth

    @property
    def token(self) -> str | None:
        """The next token, or None at the end."""
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def next(self) -> str:
        """Take the next token."""
        if self._at == len(self._tokens):
            raise UnshownError
        self._at += 1
        return self._tokens[self._at - 1]

    def skip(self, token: str) -> bool:
        """Take a token if it comes next, spaces before it included."""
        start = self._at
        self._skip_spaces()
        if self.token != token:
            self._at = start
            return False
        self._at += 1
        return True

    def expect(self, token: str) -> None:
        if not self.skip(token):
            raise UnshownError

    def rows(self, name: str, style: Style, columns: str = "") -> Box:
        """Rows of cells up to what cannot belong to them, drawn as an environment."""
        inner = style if name in ALIGNED | CENTRED else style.inner
        found, is_more = [[self.row(inner)]], True
        while is_more:
            if self.skip("&"):
                found[-1].append(self.row(inner))
            elif self.skip(r"\\") or self.skip(r"\cr"):
                self.skip("*")
                if self.token == "[":
                    self.option(inner)
                found.append([self.row(inner)])
            else:
                is_more = False
        if len(found) > 1 and not any(cell.width for cell in found[-1]):
            found.pop()
        return (
            found[0][0]
            if len(found) == len(found[0]) == 1 and name == "aligned"
            else drawn(name, found, columns, style.is_flat)
        )

    def environment(self, style: Style) -> Atom:
        r"""The rest of ``\begin{name} ... \end{name}``."""
        full = self.raw()
        name = full.removesuffix("*")
        if name not in NAMES:
            raise UnshownError
        if self.token == "[":
            self.option(style)
        columns = self.raw() if name in ("array", "alignat", "alignedat") else ""
        self._enter()
        box = self.rows(name, style, columns)
        self._depth -= 1
        self.expect(r"\end")
        if self.raw() != full:
            raise UnshownError
        return Atom(box)

    def row(self, style: Style, stop: str = "") -> Box:
        """Everything up to what cannot belong to it, such as a closing brace, or up to the token ``stop``."""
        self._enter()
        atoms: list[Atom] = []
        is_after_command = False
        while True:
            parted = self._skip_spaces()
            token = self.token
            if token is None or token in _ENDS or token == stop:
                break
            self._at += 1
            if token in ("^", "_", "'"):
                self._script(token, atoms, style)
            elif (found := self._atom(token, style)) is not None:
                atoms.append(replace(found, spaced=parted and not is_after_command, parted=parted))
            last = self._tokens[self._at - 1]
            is_after_command = last[0] == "\\" and last[1:].isalpha()
        self._depth -= 1
        return joined(atoms, style.is_tight)

    def argument(self, style: Style) -> Box:
        """A group in braces, or one token."""
        self._skip_spaces()
        token = self.next()
        if token in _ENDS or token in ("^", "_", "'"):
            raise UnshownError
        self._enter()
        atom = self._atom(token, style)
        self._depth -= 1
        return joined([atom], style.is_tight) if atom is not None else self.argument(style)

    def option(self, style: Style) -> Box | None:
        """An argument in square brackets, if there is one."""
        if not self.skip("["):
            return None
        box = self.row(style, stop="]")
        self.expect("]")
        return box

    def raw(self) -> str:
        """The source of an argument in braces."""
        self.expect("{")
        level, start = 1, self._at
        while level:
            level += {"{": 1, "}": -1}.get(self.next(), 0)
        return "".join(self._tokens[start : self._at - 1])

    def inside(self, tex: str, style: Style) -> Box:
        """Another formula inside this one."""
        reader = type(self)(tex, self._depth + 1)
        box = reader.row(style)
        if reader.token is not None:
            raise UnshownError
        return box

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise UnshownError

    def _skip_spaces(self) -> bool:
        start = self._at
        while (token := self.token) is not None and token.isspace():
            self._at += 1
        return self._at > start

    def _script(self, mark: str, atoms: list[Atom], style: Style) -> None:
        """Give the last atom a script; a formula may begin with one."""
        if not atoms or atoms[-1].kind == "space":
            atoms.append(Atom(Box()))
        last = atoms[-1]
        if mark == "'":
            primes = (last.up.text if last.up is not None else "") + "′"
            primes = primes.replace("″′", "‴").replace("′′", "″")
            atoms[-1] = replace(last, up=text_box(primes))
            return
        before = last.up if mark == "^" else last.down
        if before is not None and not (mark == "^" and set(before.text) <= _PRIMES):
            raise UnshownError
        script = self.argument(style.inner._replace(is_tight=True) if last.limits else SCRIPT)
        if before is not None:
            script = row([before, script])
        atoms[-1] = replace(last, up=script) if mark == "^" else replace(last, down=script)

    def _atom(self, token: str, style: Style) -> Atom | None:
        """What a token begins; None if it is nothing to be seen."""
        if token == "{":
            box = self.row(style)
            self.expect("}")
            return Atom(box)
        if token in ("$", "\\"):
            raise UnshownError
        if token == "~":
            return Atom(text_box(" "), "space")
        return self.command(token[1:], style) if token[0] == "\\" else Atom.of(token)

    def command(self, name: str, style: Style) -> Atom | None:
        """What a command is, its arguments included; None if it is nothing to be seen."""
        raise NotImplementedError
