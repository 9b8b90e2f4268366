"""Two windows with one store: each shows what the other has said, and neither loses anything."""

from __future__ import annotations

import pytest

from tests.tui_pilot import chat
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.store import Turn, chats, turns
from tui.store.records import USER


def no_trouble(text):
    raise AssertionError(text)


class Window:
    """Another window: it opens the chat that was changed last, and can say something in it."""

    def __init__(self, path):
        self.keeper = Keeper(path, no_trouble)
        self.talk = self.keeper.latest()

    def says(self, question, answer, **where):
        asked = self.talk.add("user", question, **where)
        said = self.talk.add("assistant", answer)
        self.keeper.keep(self.talk, asked, said)
        return asked

    def close(self):
        assert self.keeper.close()


@pytest.fixture
def other(tmp_path):
    """Opens another window; all are closed at the end."""
    opened = []

    def open_window():
        opened.append(Window(tmp_path / "chats.db"))
        return opened[-1]

    yield open_window
    for window in opened:
        window.close()


def stored(path):
    keeper = Keeper(path, no_trouble)
    found = {c.title: [t.content for t in turns.load(keeper.db, c.id)] for c in chats.listed(keeper.db)}
    keeper.close()
    return found


async def reopen(d):
    await d.press("ctrl+o", "enter")


def test_a_chat_that_is_reopened_shows_the_turns_of_another_window(tmp_path, other):
    async def script(d):
        await d.exchange("one", "1")
        window = other()
        window.says("two", "2")
        await reopen(d)
        assert d.said == ["one", "1", "two", "2"]
        assert "two" in "".join(d.screen_text)
        window.says("three", "3")
        answer = next(t for t in window.talk.path() if t.content == "2")
        answer.content = "2 and more"  # it was not at its end
        window.keeper.keep(window.talk, answer)
        await reopen(d)
        assert d.said == ["one", "1", "two", "2 and more", "three", "3"]
        await d.command("/undo")
        assert d.said[-1] == "2 and more"

    chat(script, path=tmp_path / "chats.db")


def test_questions_of_two_windows_become_branches(tmp_path, other):
    async def script(d):
        await d.exchange("one", "1")
        window = other()
        window.says("theirs", "t")
        await d.exchange("ours", "o")
        assert d.said == ["one", "1", "ours", "o"]
        assert "branch 1/2" in "".join(d.screen_text)
        window.says("more of theirs", "tt")
        await reopen(d)
        assert d.said == ["one", "1", "ours", "o"]
        assert "Another window has added 2 turns on other branches; /tree shows them." in d.toasts
        await d.press("alt+up", "alt+up", "]")
        assert d.said == ["one", "1", "theirs", "t", "more of theirs", "tt"]

    chat(script, path=tmp_path / "chats.db")
    (said,) = stored(tmp_path / "chats.db").values()
    assert sorted(said) == sorted(["one", "1", "ours", "o", "theirs", "t", "more of theirs", "tt"])


def test_what_runs_here_is_not_taken_from_the_store(tmp_path, other):
    async def script(d):
        await d.exchange("one", "1")
        window = other()
        await d.say("two")
        await d.post(d.text("begun"))
        window.says("theirs", "t")
        await reopen(d)
        await d.post(d.text(" and ended"), d.end())
        assert d.said == ["one", "1", "two", "begun and ended"]

    chat(script, path=tmp_path / "chats.db")


def test_two_windows_go_on_with_the_same_answer(tmp_path, other):
    async def script(d):
        await d.exchange("one", "cut")
        window = other()
        await d.command("/continue")
        await d.post(d.text(" here"), d.end())
        theirs = window.talk.leaf
        theirs.content += " there"
        window.keeper.keep(window.talk, theirs)
        assert d.said == ["one", "cut here"]

    chat(script, path=tmp_path / "chats.db")
    (said,) = stored(tmp_path / "chats.db").values()
    assert sorted(said) == ["cut here", "cut there", "one"]


def test_titles_pins_and_deletions_of_another_window(tmp_path, other):
    async def script(d):
        await d.exchange("one", "1")
        window = other()
        window.keeper.rename(window.talk, "Their title")
        window.keeper.db.write(chats.deleting(window.talk.chat.id))
        await d.exchange("two", "2")
        assert d.chat.talk.chat.title == "Their title"
        assert "This chat had been deleted; your question has brought it back." in d.toasts
        await d.command("/title Ours")
        assert [c.title for c in chats.listed(window.keeper.db)] == ["Ours"]
        window.keeper.db.write(("DELETE FROM chats WHERE id = ?", (window.talk.chat.id,)))  # for good
        await d.exchange("three", "3")

    chat(script, path=tmp_path / "chats.db")
    ((title, said),) = stored(tmp_path / "chats.db").items()
    assert (title, sorted(said)) == ("Ours", sorted(["one", "1", "two", "2", "three", "3"]))


def test_turns_that_are_taken_in_keep_the_view_and_the_tree():
    talk = Conversation()
    first = talk.add(USER, "one")
    second = Turn(USER, "two", first.id)
    lost = Turn(USER, "lost", "nobody")
    assert talk.take_in([Turn(USER, "newer", "x", id=first.id), second, lost]) == [second, lost]
    assert [t.content for t in talk.path()] == ["newer"]
    assert (first.parent, lost.parent) == (None, None)
    assert talk.has_answers(first)
    assert [t.content for t in talk.siblings(lost)] == ["newer", "lost"]
