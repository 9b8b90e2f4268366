"""What is seen before the first question: what the model does, examples, recent chats, and a way to a real model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList, Static

from ring_mlx import harmless
from tui.gauges import age
from tui.messages import Loaded
from tui.models import TOY_NAME
from tui.store import Chat
from tui.widgets.choices import Choices, in_columns

TOY = (
    "The packaged toy adds, subtracts, multiplies, compares and sorts numbers, spells and reverses words, counts letters and "
    "days, and recalls what you tell it. It knows nothing else: it is for trying the chat out."
)
REAL = "{name} thinks before it answers; the thought folds to one line. It reads {context:,} tokens: attach long files with @."
EXAMPLES = {
    True: ("What can you do?", "What is 4756 + 3879?", 'Spell the word "lantern" backwards.'),
    False: (
        "Prove that the square root of 2 is irrational.",
        "Write a tested Python function that merges intervals.",
        "A train runs 87 km from 9:40 to 10:38. How fast is it?",
    ),
}
HINT = "Tab comes here, ↑↓ and Enter or a number choose. In the prompt: Enter sends, @ attaches, / lists commands, F1 shows all keys."
AROUND_ROWS, MOST_RECENT = 11, 5
Kind = Literal["ask", "open", "get"]


class Welcome(Vertical):
    """Hidden while there are turns."""

    @dataclass
    class Chosen(Message):
        """Ask an example, open a chat by its id, or say how to get a real model."""

        kind: Kind
        value: str

    @dataclass
    class Typed(Message):
        """A letter or a paste that is no choice."""

        event: events.Key | events.Paste

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._about, self._choices = Static(markup=False, classes="about"), Starts()
        self._model, self._recent = Loaded("", 0), list[Chat]()

    def compose(self) -> ComposeResult:
        yield self._about
        yield self._choices
        yield Static(HINT, markup=False, classes="hint")

    def show(self, model: Loaded, recent: Sequence[Chat]) -> None:
        """Show a model, or without a name none, and the chats changed last."""
        self._model, self._recent = model, list(recent)
        self._fill()

    def on_resize(self) -> None:  # also of the height, which says how many rows there is room for
        self.call_after_refresh(self._fill)

    def _fill(self) -> None:
        name, is_toy, now = self._model.name, self._model.name == TOY_NAME, time.time()
        about = TOY if is_toy else REAL.format(name=harmless(name, is_name=True), context=self._model.context)
        self._about.update(about if name else "")
        rows: list[tuple[tuple[Kind, str], str, Sequence[str]]] = []
        if name:
            rows += [(("ask", text), text, [""]) for text in EXAMPLES[is_toy]]
        if is_toy:
            rows.append((("get", ""), "Get a real model that fits", [""]))
        room = self.screen.size.height - AROUND_ROWS - len(rows) - self._about.size.height
        shown = self._recent[: max(0, min(room, MOST_RECENT))]
        rows += [(("open", c.id), c.title or "untitled", [age(now - c.changed)]) for c in shown]
        self._choices.fill(
            in_columns(
                [
                    (key, f"{n} ", Content(harmless(text, is_name=True)), remarks)
                    for n, (key, text, remarks) in enumerate(rows, 1)
                ],
                self._choices.size.width,
            )
        )

    @on(OptionList.OptionSelected)
    def clicked(self, message: OptionList.OptionSelected) -> None:
        message.stop()
        self.choose(message.option_index)

    def choose(self, index: int) -> None:
        """Do what a row says."""
        self.post_message(self.Chosen(*self._choices.keys[index]))


class Starts(Choices[tuple[Kind, str]]):
    """The rows; a number chooses one, any other letter is for the prompt."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,tab", "screen.to_prompt", show=False)]

    def on_key(self, event: events.Key) -> None:
        letter, welcome = event.character or "", self.parent
        if isinstance(welcome, Welcome) and letter.isdecimal() and 0 < int(letter) <= len(self.keys):
            event.stop()
            welcome.choose(int(letter) - 1)
        elif event.is_printable:
            event.stop()
            self.post_message(Welcome.Typed(event))

    def on_paste(self, event: events.Paste) -> None:
        event.stop()
        self.post_message(Welcome.Typed(event))
