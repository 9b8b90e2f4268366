"""The main screens as text and as styles, at 80 x 24 and 120 x 40, dark and light, against files; and their contrast.

The text is the same in every theme. A file of styles has a line a row, such as ``a4 b76`` (four columns in style a),
and then what each letter is: text colour, background, and attributes.

``RING_MLX_UPDATE_SCREENS=1 pytest tests/test_tui_screens.py`` writes the files anew.
"""

from __future__ import annotations

import os
import string
from dataclasses import replace
from pathlib import Path

import pytest
from textual.color import Color
from textual.widgets import Input

from tests.tui_pilot import SIZES, chat, pause, strips
from tui.config import Config, Preset
from tui.messages import Reading
from tui.store import Attachment
from tui.themes import CYCLE

FOLDER = Path(__file__).parent / "tui_screens"
LEAST_CONTRAST = {"textual-dark": 3.0, "textual-light": 3.0, "high-contrast": 7.0}
MARKDOWN = "A *ring* has:\n\n1. a `state`\n2. a **decay**\n\n```python\ns = decay * s + k * v\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing of the user's is read or written, it is always the same time, and no cursor blinks."""
    monkeypatch.setenv("RING_MLX_HOME", "/home/ring")
    monkeypatch.setattr("tui.config.write_text", lambda path, text, private=False: None)
    monkeypatch.setattr("tui.screens.chats.age", lambda s: "just now")
    monkeypatch.setattr("tui.screens.models.found_models", list)
    monkeypatch.setattr(Input, "_toggle_cursor", lambda self: None)  # a cursor that blinks is seen or not


async def conversation(d):
    """A thought, Markdown of all kinds, a branch and a focused turn."""
    await d.exchange("What is a ring?", "Short.")
    await d.command("/regenerate")
    await d.post(d.thought("Let me see.", 340, 12.0), d.text(MARKDOWN), d.end())
    await d.press("alt+up", "t")


async def reading(d):
    """A prompt being read, with an attachment for the next one and a command being typed."""
    await d.exchange("First", "An answer that was cut off")
    await d.say("Read all of it")
    await d.post(Reading(d.engine.number, 5000, 20_000, 1000, 12.5))
    d.chat.entry.attachments.add(Attachment("notes.txt", "some notes\n" * 100))
    await d.press("slash", "e")


async def found(d):
    """A search with hits."""
    for n in ("one", "two"):
        await d.exchange(f"Question {n} about rings", f"The answer {n} is about **rings** too.")
        await d.press("ctrl+n")
    await d.press("ctrl+o")
    await d.type("ring")


async def settings(d):
    """The panel."""
    await d.press("ctrl+s")


async def keys(d):
    """All commands."""
    await d.press("f1")


async def record(d):
    """An answer's record."""
    await d.exchange("q", "a")
    await d.command("/record")


THEMES = {"dark": "textual-dark", "light": "textual-light"}
SCENES = {f.__name__: f for f in (conversation, reading, found, settings, keys, record)}
CONFIG = Config(presets={"exact": Preset()}, reduced_motion=True)


def played(scene, size, themes, see):
    """Play a scene and look at it, in one theme after the other."""

    async def script(d):
        d.chat.entry.prompt.cursor_blink = False
        await SCENES[scene](d)
        for theme in themes:
            d.app.theme = theme
            await d.settle()
            await pause(0.2)
            d.app.screen.refresh()  # as on a slow machine, that has not painted the last change yet
            see(d, theme)

    chat(script, size, config=replace(CONFIG, theme=themes[0]))


def style_rows(d):
    """A line a row, each run of one style as a letter and its columns; then the letters' styles."""
    letters, rows = {}, []
    for strip in strips(d.app):
        runs = []
        for segment in strip:
            letter = letters.setdefault(style_text(segment), (string.ascii_letters + string.digits)[len(letters)])
            if runs and runs[-1][0] == letter:
                runs[-1][1] += segment.cell_length
            elif segment.cell_length:
                runs.append([letter, segment.cell_length])
        rows.append(" ".join(f"{letter}{columns}" for letter, columns in runs))
    return [*rows, "", *(f"{letter} {style}" for style, letter in letters.items())]


def style_text(segment):
    """Such as "#e0e0e0 on #121212 bold"; a blank has no colour of text."""
    style = segment.style
    if style is None:
        return "none"
    names = [n for n in ("bold", "dim", "italic", "underline", "reverse", "strike") if getattr(style, n)]
    is_blank = segment.text.isspace() and not {"underline", "reverse", "strike"} & set(names)
    front, back = ("-" if c is None else Color.from_rich_color(c).hex.lower() for c in (style.color, style.bgcolor))
    return f"- on {back}" if is_blank else " ".join([f"{front} on {back}", *names])


def assert_kept(name, rows):
    """The rows are those of the file; written anew where that is wanted."""
    file, text = FOLDER / name, "\n".join(rows) + "\n"
    if os.environ.get("RING_MLX_UPDATE_SCREENS"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scene", SCENES)
def test_the_screen_is_as_it_was(scene, size):
    seen = {}
    played(scene, size, list(THEMES.values()), lambda d, theme: seen.update({theme: (d.screen_text, style_rows(d))}))
    name = f"{scene}-{size[0]}x{size[1]}"
    for theme, full_name in THEMES.items():
        text, styles = seen[full_name]
        assert_kept(f"{name}.txt", text)
        assert_kept(f"{name}-{theme}.styles.txt", styles)
        assert all(len(row) <= size[0] for row in text)


@pytest.mark.parametrize("scene", SCENES)
def test_dark_and_light_differ(scene):
    """So that neither theme's file can be a copy of the other's."""
    dark, light = (
        (FOLDER / f"{scene}-80x24-{theme}.styles.txt").read_text(encoding="utf-8").partition("\n\n")[2]
        for theme in THEMES
    )
    colours = [{word for word in text.split() if word.startswith("#")} for text in (dark, light)]
    assert len(colours[0] & colours[1]) < min(map(len, colours)) / 2


@pytest.mark.parametrize("scene", ["conversation", "settings"])
def test_everything_can_be_read_in_every_theme(scene):
    def see(d, theme):
        dialogs = d.app.screen.query(".dialog")
        region = dialogs.first().region if dialogs else d.app.screen.region
        for y, strip in enumerate(strips(d.app)):
            if not region.y < y < region.bottom - 1:
                continue
            for segment in strip.crop(region.x + 1, region.right - 1):
                word = segment.text.strip()
                if (
                    any(c.isalnum() for c in word)
                    and segment.style
                    and segment.style.color
                    and segment.style.bgcolor
                    and not segment.style.dim
                ):
                    front, back = (Color.from_rich_color(c) for c in (segment.style.color, segment.style.bgcolor))
                    assert contrast(front, back) >= LEAST_CONTRAST[theme], (word, front.hex, back.hex)

    played(scene, SIZES[0], CYCLE, see)


def contrast(a, b):
    """The ratio that accessibility guidelines define."""

    def luminance(c):
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in c.normalized]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
