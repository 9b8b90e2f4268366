"""Sampling, thinking budget and system prompt in one panel, with presets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Input, Label, Select, Static, TextArea

from ring_mlx import harmless
from tui.commands import ON_SCREEN
from tui.config import Preset, with_setting
from tui.messages import Sampling
from tui.screens.dialog import Keys, Writing

HINTS = {
    "temp": "temperature; 0 is greedy",
    "top_p": "nucleus probability",
    "top_k": "only the k likeliest; 0 is all",
    "min_p": "least, relative to the best",
    "max_tokens": "of an answer; -1: all the context",
    "thinking_budget": "of the thought; empty leaves room",
    "seed": "repeats an answer; or empty",
}


class SettingsScreen(Writing[Preset | None]):
    """Ends with the settings, or with nothing.

    Args:
        now: The settings in force.
        presets: Those that can be taken over.
        delete: Takes the name of a preset that the user deletes.
        plain: What holds where a setting is left empty.
        default: The settings of new chats.

    Attributes:
        are_defaults: Whether the settings are to be those of new chats too.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Use"),
        Binding("escape", "dismiss(None)", "Back", priority=True),
        Binding("f2", "save(True)", "As defaults", priority=True, id="settings_save_defaults"),
        Binding("f3", "take_defaults", "Defaults", priority=True, id="settings_take_defaults"),
        Binding("ctrl+x", "delete", "Delete preset", priority=True, id="settings_delete"),
    ]

    def __init__(
        self,
        now: Preset,
        presets: Mapping[str, Preset],
        delete: Callable[[str], None],
        plain: Sampling,
        default: Preset | None = None,
    ) -> None:
        super().__init__()
        self._default, self.are_defaults = default or Preset(), False
        self._now, self._presets, self._delete, self._plain = now, dict(presets), delete, plain
        self._system = TextArea(harmless(now.system_prompt), id="system", compact=True)
        self._before = self._system.text

    @property
    def unsaved(self) -> str:
        return f"/system {self._system.text}" if self._system.text != self._before else ""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("Settings of this chat", classes="title")
            with VerticalScroll(can_focus=False):
                if self._presets:
                    yield Select(self._names, prompt="take over a preset", id="preset", compact=True)
                for name in ON_SCREEN:
                    with Horizontal(classes="row"):
                        yield Label(name.replace("_", " "))
                        shown, plain = _shown(self._now.sampling, name), _shown(self._plain, name)
                        yield Input(shown, placeholder=plain, id=name, compact=True)
                        yield Static(HINTS[name], classes="hint")
                yield Label("system prompt")
                yield self._system
            yield Static("", id="wrong", markup=False)
            yield Keys()

    def on_mount(self) -> None:
        self.query_one("#temp", Input).focus()

    @on(Select.Changed, "#preset")
    def take_over(self, message: Select.Changed) -> None:
        self.refresh_bindings()
        preset = self._presets.get(str(message.value))
        if preset is not None:
            self._fill(preset)

    def action_take_defaults(self) -> None:
        self._fill(self._default)

    def _fill(self, preset: Preset) -> None:
        self._now = preset
        self.query_one("#wrong", Static).update("")
        for name in ON_SCREEN:
            self.query_one(f"#{name}", Input).value = _shown(preset.sampling, name)
        self._system.text = harmless(preset.system_prompt)
        self._before = self._system.text

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Hide the key that deletes a preset until one is chosen."""
        return action != "delete" or self._preset is not None

    def action_delete(self) -> None:
        """Delete the chosen preset; its values stay in the fields."""
        name = self._preset
        if name is not None:
            del self._presets[name]
            self._delete(name)
            chooser = self.query_one("#preset", Select)
            chooser.set_options(self._names)
            chooser.display = bool(self._presets)
            self.query_one("#wrong", Static).update(harmless(f"Deleted {name}."))
            self.query_one("#temp", Input).focus()
            self.refresh_bindings()

    @property
    def _names(self) -> list[tuple[Content, str]]:
        return [(Content(harmless(name, is_name=True)), name) for name in self._presets]

    @property
    def _preset(self) -> str | None:
        chooser = self.query("#preset").results(Select)
        name = next((str(c.value) for c in chooser), "")
        return name if name in self._presets else None

    @on(Input.Submitted)
    def submitted(self) -> None:
        self.action_save()

    def action_save(self, as_defaults: bool = False) -> None:
        """Close with the values, or report a wrong one."""
        sampling = self._now.sampling
        try:
            for name in ON_SCREEN:
                sampling = with_setting(sampling, name, self.query_one(f"#{name}", Input).value.strip())
        except ValueError as e:
            self.query_one("#wrong", Static).update(harmless(str(e)))
            self.query_one(f"#{name}", Input).focus()
            return
        self.are_defaults = as_defaults
        prompt, shown = self._system.text, harmless(self._now.system_prompt)
        self.dismiss(Preset(sampling, self._now.system_prompt if prompt == shown else prompt.strip()))


def _shown(sampling: Sampling, name: str) -> str:
    value = getattr(sampling, name)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
