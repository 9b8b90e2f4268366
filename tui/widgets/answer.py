"""Markdown whose code blocks can be copied; knows text, not conversations."""

from __future__ import annotations

from dataclasses import dataclass

from textual import events
from textual.app import ComposeResult
from textual.message import Message
from textual.widgets import Label, Markdown, Static
from textual.widgets.markdown import MarkdownFence


@dataclass
class CopyCode(Message):
    """The user clicked a code block's copy label."""

    code: str


class CopyLabel(Static):
    """What to click above a code block, beside its language."""

    def on_click(self, event: events.Click) -> None:
        """Ask for the copy."""
        event.stop()
        fence = self.parent
        if isinstance(fence, CodeBlock):
            self.post_message(CopyCode(fence.code))


class CodeBlock(MarkdownFence):
    """A code block with its language and a label that copies it."""

    def compose(self) -> ComposeResult:
        """The label above the code."""
        yield CopyLabel(f"{(self.lexer or 'text').split()[0]} · copy", classes="copy", markup=False)
        yield Label(self._highlighted_code, id="code-content", expand=True)


class Answer(Markdown):
    """An answer's text."""

    BLOCKS = {**Markdown.BLOCKS, "fence": CodeBlock, "code_block": CodeBlock}  # noqa: RUF012 as Textual declares it

    def codes(self) -> list[str]:
        """The code of every block, in order."""
        return [block.code for block in self.query(CodeBlock)]
