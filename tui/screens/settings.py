"""Sampling, thinking budget and system prompt in one panel, with presets; knows values, not their use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, Label, Select, Static, TextArea

from tui.config import Preset
from tui.config.schema import RANGES, with_setting
from tui.harmless import harmless
from tui.messages import Sampling

HINTS = {
    "temp": "temperature; 0 is greedy",
    "top_p": "nucleus probability",
    "top_k": "only the k likeliest; 0 is all",
    "min_p": "least, relative to the best",
    "max_tokens": "of an answer, thought included",
    "thinking_budget": "of the thought; empty is no limit",
    "seed": "repeats an answer; or empty",
}


class SettingsScreen(ModalScreen[Preset | None]):
    """Ends with the settings, or with nothing.

    Args:
        now: The settings in force.
        presets: Those that can be taken over.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Use"),
        Binding("escape", "dismiss(None)", "Back", priority=True),
    ]

    def __init__(self, now: Preset, presets: Mapping[str, Preset]) -> None:
        super().__init__()
        self._now, self._presets = now, presets

    def compose(self) -> ComposeResult:
        """A row for each value, the system prompt below."""
        with Vertical(classes="dialog"):
            yield Static("Settings of the answers to come", classes="title")
            with VerticalScroll(can_focus=False):
                if self._presets:
                    names = [(harmless(name), name) for name in self._presets]
                    yield Select(names, prompt="take over a preset", id="preset", compact=True)
                for name in RANGES:
                    with Horizontal(classes="row"):
                        yield Label(name.replace("_", " "))
                        yield Input(_shown(self._now.sampling, name), id=name, compact=True)
                        yield Static(HINTS[name], classes="hint")
                yield Label("system prompt")
                yield TextArea(harmless(self._now.system_prompt), id="system", compact=True)
            yield Static("", id="wrong", markup=False)
            yield Footer()

    def on_mount(self) -> None:
        """Begin at the first value."""
        self.query_one("#temp", Input).focus()

    @on(Select.Changed, "#preset")
    def take_over(self, message: Select.Changed) -> None:
        """Show a preset's values."""
        preset = self._presets.get(str(message.value))
        if preset is not None:
            for name in RANGES:
                self.query_one(f"#{name}", Input).value = _shown(preset.sampling, name)
            self.query_one("#system", TextArea).text = harmless(preset.system_prompt)

    @on(Input.Submitted)
    def action_save(self) -> None:
        """End with the values, or say what is wrong with them."""
        sampling = Sampling()
        try:
            for name in RANGES:
                sampling = with_setting(sampling, name, self.query_one(f"#{name}", Input).value.strip())
        except ValueError as e:
            self.query_one("#wrong", Static).update(str(e))
            self.query_one(f"#{name}", Input).focus()
            return
        self.dismiss(Preset(sampling, self.query_one("#system", TextArea).text.strip()))


def _shown(sampling: Sampling, name: str) -> str:
    value = getattr(sampling, name)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
