"""A name that a stranger gave to a file, a model or a chat is text wherever the chat shows it."""

from __future__ import annotations

import pytest
from textual.content import Content
from textual.widgets import Select

from ring_mlx import harmless
from tests.test_tui_harmless import BAD, shown
from tests.tui_pilot import chat
from tui.config import Preset
from tui.messages import Loaded
from tui.models import Found
from tui.screens.settings import SettingsScreen

SIZE = (200, 50)
# What a file can be called has no slash; Textual needs none to take a tag for one.
NAMES = {
    "n[bold]b": "n[bold]b",
    "n[@click=app.quit]c": "n[@click=app.quit]c",
    "n[link=x]l": "n[link=x]l",
    "n[": "n[",
    "n\x1b[2J\u202e\x9bx": r"n\x1b[2J\u202e\x9bx",
    "n\u2028y\u200f": r"n\u2028y\u200f",
    "n\nof\tmore": r"n\nof\tmore",
}


@pytest.fixture(params=NAMES, ids=range(len(NAMES)))
def name(request):
    return request.param


def check(d, name):
    """The name is there as text, nothing of it acts, and nothing of it can be clicked."""
    text = shown(d)
    assert NAMES[name] in text
    assert not BAD.search(text), repr(BAD.search(text))
    metas = [s.style.meta for row in d.app.screen._compositor.render_strips() for s in row if s.style]
    assert "app.quit" not in str(metas)
    links = {s.style.link for row in d.app.screen._compositor.render_strips() for s in row if s.style}
    assert links <= {None}


@pytest.fixture
def named(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("hello")
    monkeypatch.chdir(tmp_path)
    return name


def test_completions_chips_and_turns(named, tmp_path):
    async def script(d):
        await d.type("@n")
        assert d.chat.entry.completion.chosen == (named if NAMES[named] == named else None)
        assert not BAD.search(shown(d))
        await d.press("tab")  # what is chosen is in the prompt now
        assert (NAMES[named] in shown(d)) == (NAMES[named] == named)
        assert not BAD.search(shown(d))
        d.chat.entry.prompt.replace_text("")
        d.chat.entry.attach(named)
        await d.settle()
        check(d, named)
        await d.exchange("q", "a")
        check(d, named)
        await d.command("/export md out.md")
        assert not BAD.search((tmp_path / "out.md").read_text())

    chat(script, SIZE)


@pytest.mark.parametrize("command", ["attach ", "import ", "export md no/folder/", "theme ", "set ", "go "])
def test_toasts_about_a_name(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)

    async def script(d):
        await d.exchange("q", "a")
        for name in NAMES:
            await d.command(f"/{command}{name}")
            assert not BAD.search(shown(d)), repr(BAD.search(shown(d)))
            assert not any(BAD.search(t) for t in d.toasts)

    chat(script, SIZE)


def test_models_status_and_record(name, monkeypatch):
    monkeypatch.setattr("tui.screens.models.found_models", lambda: [Found(name, name, "remark"), Found("x", "x", name)])

    async def script(d):
        await d.command("/model")
        check(d, name)
        assert shown(d).count(NAMES[name]) == 2
        await d.press("escape")
        d.engine.post(Loaded(name, 4096, "4-bit", 16_000_000_000))
        await d.settle()
        check(d, name)
        await d.exchange("q", "a")
        await d.command("/record")
        check(d, name)
        assert shown(d).count(NAMES[name]) == 2

    chat(script, SIZE)


def test_presets():
    async def script(d):
        presets, now = dict.fromkeys(NAMES, Preset()), Preset()
        await d.app.push_screen(SettingsScreen(now, presets, lambda _: None, now.sampling))
        options = d.app.screen.query_one("#preset", Select)._options
        for name, text in NAMES.items():
            (option,) = [p for p, value in options if value == name]
            assert isinstance(option, Content)
            assert option.plain == text

    chat(script, SIZE)


def test_titles(name):
    async def script(d):
        await d.exchange("q", "a")
        d.chat.talk.chat.title = name
        d.chat.keeper.keep(d.chat.talk)
        await d.command("/title")
        assert not BAD.search(shown(d))
        await d.command("/chats")
        check(d, name)

    chat(script, SIZE)


def test_what_a_name_is_as_text():
    assert harmless("a\r\nb\tc", is_name=True) == r"a\x0d\nb\tc"
    assert harmless("a\r\nb\tc") == "a\nb\tc"
