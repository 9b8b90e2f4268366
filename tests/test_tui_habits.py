"""Keys that people know from elsewhere: Ctrl+C, Ctrl+D, messages that wait for their turn, the editor, copies, search."""

from __future__ import annotations

import pytest
from textual.widgets import Input
from textual.widgets.text_area import Selection

from tests.test_tui_keys import burst
from tests.tui_pilot import chat, kept
from tui.screens.text import HelpScreen
from tui.store import Attachment, drafts


def test_ctrl_c_stops_an_answer_and_keeps_it():
    async def script(d):
        await d.say("q")
        await d.post(d.text("half"))
        d.chat.entry.prompt.replace_text("next")
        await d.press("ctrl+c")
        assert d.engine.stops == 1
        assert d.app.is_running
        assert d.chat.entry.prompt.text == "next"
        await d.post(d.end("stopped"))
        assert d.said == ["q", "half"]

    chat(script)


def test_ctrl_c_clears_the_prompt_which_up_and_undo_bring_back():
    async def script(d):
        for back in ("up", "ctrl+underscore"):
            d.app._interrupted_at = float("-inf")
            await d.type("some text")
            await d.press("ctrl+c")
            assert d.chat.entry.prompt.text == ""
            assert d.toasts[-1] == "Cleared; Up brings it back. Once more quits."
            await d.press(back)
            assert d.chat.entry.prompt.text == "some text"
            assert d.app.is_running
            await d.press("ctrl+u")

    chat(script)


def test_what_was_written_beside_a_recalled_text_is_cleared_and_comes_back_too():
    async def script(d):
        await d.exchange("sent", "a")
        await d.type("written")
        await d.press("up", "ctrl+c")
        assert d.chat.entry.prompt.text == ""
        await d.press("up")
        assert d.chat.entry.prompt.text == "sent"
        await d.press("up")
        assert d.chat.entry.prompt.text == "written"

    chat(script)


@pytest.mark.parametrize("running", [False, True])
def test_ctrl_c_twice_quits_and_keeps_the_draft(tmp_path, running):
    path, at = tmp_path / "chats.db", []

    async def script(d):
        if running:
            await d.say("q")
            await d.post(d.text("half"))
        at.append(d.chat.talk.chat.id)
        await d.type("a draft")
        d.chat.entry.attachments.add(Attachment("a.txt", "text"))
        await d.press("ctrl+c", "ctrl+c")
        assert not d.app.is_running

    app = chat(script, path=path)
    assert app.return_code == 0

    async def later(d):
        assert drafts.load(d.chat.keeper.db, at[0]) == "a draft"
        assert drafts.load_attachments(d.chat.keeper.db, at[0]) == [Attachment("a.txt", "text")]

    chat(later, path=path)


def test_ctrl_c_again_after_a_while_does_not_quit():
    async def script(d):
        await d.press("ctrl+c")
        d.app._interrupted_at -= 60
        await d.press("ctrl+c")
        assert d.app.is_running
        assert d.toasts == ["Once more quits.", "Once more quits."]

    chat(script)


def test_ctrl_c_copies_what_is_selected_once():
    async def script(d):
        await d.type("abc")
        d.chat.entry.prompt.selection = Selection((0, 0), (0, 2))
        await d.press("ctrl+c")
        assert (d.app.clipboard, d.chat.entry.prompt.text) == ("ab", "abc")
        await d.press("ctrl+c")
        assert (d.app.clipboard, d.chat.entry.prompt.text) == ("ab", "")
        assert d.app.is_running

    chat(script)


def test_ctrl_c_closes_what_is_open():
    async def script(d):
        kept(d, "one", 1)
        for keys in (["f1"], ["ctrl+o"], ["ctrl+p"], ["ctrl+o", "down", "ctrl+r"]):
            await d.press(*keys)
            opened = d.app.screen
            assert opened is not d.chat
            d.app._interrupted_at = float("-inf")
            if d.app.screen.query(Input) and d.app.screen.query_one(Input).selected_text:
                await d.press("ctrl+c")
            await d.press("ctrl+c")
            assert d.app.screen is not opened
        d.app._interrupted_at = float("-inf")
        await burst(d, ["escape", "f1", "ctrl+c", *"text"])
        assert not isinstance(d.app.screen, HelpScreen)
        assert d.chat.entry.prompt.text == "text"

    chat(script)


def test_ctrl_d_quits_where_there_is_nothing_to_delete():
    async def script(d):
        await d.type("ab")
        await d.press("home", "ctrl+d", "ctrl+d")
        assert d.chat.entry.prompt.text == ""
        assert d.app.is_running
        await burst(d, [*"x", "backspace", "ctrl+d"])
        assert not d.app.is_running

    assert chat(script).return_code == 0
