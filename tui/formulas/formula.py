"""A formula in LaTeX as text.

In a line of text it is linear: ``(a + b)/2``, ``x²``, ``(1 2; 3 4)``. Set apart it has fractions, limits and matrices in two
dimensions. What cannot be shown in full is not shown at all: nothing of a formula is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar

from ring_mlx import harmless
from tui.formulas import symbols
from tui.formulas.boxes import Box, UnshownError, bracket, bracketed, framed, row, stack, text_box
from tui.formulas.joining import Atom, over, rooted, scripted
from tui.formulas.reader import SCRIPT, TOKEN, Reader, Style

LONGEST = 4000  # letters of a formula that is shown
Handler = Callable[["Formula", str, Style], Atom | None]


@lru_cache(maxsize=2048)
def shown(tex: str, is_display: bool = False) -> tuple[str, ...]:
    """A formula without its delimiters as lines of text, one line unless ``is_display``; none if it cannot be shown."""
    if len(tex) > LONGEST:
        return ()
    try:
        reader = Formula(tex)
        box = reader.rows("aligned", Style(is_flat=not is_display, is_display=is_display))
        if reader.token is not None:
            return ()
    except UnshownError:
        return ()
    lines = tuple(harmless(line.rstrip(), is_name=True) for line in box.lines)
    return lines if any(map(str.strip, lines)) else ()


class Formula(Reader):
    """A reader that knows the commands."""

    HANDLERS: ClassVar[dict[str, Handler]] = {}

    def command(self, name: str, style: Style) -> Atom | None:
        if name in symbols.IGNORED:
            return None
        if name in self.HANDLERS:
            return self.HANDLERS[name](self, name, style)
        if name in symbols.SPACES or name.isspace():
            return Atom(text_box(symbols.SPACES.get(name, " ")), "space")
        if (text := symbols.symbol(name)) is None:
            raise UnshownError
        if name in symbols.OPERATORS | symbols.FUNCTIONS:
            has_limits = name in symbols.LIMITS and style.is_display
            return Atom(text_box(text), "op" if name in symbols.OPERATORS | symbols.LIMITS else "fn", has_limits)
        return Atom(text_box(text), "rel") if name in ("mid", "bmod") else Atom.of(text)

    def text(self, name: str, style: Style) -> Atom:
        """Words; dollars in them enclose formulas."""
        boxes = []
        for n, part in enumerate(re.split(r"(?<!\\)\$", self.raw())):
            boxes.append(self.inside(part, style) if n % 2 else text_box(self._words(part)))
        return Atom(row(boxes), "text")

    def _words(self, tex: str) -> str:
        words = []
        for token in TOKEN.findall(re.sub(r"\\[()]", "", tex)):
            if token[0] != "\\":
                words.append({"{": "", "}": "", "~": " "}.get(token, re.sub(r"\s+", " ", token)))
            elif token[1:] not in symbols.TEXTS:
                text = symbols.SPACES.get(token[1:], symbols.symbol(token[1:]))
                if text is None:
                    raise UnshownError
                words.append(text)
        return "".join(words)

    def accent(self, name: str, style: Style) -> Atom:
        mark = symbols.ACCENTS[name]
        box = text_box("".join(f"{letter}{mark}" for letter in self.argument(SCRIPT).text))
        return Atom.of(box.text) if name == "not" else Atom(box)

    def alphabet(self, name: str, style: Style) -> Atom:
        return Atom(text_box("".join(symbols.styled(name, letter) for letter in self.argument(SCRIPT).text)))

    def roman(self, name: str, style: Style) -> Atom:
        self.skip("*")
        box = self.argument(style._replace(is_tight=True))
        return Atom(
            box, "fn" if name.startswith("operatorname") else "ord", name == "operatorname" and style.is_display
        )

    def fraction(self, name: str, style: Style) -> Atom:
        is_tall = style.is_display or (name in ("dfrac", "cfrac") and not style.is_flat)
        inner = style if name == "cfrac" else style.inner
        above, below = self.argument(inner), self.argument(inner)
        if not is_tall:
            return Atom(over(above, below), "frac")
        bar = text_box("─" * (max(above.width, below.width) + 2))
        return Atom(stack([above, bar, below], 1), "tall")

    def binomial(self, name: str, style: Style) -> Atom:
        above, below = self.argument(style.inner), self.argument(style.inner)
        if style.is_display or (name == "dbinom" and not style.is_flat):
            return Atom(bracketed("(", stack([above, below], 0), ")"))
        return Atom(text_box(f"C({above.text}, {below.text})"))

    def root(self, name: str, style: Style) -> Atom:
        degree, box = self.option(SCRIPT), self.argument(style)
        if degree is None:
            return Atom(rooted(box, "√"))
        sign = {"2": "√", "3": "∛", "4": "∜"}.get(degree.text)
        return Atom(rooted(box, sign or f"{scripted(Box(), degree, None).text}√"))

    def boxed(self, name: str, style: Style) -> Atom:
        box = self.argument(style)
        return Atom(text_box(f"[{box.text}]")) if style.is_flat else Atom(framed(box), "tall")

    def left(self, name: str, style: Style) -> Atom:
        signs, parts = [self._delimiter()], [self.row(style)]
        while self.skip(r"\middle"):
            signs.append(self._delimiter())
            parts.append(self.row(style))
        self.expect(r"\right")
        signs.append(self._delimiter())
        like = row(parts)
        boxes = [bracket(signs[0], like)]
        for part, sign in zip(parts, signs[1:], strict=True):
            boxes += [part, bracket(sign, like)]
        return Atom(row(boxes))

    def _delimiter(self) -> str:
        self.skip(" ")
        token = self.next()
        text = symbols.symbol(token[1:]) if token[0] == "\\" else "" if token == "." else token
        if text is None or len(text) > 1 or text.isspace():
            raise UnshownError
        return text

    def begin(self, name: str, style: Style) -> Atom:
        return self.environment(style)

    def above_or_below(self, name: str, style: Style) -> Atom:
        r"""``\overset{a}{=}``, also below, and ``\xrightarrow{a}``."""
        option = self.option(SCRIPT) if name in symbols.LONG_ARROWS else None
        script = self.argument(SCRIPT)
        if name in symbols.LONG_ARROWS:
            arrow = symbols.LONG_ARROWS[name]
            length = max(script.width, option.width if option else 0) + 1 if style.is_display else 0
            return Atom(
                text_box("─" * length + arrow), "rel", style.is_display, script if script.width else None, option
            )
        base = self.argument(style)
        up, down = (None, script) if name == "underset" else (script, None)
        kind = Atom.of(base.text).kind if base.height == 1 else "ord"
        return Atom(base, kind, style.is_display, up, down)

    def brace(self, name: str, style: Style) -> Atom:
        box = self.argument(style)
        if not style.is_display:
            return Atom(box if box.width == 1 else bracketed("(", box, ")"))
        is_over = name.startswith("over")
        left, centre, right = "╭┴╮" if is_over else "╰┬╯"
        side = max(box.width - 3, 0)
        line = text_box(f"{left}{'─' * (side // 2)}{centre}{'─' * (side - side // 2)}{right}")
        return Atom(stack([line, box] if is_over else [box, line], int(is_over)), "tall", limits=True)

    def substack(self, name: str, style: Style) -> Atom:
        self.expect("{")
        box = self.rows("gathered", style)
        self.expect("}")
        return Atom(box)

    def modulus(self, name: str, style: Style) -> Atom:
        return Atom(text_box(f" (mod {self.argument(style.inner).text})"), "text")

    def tag(self, name: str, style: Style) -> Atom:
        self.skip("*")
        return Atom(text_box(f"    ({self._words(self.raw())})"), "text")

    def hidden(self, name: str, style: Style) -> Atom | None:
        """A label, a colour, or a space of some size."""
        self.skip("*")
        self.raw()
        return Atom(text_box(" "), "space") if name in ("hspace", "hskip") else None

    def coloured(self, name: str, style: Style) -> Atom:
        self.raw()
        return Atom(self.argument(style))

    def phantom(self, name: str, style: Style) -> Atom:
        return Atom(text_box(" " * self.argument(style).width), "space")


_NAMES: dict[Handler, str] = {
    Formula.text: " ".join(symbols.TEXTS),
    Formula.accent: " ".join(symbols.ACCENTS),
    Formula.alphabet: " ".join(symbols.ALPHABETS),
    Formula.roman: "mathrm operatorname operatornamewithlimits mathup",
    Formula.fraction: "frac dfrac tfrac cfrac",
    Formula.binomial: "binom dbinom tbinom",
    Formula.root: "sqrt",
    Formula.boxed: "boxed fbox",
    Formula.left: "left",
    Formula.begin: "begin",
    Formula.above_or_below: "overset stackrel underset " + " ".join(symbols.LONG_ARROWS),
    Formula.brace: "overbrace underbrace overbracket underbracket",
    Formula.substack: "substack",
    Formula.modulus: "pmod pod",
    Formula.tag: "tag",
    Formula.hidden: "label hspace color",
    Formula.coloured: "textcolor colorbox",
    Formula.phantom: "phantom hphantom",
}
Formula.HANDLERS.update({name: handler for handler, names in _NAMES.items() for name in names.split()})
