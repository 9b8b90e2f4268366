"""The chat's main screen: composition, keys and the way from a command's name to what carries it out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Footer

from tui import commands
from tui.keeper import WRITE_EVERY_S
from tui.screens.setting_commands import SettingCommands
from tui.widgets.entry import Entry
from tui.widgets.turn import TurnView

DRAFT_EVERY_S = 1.0
IN_FOOTER = ("stop", "new", "chats", "model", "settings", "help", "quit")


class ChatScreen(SettingCommands):
    """Turns, what is being written, the gauges and the keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            c.key,
            f"command('{c.name}')",
            c.label or c.name,
            show=c.name in IN_FOOTER,
            id=c.name,
            priority=c.name == "quit",
        )
        for c in commands.COMMANDS
        if c.key
    ]

    def compose(self) -> ComposeResult:
        """From top to bottom."""
        yield self.turns
        yield self.entry
        yield self.status
        yield Footer()

    async def on_mount(self) -> None:
        """Load the model; the user may write, and even send, meanwhile."""
        self.entry.prompt.focus()
        self.set_interval(WRITE_EVERY_S, self._flush)
        self._draft_timer = self.set_interval(DRAFT_EVERY_S, self._keep_draft_now, pause=True)
        self.entry.prompt.remember(self.keeper.recent_questions())
        if self.talk.turns:
            await self.show_chat(self.talk)
        self.engine.start(self.post_message)

    def on_unmount(self) -> None:
        """Nobody reads the answer any more; what was written of it is kept."""
        self.stop_now()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Dim the key that stops while there is nothing to stop; hide those of branches where there are none."""
        if action == "command" and parameters == ("stop",) and self.answer is None:
            return None
        if action == "command" and parameters[0] in ("next", "previous") and isinstance(self.focused, TurnView):
            return self.focused.branch[1] > 1
        return True

    async def action_command(self, name: str) -> None:
        """Carry out a command that has no argument."""
        await self.carry_out(commands.NAMED[name], "")

    async def carry_out(self, command: commands.Command, argument: str) -> None:
        """Carry out a command."""
        done = self.method_of(command)(argument)
        if inspect.isawaitable(done):
            await done

    def method_of(self, command: commands.Command) -> Callable[[str], Any]:
        """What carries a command out."""
        method: Callable[[str], Any] = getattr(self, f"do_{command.name}")
        return method

    @on(Entry.Commanded)
    async def commanded(self, message: Entry.Commanded) -> None:
        """Carry out a slash command, or say that there is none of that name."""
        found = commands.split(message.text)
        if found is None:
            self.say(f"There is no command {message.text.split()[0]}; /help lists them.", "warning")
            self.entry.prompt.replace_text(message.text)
        else:
            await self.carry_out(*found)

    @on(Entry.Trouble)
    def troubled(self, message: Entry.Trouble) -> None:
        """Show what went wrong in the prompt."""
        self.trouble(message.text)

    @on(Entry.Changed)
    def draft_changed(self) -> None:
        """Keep the draft a moment after the last letter."""
        self._draft_timer.reset()
        self._draft_timer.resume()

    def _flush(self) -> None:
        self.keeper.flush()
        self.status.unsaved = sum(len(turns) for _, turns in self.keeper.unsaved_turns())

    def _keep_draft_now(self) -> None:
        self._draft_timer.pause()
        self.keep_draft()
