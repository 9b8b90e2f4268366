"""Markdown whose code blocks can be copied."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token
from textual import events
from textual.app import ComposeResult
from textual.message import Message
from textual.widgets import Label, Markdown, Static
from textual.widgets.markdown import MarkdownFence

from ring_mlx import harmless


@dataclass
class CopyCode(Message):
    """The user clicked a code block's copy label."""

    code: str


class CopyLabel(Static):
    """What to click above a code block, beside its language."""

    def on_click(self, event: events.Click) -> None:
        event.stop()
        fence = self.parent
        if isinstance(fence, CodeBlock):
            self.post_message(CopyCode(fence.code))


class CodeBlock(MarkdownFence):
    """A code block with its language and a label that copies it."""

    def compose(self) -> ComposeResult:
        yield CopyLabel(f"{(self.lexer or 'text').split()[0]} · copy", classes="copy", markup=False)
        yield Label(self._highlighted_code, id="code-content", expand=True)


def parser() -> MarkdownIt:
    """Textual's Markdown parser; characters written as ``&#x202e;`` are made visible too."""
    found = MarkdownIt("gfm-like")
    found.core.ruler.push("harmless", lambda state: _make_harmless(state.tokens))
    return found


def _make_harmless(tokens: Iterable[Token]) -> None:
    for token in tokens:
        token.content = harmless(token.content)
        token.attrs = {name: harmless(v) if isinstance(v, str) else v for name, v in token.attrs.items()}
        _make_harmless(token.children or ())


class Answer(Markdown):
    """An answer's text.

    Args:
        text: Markdown.
        classes: Of its style.
    """

    BLOCKS = {**Markdown.BLOCKS, "fence": CodeBlock, "code_block": CodeBlock}  # noqa: RUF012 as Textual declares it

    def __init__(self, text: str, classes: str | None = None) -> None:
        super().__init__(harmless(text), classes=classes, parser_factory=parser)

    def codes(self) -> list[str]:
        """The code of every block, in order."""
        return [block.code for block in self.query(CodeBlock)]
