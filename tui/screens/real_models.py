"""How to get a real model: sizes of the known ones, which fit this machine, and the commands."""

from __future__ import annotations

from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Footer, Static

from ring_mlx import Fit, known_fits
from tui.models import fit_text, size_text
from tui.screens.dialog import Dialog

OWNER, WHOLE_BITS = "inclusionAI", 16
CONVERT = "ring-mlx convert --model {owner}/{name} --mlx-path ~/models/{name}-{bits}bit -q --q-bits {bits}"
NONE_FITS = "No width of either fits; --expert-cache-bytes keeps most of a model on disk (docs/experts.md)."


class RealModelsScreen(Dialog[None]):
    """A table by model and width; the command of the widest one that fits can be copied."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "copy", "Copy the command"),
        Binding("escape,enter,q", "dismiss", "Close"),
    ]
    _command = ""

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog"):
            yield Static("Real models", classes="title")
            yield Static("Looking at this machine's memory...", id="fits", markup=False)
            yield Footer()

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).focus()
        self._look()

    @work(thread=True)
    def _look(self) -> None:
        found = known_fits()
        self.app.call_from_thread(self._show, found)

    def _show(self, models: dict[str, list[Fit]]) -> None:
        best = next(((n, f) for n, fits in models.items() for f in fits if f.tokens and f.bits < WHOLE_BITS), None)
        lines = [NONE_FITS]
        if best is not None:
            name, fit = best
            self._command = CONVERT.format(owner=OWNER, name=name, bits=fit.bits)
            lines = [f"{name} fits at {fit.bits} bits. In a shell:", f"  {self._command}", "Then Ctrl+L lists it here."]
            if models[name][0].tokens:
                lines.append(f"It fits as it is, too: /model {OWNER}/{name}")
        lines += [line for name, fits in models.items() for line in ("", name, *map(fit_line, fits))]
        self.query_one("#fits", Static).update("\n".join(lines))

    def action_copy(self) -> None:
        if self._command:
            self.app.copy_to_clipboard(self._command)
            self.notify("Copied the command.")


def fit_line(fit: Fit) -> str:
    """A width's size, and whether it fits."""
    return f"{fit.bits:4} bits {size_text(fit.weight_bytes):>9}  {fit_text(fit.tokens)}"
