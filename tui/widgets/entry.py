"""Where the user writes: the prompt with its attachments and completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import OptionList, TextArea

from ring_mlx import RingError, harmless
from tui import commands, files
from tui.config import PROMPT_KEYS
from tui.store import Attachment
from tui.widgets.attachments import Attachments
from tui.widgets.choices import Completion, command_rows
from tui.widgets.queued import Queued, Waiting

LONG_CHARACTERS, LONG_LINES = 3000, 30


class Entry(Vertical):
    """The prompt's text; ``keys`` are remapped ones by command, and those of "send" and "new_line"."""

    @dataclass
    class Asked(Message):
        """A question that is not blank."""

        text: str
        attachments: list[Attachment]

    @dataclass
    class Commanded(Message):
        """A slash command."""

        text: str

    @dataclass
    class Trouble(Message):
        """Something to tell the user in one line."""

        text: str

    def __init__(self, keys: dict[str, str], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.completion, self.attachments, self._keys = Completion(), Attachments(), keys
        self.queued = Queued()
        self.prompt = Prompt(self, keys)
        self._pastes = 0

    def compose(self) -> ComposeResult:
        yield self.completion
        yield self.queued
        yield self.attachments
        yield self.prompt

    def give_back(self, text: str, attachments: Sequence[Attachment] = ()) -> None:
        """Put a question that was not answered back, before the text that the user has begun since."""
        self.prompt.replace_text(f"{text}\n{begun}" if (begun := self.prompt.text).strip() else text)
        for attachment in attachments:
            self.attachments.add(attachment)

    def queue(self, text: str, attachments: Sequence[Attachment]) -> None:
        """Have a question wait for its turn."""
        self.queued.set([*self.queued.found, Waiting(text, tuple(attachments))])

    def unqueue(self, *wanted: Waiting) -> None:
        """Put questions that wait, by default all, back into the prompt, before what the user writes now."""
        taken = self.queued.take(*(wanted or self.queued.found))
        if taken:
            self.prompt.begin("\n".join(filter(None, [*(w.text for w in taken), self.prompt.draft])))
        for attachment in (a for w in taken for a in w.attachments):
            self.attachments.add(attachment)

    @on(Queued.Wanted)
    def wanted_back(self, message: Queued.Wanted) -> None:
        message.stop()
        self.unqueue(message.waiting)
        self.prompt.focus()

    @property
    def draft(self) -> tuple[str, list[Attachment]]:
        """All that is written and not asked yet."""
        waiting = self.queued.found
        text = "\n".join(filter(None, [*(w.text for w in waiting), self.prompt.draft]))
        return text, [*(a for w in waiting for a in w.attachments), *self.attachments.found]

    def attach(self, *paths: str) -> bool:
        """Attach files, or say why one cannot be and attach none; returns whether they are attached."""
        try:
            found = [files.read_attachment(path) for path in paths]
        except RingError as e:
            self.post_message(self.Trouble(str(e)))
            return False
        for attachment in found:
            self.attachments.add(attachment)
        return True

    def sent(self, text: str) -> None:
        """Send a command or a question with the files that it mentions; it stays in the prompt if one is refused."""
        if commands.is_command(text):
            self.post_message(self.Commanded(text))
            return
        if not self.attach(*files.mentioned(text)):
            self.prompt.replace_text(text)
        elif text or self.attachments.found:
            self.post_message(self.Asked(text, self.attachments.take()))

    def pasted(self, text: str) -> None:
        """Attach a dropped file or a long text; anything else is inserted."""
        if paths := files.dropped(text):
            for path in paths:
                self.attach(path)
        elif "\n" not in text.strip() and len(text) < LONG_CHARACTERS:
            self.prompt.insert(text)
        else:
            self._pastes += 1
            self.attachments.add(Attachment(f"pasted {self._pastes}", text))

    @on(TextArea.Changed)
    def complete(self) -> None:
        """Offer commands after a slash and files after an @."""
        text = self.prompt.text
        if commands.is_command(text) and " " not in text:
            self.completion.offer(command_rows(text[1:], self._keys, self.app.size.width), text)
        elif (begun := files.begun(self._before_cursor)) is not None:
            self.completion.offer(files.completions(begun), text)
        else:
            self.completion.offer([])

    def completed(self, chosen: str, sends: bool) -> None:
        """Insert the chosen completion; ``sends`` a command, or a text with a path, that needs nothing more."""
        if chosen.startswith("/") and commands.is_command(self.prompt.text):
            argument = commands.NAMED[chosen[1:]].argument
            self.prompt.replace_text(f"{chosen} " if argument else chosen)
            if sends and (not argument or argument.startswith("[")):
                self.prompt.send()
            return
        if (begun := files.begun(self._before_cursor)) == chosen and sends:  # it was typed to its end
            self.prompt.send()
        elif begun is not None:
            row, end = self.prompt.cursor_location
            self.prompt.replace(chosen + ("" if chosen.endswith("/") else " "), (row, end - len(begun)), (row, end))

    @on(OptionList.OptionSelected)
    def clicked(self, message: OptionList.OptionSelected) -> None:
        """A click chooses as Tab does."""
        message.stop()
        if (chosen := self.completion.chosen) is not None:
            self.prompt.focus()
            self.completed(chosen, sends=False)

    @property
    def _before_cursor(self) -> str:
        row, column = self.prompt.cursor_location
        return str(self.prompt.document.get_line(row))[:column]


class Prompt(TextArea):
    """A text area that grows with its text; Enter sends, Ctrl+J begins a line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pageup", "screen.page(-1)", show=False),
        Binding("pagedown", "screen.page(1)", show=False),
        Binding("ctrl+underscore,ctrl+minus,ctrl+slash,super+z", "undo", show=False),
    ]

    def __init__(self, entry: Entry, keys: dict[str, str]) -> None:
        super().__init__(
            id="prompt",
            placeholder="Ask something",
            show_line_numbers=False,
            highlight_cursor_line=False,
            soft_wrap=True,
        )
        self._entry, self._completion = entry, entry.completion
        self._keys = {key: name for name in PROMPT_KEYS for key in keys[name].split(",")}
        self.past: list[str] = []
        self._at, self._written = 0, ""
        self._cleared = ""

    def remember(self, texts: Sequence[str]) -> None:
        """Remember earlier messages, the oldest first."""
        self.past = list(texts)
        self._at = len(self.past)

    @property
    def draft(self) -> str:
        """What the user has written, also while what was sent before is shown."""
        is_recalled = self._at < len(self.past) and self.text == self.past[self._at]
        return self._written if is_recalled else self.text

    def begin(self, draft: str) -> None:
        """Go on with the draft of another chat."""
        self._at, self._written = len(self.past), ""
        self.replace_text(draft)

    def replace_text(self, text: str) -> None:
        """Have this text, with the cursor at its end."""
        self.text = text
        self.move_cursor(self.document.end)

    def on_key(self, event: events.Key) -> None:
        """Take the keys that a text area would treat otherwise."""
        if self._completing(event.key) or self._own(event.key):
            event.stop()
            event.prevent_default()

    def is_special(self, key: str) -> bool:
        """Whether a key sends the text or begins a line in it, or quits."""
        return key in self._keys or (key == "ctrl+d" and not self.text)

    def on_paste(self, event: events.Paste) -> None:
        """Clean what the text area is about to insert; many terminals paste line ends as carriage returns."""
        event.text = text = harmless(event.text.replace("\r\n", "\n").replace("\r", "\n"))
        is_long = len(text) > LONG_CHARACTERS or text.count("\n") > LONG_LINES
        if is_long or (len(text) > 1 and "\n" not in text.strip() and ("/" in text or text.startswith("~"))):
            event.stop()
            event.prevent_default()
            self._entry.pasted(text)

    def send(self) -> None:
        """Hand the text over; the prompt is then empty."""
        text = self.text.strip()
        self.clear()
        self.put_by(text)
        self._at, self._written = len(self.past), ""
        self._entry.sent(text)

    def put_away(self) -> bool:
        """Clear the text, which Up and undo bring back; returns whether there was any."""
        self._cleared = self.text
        written = self._written if self._at < len(self.past) else ""
        self.put_by(written)
        self.put_by(self.text)
        self._at, self._written = len(self.past), ""
        self.clear()
        return bool(self._cleared)

    def put_by(self, text: str) -> bool:
        """Let Up bring a text back; returns whether there is any."""
        is_last = self._at == len(self.past)
        if text.strip() and text not in self.past[-1:]:
            self.past.append(text)
        self._at = len(self.past) if is_last else self._at
        return bool(text.strip())

    def take_back_cleared(self) -> None:
        """Have the text again that has just been cleared."""
        if not self.text:
            self.begin(self._cleared)

    def recall(self, step: Literal[-1, 1]) -> None:
        """Show the text sent before or after; what is being written comes last."""
        at = self._at + step
        if not 0 <= at <= len(self.past):
            return
        if self._at == len(self.past):
            self._written = self.text
        self._at = at
        self.replace_text(self._written if at == len(self.past) else self.past[at])

    def _own(self, key: str) -> bool:
        row, last = self.cursor_location[0], self.document.line_count - 1
        name = self._keys.get(key)
        if name == "send":
            self.send()
        elif name == "new_line":
            self.insert("\n")
        elif key == "up" and not self.text and (waiting := self._entry.queued.found):
            self._entry.unqueue(waiting[-1])
        elif key == "up" and row == 0 and self._at > 0:
            self.recall(-1)
        elif key == "down" and row == last and self._at < len(self.past):
            self.recall(1)
        elif key == "ctrl+d" and not self.text:
            self.post_message(Entry.Commanded("/quit"))
        elif key == "backspace" and not self.text:
            self._entry.attachments.set(self._entry.attachments.found[:-1])
        else:
            return False
        return True

    def _completing(self, key: str) -> bool:
        if not self._completion.display or self._completion.typed != self.text:  # keys came faster than the list
            return False
        if key in ("up", "down"):
            self._completion.move(-1 if key == "up" else 1)
        elif key in ("tab", "enter") and (chosen := self._completion.chosen) is not None:
            self._entry.completed(chosen, sends=key == "enter")
        elif key == "escape":
            self._completion.offer([])
        else:
            return False
        return True
