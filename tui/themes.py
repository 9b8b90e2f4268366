"""A high-contrast theme beside Textual's own."""

from __future__ import annotations

from textual.theme import Theme

TITLE, PALE = "bold $text", "$text 70%"  # in a text: there $text-muted is as bright as $text

HIGH_CONTRAST = Theme(
    name="high-contrast",
    primary="#66d9ff",
    secondary="#ffffff",
    warning="#ffff00",
    error="#ff6b6b",
    success="#5cff5c",
    accent="#ffff00",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#000000",
    boost="#1c1c1c",
    dark=True,
    text_alpha=1.0,
    variables={
        "text-muted": "#ffffff",
        "border": "#ffffff",
        "border-blurred": "#ffffff",
        "footer-key-foreground": "#ffff00",
        "block-cursor-background": "#ffffff",
        "block-cursor-foreground": "#000000",
        "input-selection-background": "#0050a0",
    },
)
CYCLE = ("textual-dark", "textual-light", HIGH_CONTRAST.name)
