"""Lists and code in every theme, and toasts: where they are, how they leave, and what they say."""

from __future__ import annotations

import pytest
from textual.color import Color
from textual.widgets._toast import Toast

from tests.test_tui_screens import contrast
from tests.tui_pilot import chat
from tui.config import load
from tui.keeper import Keeper
from tui.store import StoreError
from tui.transfer import import_talk

LONG = (
    "[store] the file cannot be written (No space left on device); free some space, and what was said is saved then. "
    * 2
)


def style_of(d, word):
    """The style of a word on the screen."""
    for strip in d.app.screen._compositor.render_strips():
        at = "".join(segment.text for segment in strip).find(word)
        for segment in strip if at >= 0 else ():
            if at < len(segment.text):
                return segment.style
            at -= len(segment.text)
    raise AssertionError(word)


def colours(style):
    return Color.from_rich_color(style.color), Color.from_rich_color(style.bgcolor)


def test_titles_are_brighter_than_remarks_and_code_has_a_background_in_every_theme():
    async def script(d):
        await d.exchange("q", "words\n\n```\nsome code\n```\n")
        await d.type("/attach")
        for theme in d.app.available_themes:
            d.app.theme = theme
            await d.pilot.pause()
            assert colours(style_of(d, "some code"))[1] != colours(style_of(d, "words"))[1], theme
            title, remark = style_of(d, "attach "), style_of(d, "attach a")
            assert title.bold, theme
            assert not remark.bold, theme
            if "ansi" not in theme:  # the terminal says what these are
                assert contrast(*colours(title)) > 1.2 * contrast(*colours(remark)), theme
                assert contrast(*colours(remark)) > 3, theme

    chat(script, (100, 40))


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (200, 60)])
@pytest.mark.parametrize("dialog", ["", "ctrl+o", "ctrl+s", "title"])
def test_toasts_never_cover_what_is_typed_and_leave_with_escape(size, dialog):
    async def script(d):
        await d.exchange("q", "a")
        if dialog == "title":
            await d.press("ctrl+o")
            await d.press("ctrl+r")
        elif dialog:
            await d.press(dialog)
        written_in = d.app.screen.focused if dialog else d.chat.entry
        rows = slice(written_in.region.y, written_in.region.bottom)
        before = d.screen_text[rows]
        for n in range(5):
            d.chat.say(f"{n} {LONG}", "error")
            await d.settle()
        assert d.screen_text[rows] == before
        assert "4 [store]" in "".join(d.screen_text), "the newest is seen"
        await d.press("escape")
        assert not d.toasts
        assert not d.app.screen.query(Toast)

    chat(script, size)


def keys_of(d):
    """The row with the keys of a dialog."""
    return [row.split("│")[1].strip() for row in d.screen_text if "Back" in row or "Leave" in row]


@pytest.mark.parametrize("size", [(40, 12), (80, 24)])
@pytest.mark.parametrize("keys", [["ctrl+o"], ["ctrl+s", "x", "enter"], ["ctrl+l"], ["shift+tab", "up", "e"], ["f1"]])
def test_toasts_cover_nothing_of_a_dialog(size, keys):
    async def script(d):
        await d.exchange("q", "a")
        await d.press(*keys)
        last = keys_of(d)
        d.chat.say(LONG, "error")
        await d.settle()
        (toast,), dialog = d.app.screen.query(Toast), d.app.screen.query_one(".dialog")
        assert toast.region.height
        assert dialog.region.bottom <= toast.region.y
        assert keys_of(d) == last

    chat(script, size)


def test_the_keys_of_the_list_are_all_seen_in_a_narrow_terminal():
    async def script(d):
        await d.exchange("q", "a")
        await d.press("ctrl+o")
        shown = " ".join(row.strip("│ ") for row in d.screen_text[-4:])
        assert "⏎ Open  esc Back  ^r Rename  ^t Pin ^x Delete  ^z Undo  ^e Export" in shown

    chat(script, (40, 12))


def test_what_is_said_again_is_shown_once():
    async def script(d):
        for _ in range(3):
            d.chat.say("the same", "warning")
            d.chat.say("another", "warning")
            await d.settle()
        assert sorted(d.toasts) == ["another", "the same"]
        assert len(d.app.screen.query(Toast)) == 2

    chat(script)


def test_a_store_that_cannot_be_made_is_said_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    told = []
    Keeper(tmp_path / "file" / "chats.db", told.append).close()
    assert told
    assert "Errno" not in told[0]


def test_an_error_of_a_file_is_in_words(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    for path, words in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "bytes", "not UTF-8 text"),
    ):
        with pytest.raises(StoreError, match=words) as e:
            import_talk(str(path))
        assert "Errno" not in str(e.value)
        assert path.name == "none" or (words in load(path)[1] and "Errno" not in load(path)[1])
