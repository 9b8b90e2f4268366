"""What Ctrl+C and Ctrl+Z do on every screen, and signals that ask the process to end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from time import monotonic
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import Input, TextArea
from textual.widgets.input import Selection as InputSelection
from textual.widgets.text_area import Selection

from ring_mlx import harmless
from tui.clipboard import copied_by
from tui.editor import run_here
from tui.keys import KeysInOrder
from tui.signals import AGAIN_S

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE_S = 12.0  # a terminal that is gone may block what restores it


class Interrupts(KeysInOrder):
    """The application's part of it; the chat's screen says how an answer ends and what is kept."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "interrupt", show=False, priority=True, id="interrupt"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._interrupted_at = float("-inf")
        self.is_lent = False  # another program has the terminal
        self._copying = asyncio.Lock()

    def interrupt_chat(self) -> None:
        """End the answer or clear the prompt."""
        raise NotImplementedError

    def save_chat(self) -> None:
        """Write what waits to be written."""
        raise NotImplementedError

    def leave_chat(self, code: int, is_interrupt: bool = False) -> None:
        """Save everything and leave; an interrupt before this one may have cleared the prompt."""
        raise NotImplementedError

    def action_interrupt(self) -> None:
        """Copy what is selected, or close what is open, or interrupt the chat; a second time leaves it."""
        if selected := self._taken_selection():
            self.copy_to_clipboard(selected)
            return
        before, self._interrupted_at = self._interrupted_at, monotonic()
        if self._interrupted_at - before < AGAIN_S:
            self.leave_chat(0, is_interrupt=True)
        elif isinstance(self.screen, ModalScreen):
            self.screen.dismiss(None)
        else:
            self.interrupt_chat()

    def copy_to_clipboard(self, text: str) -> None:
        self.copy(text, "the selection")

    def copy(self, text: str, what: str) -> None:
        """Copy a text, and say how; the chat does not wait for the program that takes it."""
        if not text:  # as of an empty line that is cut; what was copied before stays
            self.notify("There is nothing to copy.", timeout=4, markup=False)
            return
        self._clipboard = text
        self.run_worker(self._copy(text, what), group="copies")

    async def _copy(self, text: str, what: str) -> None:
        async with self._copying:
            if not (tool := await asyncio.to_thread(copied_by, text)) and not self.is_lent:
                super().copy_to_clipboard(text)
        self.notify(
            f"Copied {what} {f'with {tool}' if tool else 'through the terminal (OSC 52)'}.", timeout=4, markup=False
        )

    def call_back(self, text: str, how: str) -> None:
        """Tell a user who looks at another window, by "bell" or "osc9"; nothing while the terminal has the focus."""
        if self.app_focus or self.is_lent or self._driver is None:
            return
        if how == "bell":
            self.bell()
        elif how == "osc9":
            self._driver.write(f"\x1b]9;{harmless(text, is_name=True)}\x07")

    def _taken_selection(self) -> str:
        """The selected text, which is selected no more, so that the next interrupt is one."""
        area = self.focused
        found = ""
        if isinstance(area, Input) and (found := area.selected_text):
            area.selection = InputSelection.cursor(area.cursor_position)
        elif isinstance(area, TextArea) and (found := area.selected_text):
            area.selection = Selection.cursor(area.cursor_location)
        else:
            found = self.screen.get_selected_text() or ""
            self.screen.clear_selection()
        return found

    def mind_signals(self) -> None:
        """Leave the chat when a signal asks for it, and draw the screen again after the process was stopped.

        A signal that is ignored, as by ``nohup``, stays so.
        """
        self.app_resume_signal.subscribe(self, lambda _: self.refresh(layout=True))
        loop = asyncio.get_running_loop()
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._end, 128 + number)

    async def lend(self, command: list[str]) -> int:
        """Give a program the terminal until it ends; returns its exit code.

        What happens in the chat meanwhile is kept, and shown afterwards.

        Raises:
            SuspendNotSupported: If the chat is not in a terminal.
            OSError: If it cannot be started.
        """
        if self.is_headless:
            return await run_here(command)
        with self.batch_update(), self.suspend():
            self.is_lent = True
            try:
                return await run_here(command)
            finally:
                self.is_lent = False

    def _end(self, code: int) -> None:
        if self.is_lent and code == 128 + signal.SIGINT:  # Ctrl+C in that program
            return
        self.leave_chat(code)
        guard = threading.Timer(PATIENCE_S, os._exit, (code,))
        guard.daemon = True
        guard.start()

    def action_suspend_process(self) -> None:
        """Stop this process and those started with it, as Ctrl+Z does elsewhere; the shell's ``fg`` goes on.

        A shell gives each job a process group. That of the terminal's first process would stay stopped forever.
        """
        if self._driver is None or not self._driver.can_suspend or os.getpgrp() == os.getsid(0):
            self.notify("There is no shell in this terminal that could bring the chat back.", markup=False)
            return
        self.save_chat()
        os.killpg(os.getpgrp(), signal.SIGTSTP)
