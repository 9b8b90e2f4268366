"""The chat application: themes, keys and palette around one chat screen."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

from textual import on
from textual.app import SystemCommand
from textual.css.query import NoMatches
from textual.dom import NoScreen
from textual.driver import Driver
from textual.notifications import Notification, Notify
from textual.screen import Screen
from textual.widgets import TextArea
from textual.widgets._toast import Toast

from ring_mlx import harmless
from tui import commands
from tui.config import Config
from tui.conversation import Conversation
from tui.interrupts import Interrupts
from tui.keeper import Keeper
from tui.messages import Answering
from tui.paste import keep_apart
from tui.screens.chat import ChatScreen
from tui.screens.dialog import Palette
from tui.themes import HIGH_CONTRAST

TOAST_SHARE, TOAST_COLUMNS = 4, 60  # a fourth of the height, as the style sheet has it; Textual's width


class RingChat(Interrupts):
    """Conversations with a Ring model.

    Args:
        engine: Not started yet; the caller closes it.
        keeper: Keeps what is said; by default nothing outlives the application.
        config: Settings at the start.
        talk: The chat to begin with, by default a new one.
        notes: Lines to show at the start, such as what is wrong with the configuration.
    """

    CSS_PATH: ClassVar = ["styles/chat.tcss", "styles/dialogs.tcss"]
    TITLE = "ring-mlx"

    def __init__(
        self,
        engine: Answering,
        keeper: Keeper | None = None,
        config: Config | None = None,
        talk: Conversation | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self._notes = list(notes)
        self.config = config or Config()
        self.keeper = keeper or Keeper(None, self.tell)
        self.chat = ChatScreen(engine, self.keeper, self.config, talk)
        if self.config.reduced_motion:
            self.animation_level = "none"
        self.register_theme(HIGH_CONTRAST)

    def get_driver_class(self) -> type[Driver]:
        """Textual's driver, with our parser for pasted text."""
        keep_apart()
        return super().get_driver_class()

    def _end_batch(self) -> None:
        """Have screens show what they put off until the end of a batch; Textual leaves it until their next message."""
        super()._end_batch()
        for screen in self._screen_stack:
            screen.check_idle()

    def get_default_screen(self) -> Screen[None]:
        return self.chat

    def on_notify(self, event: Notify) -> None:
        """Let older toasts go that would leave no room for a new one, and warnings and errors that say the same."""
        width, room = min(TOAST_COLUMNS, self.size.width) - 6, self.size.height // TOAST_SHARE
        said = event.notification
        for toast in [said, *reversed(list(self._notifications))]:
            room -= -(-len(toast.message) // max(width, 1))
            is_said_again = toast.message == said.message and toast.severity != "information"
            if (room < 0 or is_said_again) and toast is not said:
                self._drop_toasts([toast])

    @on(TextArea.Changed)
    def written(self) -> None:
        """Keep what is written, also in a dialog."""
        self.chat.draft_changed()

    def clear_notifications(self) -> None:
        """Let all toasts go."""
        self._drop_toasts(list(self._notifications))
        super().clear_notifications()

    def _drop_toasts(self, notifications: list[Notification]) -> None:
        """Remove toasts together with the place that they take, which Textual leaves."""
        for toast in self.screen.query(Toast):
            if toast._notification in notifications:
                toast._expire()

    def tell(self, text: str) -> None:
        """Show one line, at once or as soon as there is a screen."""
        if self.is_running:
            self.notify(harmless(text), severity="warning", timeout=20, markup=False)
        else:
            self._notes.append(text)

    def show_warning(self, message: Warning | str, *_: Any, **__: Any) -> None:
        """Show a warning of any thread; replaces ``warnings.showwarning``."""
        if self.is_running:
            self.call_later(self.tell, str(message))
        else:
            self.tell(str(message))

    def on_mount(self) -> None:
        """Apply theme and keys, then report what is wrong with them."""
        if self.config.theme in self.available_themes:
            self.theme = self.config.theme
        else:
            self._notes.append(f"[config] there is no theme {self.config.theme!r}; the palette lists them.")
        self.theme_changed_signal.subscribe(self, lambda theme: self.chat.keep_theme(theme.name))
        self.set_keymap(self.config.keys)
        for note in self._notes:
            self.tell(note)
        if not self.is_headless:
            self.mind_signals()

    def interrupt_chat(self) -> None:
        self.chat.do_interrupt("")

    def leave_chat(self, code: int, is_interrupt: bool = False) -> None:
        if is_interrupt:
            self.chat.entry.prompt.take_back_cleared()
        self.chat.do_quit("")
        self.keeper.flush(is_last=True)
        self.exit(return_code=code)

    def save_chat(self) -> None:
        self.chat.keep_draft()
        self.keeper.flush()

    def _handle_exception(self, error: Exception) -> None:
        """Show no failure of a screen that was opening when the chat ended: everything is saved by then."""
        if not (self._exit and isinstance(error, (NoMatches, NoScreen))):
            super()._handle_exception(error)

    def action_command_palette(self) -> None:
        if not isinstance(self.screen, Palette):
            self.push_screen(Palette(id="--command-palette"))

    async def action_quit(self) -> None:
        self.chat.do_quit("")

    @property
    def _unlisted(self) -> tuple[str, ...]:
        """Textual's commands that the palette does not have; a page takes no file from the chat."""
        return ("Quit", "Screenshot") if self.is_web else ("Quit",)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: Textual's own, and every command that needs no argument."""
        yield from (c for c in super().get_system_commands(screen) if c.title not in self._unlisted)
        if screen is self.chat:
            for c in commands.COMMANDS:
                if not c.argument or c.argument.startswith("["):
                    yield SystemCommand(c.name.capitalize(), c.help, partial(self.chat.action_command, c.name))
