"""A draft belongs to its chat and is never lost or shown elsewhere; a list keeps its selection."""

from __future__ import annotations

import asyncio

import pytest
from textual.widgets import OptionList

from tests.tui_pilot import chat, kept
from tui.store import Attachment, chats, drafts


def test_a_list_keeps_its_selection_by_id():
    async def script(d):
        ids = [kept(d, f"chat {n}", n) for n in range(5)]
        await d.press("ctrl+o", "down", "down", "down")
        found = d.app.screen.query_one(OptionList)
        await d.press("ctrl+t")  # it goes to the top
        assert (found.chosen, found.highlighted) == ((ids[3], None), 0)
        await d.press("ctrl+t")  # and back
        assert (found.chosen, found.highlighted) == ((ids[3], None), 3)
        await d.press("ctrl+x")  # the next one is in its place
        assert found.chosen == (ids[4], None)
        await d.press("ctrl+z")
        assert found.chosen == (ids[4], None)
        await d.type("chat 1")  # the first of what is found
        assert (found.chosen[0], found.highlighted) == (ids[1], 0)

    chat(script)


def test_a_completion_that_was_chosen_stays_chosen():
    async def script(d):
        await d.type("/c")
        await d.press("down", "down", "down")
        assert d.chat.entry.completion.chosen == "/code"
        await d.type("o")
        assert d.chat.entry.completion.chosen == "/code"
        await d.type("p")
        assert d.chat.entry.completion.chosen == "/copy"

    chat(script)


@pytest.mark.parametrize("wait_s", [0.3, 0.7, 0.95])
def test_a_draft_belongs_to_its_chat(wait_s):
    """Also where the timer that saves it runs while another chat is being shown."""

    async def script(d):
        one, two = (kept(d, f"chat {n}", n) for n in range(2))
        await d.chat.open_chat(d.chat.keeper.open(one))
        d.chat.entry.prompt.replace_text("only for one")
        await asyncio.sleep(wait_s)
        await d.chat.open_chat(d.chat.keeper.open(two))
        assert d.chat.entry.prompt.text == ""
        await asyncio.sleep(0.8)
        assert [drafts.load(d.chat.keeper.db, chat_id) for chat_id in (one, two)] == ["only for one", ""]
        await d.chat.open_chat(d.chat.keeper.open(one))
        assert d.chat.entry.prompt.text == "only for one"

    chat(script)


def test_what_is_written_in_a_new_chat_is_not_lost(tmp_path):
    path = tmp_path / "chats.db"

    async def script(d):
        await d.type("half a thought")
        d.chat.entry.attachments.add(Attachment("a.txt", "text"))
        left = d.chat.talk.chat.id
        await d.press("ctrl+n")
        assert d.chat.entry.prompt.text == ""
        assert not d.chat.entry.attachments.found
        await d.press("ctrl+o")
        assert "draft: half a thought  0 turns" in "\n".join(d.screen_text)
        await d.press("enter")
        assert d.chat.talk.chat.id == left
        assert d.chat.entry.prompt.text == "half a thought"
        assert [a.name for a in d.chat.entry.attachments.found] == ["a.txt"]
        await d.press("ctrl+u", "ctrl+n")

    chat(script, path=path)

    async def empty(d):
        assert chats.listed(d.chat.keeper.db) == []

    chat(empty, path=path)


def test_what_was_being_written_comes_back_not_what_was_recalled():
    async def script(d):
        await d.exchange("sent before", "a")
        first = d.chat.talk.chat.id
        await d.type("new text")
        await d.press("up")
        assert d.chat.entry.prompt.text == "sent before"
        await d.press("ctrl+n", "down")
        assert d.chat.entry.prompt.text == ""
        await d.press("ctrl+z")  # nor does undo bring another chat's text
        assert d.chat.entry.prompt.text == ""
        await d.chat.open_chat(d.chat.keeper.open(first))
        assert d.chat.entry.prompt.text == "new text"

    chat(script)


def test_an_empty_chat_says_why_it_is_not_pinned():
    async def script(d):
        await d.command("/pin")
        assert d.toasts == ["There is nothing to pin yet; ask something first."]
        assert not d.chat.talk.chat.pinned
        await d.exchange("q", "a")
        await d.command("/pin")
        assert d.chat.talk.chat.pinned

    chat(script)


def test_a_format_that_does_not_exist_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def script(d):
        await d.exchange("q", "a")
        await d.command("/export xml")
        assert d.toasts == ["[export] there is no format xml; give md or json, and then a path if you like."]
        assert not [*tmp_path.iterdir()]
        await d.command("/export md xml")
        await d.command("/export notes.txt")
        assert {p.name for p in tmp_path.iterdir()} == {"xml", "notes.txt"}

    chat(script)


def test_attachments_without_a_text_go_along_to_the_next_chat():
    """No list shows the empty chat that they were in."""

    async def script(d):
        one = kept(d, "chat", 1)
        d.chat.entry.attachments.add(Attachment("a.txt", "text"))
        await d.press("ctrl+n")
        assert [a.name for a in d.chat.entry.attachments.found] == ["a.txt"]
        await d.chat.open_chat(d.chat.keeper.open(one))
        assert [a.name for a in d.chat.entry.attachments.found] == ["a.txt"]
        await d.press("ctrl+n")
        assert d.chat.entry.attachments.found == []

    chat(script)


def test_another_text_of_the_same_name_is_attached_too():
    async def script(d):
        for text in ("one", "two", "one", "three"):
            d.chat.entry.attachments.add(Attachment("a.txt", text))
        found = [(a.name, a.text) for a in d.chat.entry.attachments.found]
        assert found == [("a.txt", "one"), ("a.txt (2)", "two"), ("a.txt (3)", "three")]

    chat(script)
