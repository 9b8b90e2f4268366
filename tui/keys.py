"""Lets every key and paste take effect in the order typed, also across screens."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from textual import events
from textual._callback import invoke
from textual.app import App
from textual.message_pump import MessagePump
from textual.widgets import Input, TextArea
from textual.worker import WorkerError

ROUNDS = 2  # for what a key sends to the screen, and for the screen that is shown then
PATIENCE_S = 5.0  # a widget that has not answered by then does not hold back the keys of the others
COMMANDS = "commands"  # the group of workers that finish what a key began
ELSEWHERE = ("up", "down", "tab", "shift+tab", "enter", "escape", "ctrl+c", "ctrl+z")  # keys that may do more than edit

Typed = events.Key | events.Paste


class KeysInOrder(App[None]):
    """Handles a key in the widget in focus, and around it, once what was typed before has taken effect.

    Textual posts the keys of a burst to the widget in focus at their arrival. A letter is inserted there, but a key
    with a binding is posted on to the application: letters overtake it, and may land on the screen before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._typed: deque[Typed] = deque()
        self._is_waiting, self._is_settled = False, True
        self.can_type = asyncio.Event()  # the prompt is there; what was typed before waits for it

    async def on_event(self, event: events.Event) -> None:
        if not isinstance(event, (events.Key, events.Paste)) or event.is_forwarded:
            if not (isinstance(event, events.MouseDown) and self._is_gone(event)):
                await super().on_event(event)
        elif self._exit:  # screens that are being removed take no keys
            return
        elif not self._is_waiting and self.can_type.is_set() and edits_text(self.focused, event):
            self._is_settled = False
            await self._handle(event)
            self._show_edit()
        else:
            self._typed.append(event)
            if not self._is_waiting:
                self._is_waiting = True
                self.run_worker(self._take_typed(), group="typed")

    def _is_gone(self, event: events.MouseDown) -> bool:
        """Whether a click is on a widget that was removed since the screen was painted, on which Textual fails."""
        widget, _ = self.screen.get_widget_and_offset_at(event.x, event.y)
        return widget is not None and widget.parent is None

    async def _take_typed(self) -> None:
        """Handle the keys that wait; those that only edit a text follow each other at once."""
        await self.can_type.wait()
        try:
            while self._typed and not self._exit:
                edits = edits_text(self.focused, self._typed[0])
                if not edits and not self._is_settled:
                    await self.settle()
                self._is_settled = False
                await self._handle(self._typed.popleft())
                if not edits:
                    await self.settle()
            self._show_edit()
        finally:
            self._is_waiting = False

    async def _handle(self, event: Typed) -> None:
        """Do at once what Textual does by posting the event from the widget in focus up to the application."""
        if isinstance(event, events.Key):
            self.app_focus = True
            if event.key == "escape":
                self.clear_notifications()
            if self.screen.maximized is not None and event.key == "escape" and self.escape_to_minimize:
                self.screen.minimize()
                return
            if await self._check_bindings(event.key, priority=True):
                return
        event._set_forwarded()
        for pump in (self.focused or self.screen).ancestors_with_self:
            with pump._context():
                for _, method in pump._get_dispatch_methods(event.handler_name, event):
                    await invoke(method, event)
            if event._stop_propagation:
                return
            event._no_default_action = False

    def _show_edit(self) -> None:
        """Paint the widget in focus after the last key of a burst; the next frame may lay out a long answer first."""
        target, screen, is_last = self.focused, self.screen, not (self._typed or self.message_queue_size)
        if target is None or not is_last or target._layout_required:
            return
        if target in screen._compositor.visible_widgets:
            screen._compositor.update_widgets({target})
            update = screen._compositor.render_update(screen_stack=self._background_screens)
            batches, self._batch_count = self._batch_count, 0  # of other widgets, such as blocks being mounted
            self._display(screen, update)
            self._batch_count = batches

    async def settle(self) -> None:
        """Wait until what was typed has taken effect."""
        self._is_settled = True
        for _ in range(ROUNDS):
            for pump in (self.focused or self.screen).ancestors_with_self:
                await _passed(pump)
            commands = [w for w in self.workers if w.group == COMMANDS and not w.is_finished]
            if commands:
                with suppress(WorkerError):
                    await self.workers.wait_for_complete(commands)


def edits_text(target: object, event: Typed) -> bool:
    """Whether a key only edits the text of the widget in focus."""
    if not isinstance(target, (Input, TextArea)) or not isinstance(event, events.Key):
        return False
    edits = target._bindings.key_to_bindings.get(event.key, ())
    if getattr(target, "is_special", lambda key: False)(event.key) or event.key in ELSEWHERE:
        return False
    return event.is_printable or any(not b.action.startswith("screen.") for b in edits)


async def _passed(pump: MessagePump) -> None:
    """Wait until a widget, a screen or the application has handled what it has been sent so far."""
    passed = asyncio.Event()
    if pump.call_later(passed.set):
        with suppress(TimeoutError):
            await asyncio.wait_for(passed.wait(), PATIENCE_S)
