"""Markdown whose code blocks can be copied, and whose formulas are shown as such."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from time import perf_counter

from markdown_it import MarkdownIt
from markdown_it.token import Token
from textual.await_complete import AwaitComplete
from textual.geometry import Size
from textual.widgets import Markdown
from textual.widgets.markdown import MarkdownBlock, MarkdownStream

from ring_mlx import harmless
from tui.formulas.markdown import add_formulas
from tui.widgets.blocks import CodeBlock, CopyCode, CopyLabel, Formula, Table

__all__ = ["Answer", "CodeBlock", "CopyCode", "CopyLabel", "parser"]

Block = tuple[MarkdownBlock, str]  # and its source
IN_PLACE = (Markdown.BLOCKS["paragraph_open"], CodeBlock, Formula, Table)


def parser() -> MarkdownIt:
    """Textual's Markdown parser, with formulas; characters written as ``&#x202e;`` are made visible, and so are HTML's tags.

    A reference (``[1]: address``) is text: it might come long after what refers to it.
    """
    found = MarkdownIt("gfm-like").disable(["html_block", "html_inline", "reference"])
    add_formulas(found)
    found.core.ruler.push("harmless", lambda state: _make_harmless(state.tokens))
    return found


def _make_harmless(tokens: Iterable[Token]) -> None:
    for token in tokens:
        token.type = "text" if token.type == "math_inline" else token.type  # where links are no longer looked for
        token.content = harmless(token.content)
        token.attrs = {name: harmless(v) if isinstance(v, str) else v for name, v in token.attrs.items()}
        _make_harmless(token.children or ())


def open_from(starts: Sequence[int], whole: int) -> int:
    """The line from which on more text may change what is shown.

    It is where the last block begins that begins in one of the ``whole`` lines: a line that still grows may yet become a
    part of it. ``starts`` are the blocks' lines in the order shown; what is hoisted out of a block (a rule in a list)
    comes before it.
    """
    return next((line for line in reversed(starts) if line < whole), 0)


class Stream(MarkdownStream):
    """Leaves as much time to keys as it takes to show the text."""

    async def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            while await self._new_markup.wait():
                started = perf_counter()
                self._new_markup.clear()
                await asyncio.shield(self._show())
                await self.markdown_widget.wait_for_refresh()
                await asyncio.sleep(perf_counter() - started)
        await self._show()

    def _show(self) -> AwaitComplete:
        text = "".join(self._pending)
        self._pending.clear()
        return self.markdown_widget.append(text)


class Answer(Markdown):
    """An answer's text.

    Args:
        text: Markdown.
        classes: Of its style.
    """

    BLOCKS = {**Markdown.BLOCKS, "fence": CodeBlock, "code_block": CodeBlock, "table_open": Table}  # noqa: RUF012 as Textual declares it

    def __init__(self, text: str, classes: str | None = None) -> None:
        super().__init__(harmless(text), classes=classes, parser_factory=parser)
        self._settled = 0  # letters before the first block that may still change
        self._open: list[Block] | None = None  # the blocks that may

    def stream(self) -> Stream:
        """What shows more text as it comes."""
        stream = Stream(self)
        stream.start()
        return stream

    def codes(self) -> list[str]:
        """The code of every block, in order."""
        return [block.code for block in self.query(CodeBlock)]

    def unhandled_token(self, token: Token) -> MarkdownBlock | None:
        return Formula(self, token) if token.type == "math_block" else None

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """The height without the margin below the last block; with ``:last-child`` each new block would restyle all."""
        last = self.displayed_children[-1:]
        below = last[0].styles.margin.bottom if last else 0
        return max(super().get_content_height(container, viewport, width) - below, 0)

    def append(self, markdown: str) -> AwaitComplete:
        """Show more text: as the whole text would be shown, by parsing only the blocks that it may change."""
        self._markdown = self.source + markdown
        return AwaitComplete(self._show_more())

    def update(self, markdown: str) -> AwaitComplete:
        """Show another text."""
        self._settled, self._open = 0, None
        return super().update(markdown)

    async def _show_more(self) -> None:
        async with self.lock:
            text = self.source[self._settled :]
            lines = [f"{line}\n" for line in text.split("\n")]
            blocks = self._build_from_source(text)
            starts = [block.source_range[0] for block in blocks]
            now = [(block, "".join(lines[slice(*block.source_range)])) for block in blocks]
            with self.app.batch_update():
                now = await self._replace(now)
            start = open_from(starts, len(lines) - 1)
            self._open = now[next((n for n, line in enumerate(starts) if line >= start), 0) :]
            self._settled += sum(map(len, lines[:start]))

    async def _replace(self, now: list[Block]) -> list[Block]:
        """Bring the open blocks up to date; those that can be changed in place stay."""
        if self._open is None:
            self._open = [(child, "") for child in self.children if isinstance(child, MarkdownBlock)]
        shown: list[Block] = []
        for (old, before), (new, after) in zip(self._open, now, strict=False):
            if type(old) is not type(new) or not (before == after or isinstance(old, IN_PLACE)):
                break
            if before != after:
                await old._update_from_block(new)
            shown.append((old, after))
        for old, _ in self._open[len(shown) :]:
            await old.remove()
        if len(shown) < len(now):  # even to mount nothing has the style sheet applied to all blocks
            await self.mount_all([block for block, _ in now[len(shown) :]])
        return shown + now[len(shown) :]
