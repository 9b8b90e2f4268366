"""Blocks of an answer: code, tables and formulas, each as one widget."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_it.token import Token
from textual import events
from textual.app import ComposeResult
from textual.content import Content
from textual.geometry import Size
from textual.message import Message
from textual.selection import Selection
from textual.widgets import Label, Markdown, Static
from textual.widgets.markdown import MarkdownBlock, MarkdownFence

from tui.formulas.formula import shown
from tui.themes import PALE

SIGN = "↪ "  # before what did not fit into the line above
NARROWEST = 4  # cells of a table's column; with less room a table is a list


class CopyCode(Message):
    """The user clicked a code block's copy label."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code


class CopyLabel(Static):
    """What to click above a code block, beside its language."""

    def on_click(self, event: events.Click) -> None:
        event.stop()
        fence = self.parent
        if isinstance(fence, CodeBlock):
            self.post_message(CopyCode(fence.code))


class Code(Label):
    """Highlighted code; what does not fit into a line goes on in the next after a sign."""

    _kept: tuple[Content, int, Content] | None = None  # while an answer grows all of it is laid out again and again

    def render(self) -> Content:
        return self._folded(self.content_size.width)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return self._folded(width).plain.count("\n") + 1

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The code that is selected on the screen, without signs."""
        found = super().get_selection(selection)
        return (found[0].replace(f"\n{SIGN}", ""), found[1]) if found is not None else None

    def _folded(self, width: int) -> Content:
        content = super().render()
        assert isinstance(content, Content)
        if self._kept is None or self._kept[0] is not content or self._kept[1] != width:
            self._kept = content, width, folded(content.expand_tabs(), width)
        return self._kept[2]


def folded(content: Content, width: int) -> Content:
    """Lines of at most so many cells, those that go on with a sign."""
    if width <= len(SIGN) + 2 or content.get_optimal_width({}, 0) <= width:
        return content
    sign = Content.styled(SIGN, PALE)
    lines: list[Content] = []
    for line in content.split("\n", allow_blank=True):
        if line.cell_length > width:
            first, *more = line.fold(width)
            lines.append(first)
            lines += [sign + part for part in Content("").join(more).fold(width - len(SIGN))] if more else []
        else:
            lines.append(line)
    return Content("\n").join(lines)


class CodeBlock(MarkdownFence):
    """A code block with its language and a label that copies it."""

    def __init__(self, markdown: Markdown, token: Token, code: str) -> None:
        token.info = (token.info.split() or ["text"])[0].strip("{}.") or "text"
        super().__init__(markdown, token, code)

    def compose(self) -> ComposeResult:
        yield CopyLabel(self._title, classes="copy", markup=False)
        yield Code(self._highlighted_code, id="code-content")

    @property
    def _title(self) -> str:
        return f"{self.lexer} · copy"

    def set_content(self, content: Content) -> None:
        """Show other code, and its language, of which the first letters may have come alone."""
        super().set_content(content)
        for label in self.query(CopyLabel):
            label.update(self._title)


class Table(MarkdownBlock):
    """A table as wide as its content, in lines of text."""

    def __init__(self, markdown: Markdown, token: Token) -> None:
        super().__init__(markdown, token)
        self._cells: list[list[Content]] = [[]]
        self._aligns: list[str] = []
        self._marks: tuple[int, Sequence[tuple[str, int, int]]] = (0, ())
        self._kept: tuple[int, Content] | None = None

    def compose(self) -> ComposeResult:
        self._take(self)
        return iter(())

    async def _update_from_block(self, block: MarkdownBlock) -> None:
        if isinstance(block, Table):
            self._take(block)
            self.refresh(layout=True)
        else:
            await super()._update_from_block(block)

    def render(self) -> Content:
        drawn, (width, marks) = self.drawn(), self._marks
        for style, start, end in marks if width == self.content_size.width else ():
            drawn = drawn.stylize(style, start, end)
        return drawn

    def drawn(self) -> Content:
        """The table at its present width, without marks."""
        return self._drawn(self.content_size.width)

    def mark(self, marks: Sequence[tuple[str, int, int]]) -> None:
        """Show styles at places of what is drawn, as long as the width stays."""
        self._marks = (self.content_size.width, marks)
        self.refresh()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return self._drawn(width).plain.count("\n") + 1

    def _take(self, block: MarkdownBlock) -> None:
        cells = [line._blocks for part in block._blocks for line in part._blocks]  # of head and body
        self._cells = [[cell._content for cell in line] for line in cells]
        styles = [str(cell._token.attrs.get("style", "")) for cell in cells[0]]
        self._aligns = [style.rpartition(":")[2] for style in styles]
        block._blocks.clear()
        self._kept = None

    def _drawn(self, width: int) -> Content:
        if self._kept is None or self._kept[0] != width:
            head, *rows = self._cells
            self._kept = width, drawn_table([cell.stylize("bold") for cell in head], rows, self._aligns, width)
        return self._kept[1]


def drawn_table(
    headers: Sequence[Content], rows: Sequence[Sequence[Content]], aligns: Sequence[str], width: int
) -> Content:
    """A table in so many cells; where columns would be too narrow, a line for each cell."""
    columns = list(zip(headers, *rows, strict=False))
    natural = [
        max(max(1, *(part.cell_length for part in cell.split("\n", allow_blank=True))) for cell in c) for c in columns
    ]
    room = width - 3 * len(natural) + 1
    most = next((n for n in range(max(natural, default=0), 0, -1) if sum(min(w, n) for w in natural) <= room), 0)
    if most < min(NARROWEST, max(natural, default=0)):
        lines = [Content(": ").join([h, cell]) for row in rows for h, cell in zip(headers, row, strict=False)]
        return Content("\n").join(lines or headers)
    widths = [min(w, most) for w in natural]
    grey = "$text 40%"
    rule = Content.styled("┼".join("─" * (w + 2) for w in widths), grey)
    lines = [*_row(headers, widths, aligns), rule]
    for n, row in enumerate(rows):
        shown_row = _row(row, widths, aligns)
        if n and max(natural) > most:  # cells of several lines need something between them
            lines.append(Content.styled("┼".join("╌" * (w + 2) for w in widths), grey))
        lines += shown_row
    return Content("\n").join(lines)


def _row(cells: Sequence[Content], widths: Sequence[int], aligns: Sequence[str]) -> list[Content]:
    wrapped = [cell.wrap(width) for cell, width in zip(cells, widths, strict=False)]
    bar = Content.styled(" │ ", "$text 40%")
    found = []
    for y in range(max(map(len, wrapped), default=0)):
        parts = []
        for lines, width, align in zip(wrapped, widths, aligns, strict=False):
            part = lines[y].rstrip() if y < len(lines) else Content("")
            room = max(width - part.cell_length, 0)
            left = {"right": room, "center": room // 2}.get(align, 0)
            parts.append(part.pad(left, room - left))
        found.append(Content(" ") + bar.join(parts))
    return found


class Formula(MarkdownBlock):
    """A formula set apart: in two dimensions, on lines that wrap where those are too wide, or its source."""

    def __init__(self, markdown: Markdown, token: Token) -> None:
        super().__init__(markdown, token)
        self._take(token)

    def _take(self, token: Token) -> None:
        lines = shown(token.content, True)
        flat = "\n".join(shown(token.content))
        self._flat = Content(flat) if flat else Content.styled(token.meta["source"], ".code_inline")
        self._tall = Content("\n".join(lines)) if lines else self._flat

    async def _update_from_block(self, block: MarkdownBlock) -> None:
        if isinstance(block, Formula):
            self._take(block._token)
            self.refresh(layout=True)
        else:
            await super()._update_from_block(block)

    def render(self) -> Content:
        return self._form(self.content_size.width)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return self._form(width).get_height({}, width)

    def _form(self, width: int) -> Content:
        return self._tall if self._tall.get_optimal_width({}, 0) <= width else self._flat
