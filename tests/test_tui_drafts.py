"""A draft belongs to its chat and is never lost or shown elsewhere; a list keeps its selection."""

from __future__ import annotations

import asyncio
import time

import pytest
from textual.widgets import OptionList

from tests.tui_pilot import FakeEngine, chat, kept
from tui import commands, config, files, paths
from tui.keeper import Keeper
from tui.messages import Failed, Loaded, ModelChoice
from tui.screens.view import DRAFT_EVERY_S
from tui.store import Attachment, Database, chats, drafts, rows


def test_a_draft_is_kept_while_one_goes_on_typing():
    async def script(d):
        for _ in range(8):
            await d.type("word ")
            await asyncio.sleep(0.25)
        assert drafts.load(d.chat.keeper.db, d.chat.talk.chat.id).startswith("word")

    chat(script)


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


def test_attachments_of_a_draft_are_on_the_disk(tmp_path):
    path, files_of = tmp_path / "chats.db", {}

    async def script(d):
        one = kept(d, "chat", 1)
        await d.chat.open_chat(d.chat.keeper.open(one))
        d.chat.entry.attachments.add(Attachment("a.txt", "text"))
        await d.settle()
        d.chat.keep_draft()
        db = Database(path)  # as it is for another window, or after a kill -9
        files_of["written"] = drafts.load_attachments(db, one)
        db.close()

    chat(script, path=path)
    assert files_of["written"] == [Attachment("a.txt", "text")]

    async def later(d):
        (one,) = chats.listed(d.chat.keeper.db)
        await d.chat.open_chat(d.chat.keeper.open(one.id))
        assert d.chat.entry.attachments.found == [Attachment("a.txt", "text")]
        await d.say("with it")
        assert drafts.load_attachments(d.chat.keeper.db, one.id) == []

    chat(later, path=path)


def test_attachments_that_are_damaged_on_the_disk_are_marked(tmp_path):
    db = Database(tmp_path / "chats.db")
    db.write(drafts.saving_attachments("x", [Attachment("a", "b")]), drafts.saving("x", "text"))
    db.write(("UPDATE drafts SET content = ? WHERE chat != 'x'", ('[["a", "other"]]',)))
    assert drafts.load_attachments(db, "x") == [Attachment(f"{rows.MARK} a", "other")]
    db.write(("UPDATE drafts SET content = '{' WHERE chat != 'x'", ()))
    assert drafts.load_attachments(db, "x") == [Attachment(rows.MARK, "{")]
    db.write(*drafts.removing("x"))
    assert (drafts.load(db, "x"), drafts.load_attachments(db, "x")) == ("", [])
    db.close()


@pytest.mark.parametrize("says_which", [True, False])
def test_a_model_is_stored_once_it_is_loaded(tmp_path, monkeypatch, says_which):
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))

    def stored():
        return config.load(paths.config_file())[0].model

    def loaded(path):
        return Loaded("m", 9, choice=ModelChoice(path) if says_which else None)

    async def script(d):
        await d.command("/model mistyped")
        assert stored() == ""
        await d.post(Failed("[hub] no such folder"))
        if says_which:
            await d.post(loaded("old"))  # the old model comes back
        assert stored() == ""
        await d.command("/model one")
        await d.command("/model typo")
        await d.post(loaded("one"), Failed("[hub] no such folder"))
        assert stored() == "one"

    chat(script, engine=FakeEngine())


NAMES = [
    "a.txt",
    "sp ace.txt",
    "two  spaces and an end.",
    "it's.txt",
    "a(1) [x]{2}.txt",
    "@at.txt",
    "ünï.txt",
    "x, y.txt",
]


def test_a_file_is_attached_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (*NAMES, "other.txt"):
        (tmp_path / name).write_text("text of it")

    async def script(d):
        d.chat.entry.prompt.replace_text(f"see @{NAMES[1]} and @other.txt.")
        d.chat.entry.prompt.send()
        await d.settle()
        first = next(iter(d.chat.talk.turns.values()))
        assert [a.name for a in first.attachments] == [NAMES[1], "other.txt"]

    chat(script)
    for name in NAMES:
        for written in (f"see @{name}", f"@{name}, please", f"@{name}\nand more", f"@{name} and @{name}"):
            assert files.mentioned(written) == [name]
        if "'" not in name:
            assert files.mentioned(f"@'{name}' and more") == [name]
        assert files.mentioned(f"@{name.replace(' ', chr(92) + ' ')} and more") == [name]


def test_a_name_with_spaces_is_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sp ace one.txt").write_text("1")
    (tmp_path / "sp ace two.txt").write_text("2")

    async def script(d):
        await d.type("see @sp ace tw")
        assert d.chat.entry.completion.keys[0] == "sp ace two.txt"
        await d.press("tab")
        assert d.chat.entry.prompt.text == "see @sp ace two.txt "
        await d.type("what")
        assert not d.chat.entry.completion.display
        await d.press("enter")
        assert d.chat.talk.leaf is not None
        assert "2" in d.engine.asked[0][0]

    chat(script)


def test_mentions_without_end_take_no_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    assert files.mentioned("@ab c " * 50_000) == []
    assert files.begun("@ab c " * 50_000) is None
    assert time.process_time() - started < 5


def test_a_refused_file_keeps_the_question_unsent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.bin").write_bytes(b"\xff\0")

    async def script(d):
        d.chat.entry.prompt.replace_text("compare @good.txt with @bad.bin")
        d.chat.entry.prompt.send()
        await d.settle()
        assert d.engine.questions == []
        assert d.chat.entry.prompt.text == "compare @good.txt with @bad.bin"
        assert d.chat.entry.attachments.found == []
        assert d.toasts == ["[attach] bad.bin is not UTF-8 text; attach a text file."]
        (tmp_path / "bad.bin").write_text("now good")
        d.chat.entry.prompt.send()
        await d.settle()
        assert len(d.engine.questions) == 1
        assert d.chat.entry.prompt.text == ""

    chat(script)


def test_a_chat_that_another_window_deletes_is_not_lost(tmp_path):
    path = tmp_path / "chats.db"

    async def script(d):
        await d.say("q")
        chat_id = d.chat.talk.chat.id
        other = Keeper(path, print)
        other.db.write(chats.deleting(chat_id))
        await d.post(d.text("answer"), d.end())
        assert "your next question brings it back" in d.toasts[-1]
        assert chats.load(other.db, chat_id).deleted
        assert other.open(chat_id).path()[-1].content == "answer"
        await d.say("and")
        assert "has brought it back" in d.toasts[-1]
        assert chats.load(other.db, chat_id).deleted is None
        assert not other.is_deleted(d.chat.talk)
        other.close()

    chat(script, path=path)


@pytest.mark.parametrize("ends", ["signal", "kill"])
def test_what_is_written_in_a_dialog_is_a_draft_until_it_is_used(tmp_path, ends):
    async def script(d):
        await d.exchange("question", "answer")
        await d.type("begun")
        await d.press("shift+tab", "up", "e")
        await d.type(" again")
        if ends == "signal":
            d.app.leave_chat(143)
            return
        await asyncio.sleep(DRAFT_EVERY_S + 0.1)
        assert drafts.load(d.chat.keeper.db, d.chat.talk.chat.id) == "question again\nbegun"
        await d.press("escape")
        assert d.toasts[-1] == "Nothing is changed; Up in the prompt brings your text back."
        await asyncio.sleep(DRAFT_EVERY_S + 0.1)
        assert drafts.load(d.chat.keeper.db, d.chat.talk.chat.id) == "begun"
        await d.press("ctrl+s", *["tab"] * 7)
        await d.type("Be brief.")
        await d.press("enter", *"Yes.")
        await d.press("ctrl+c")
        assert d.chat.system_prompt == ""
        d.chat.entry.prompt.replace_text("")
        d.chat.entry.prompt.focus()
        await d.press("up")
        assert d.chat.entry.prompt.text == "/system Be brief.\nYes."
        await d.press("enter")
        assert d.chat.system_prompt == "Be brief.\nYes."

    async def after(d):
        assert d.chat.entry.prompt.text == "question again\nbegun"

    chat(script, path=tmp_path / "chats.db")
    if ends == "signal":
        keeper = Keeper(tmp_path / "chats.db", print)
        talk = keeper.latest()
        keeper.close()
        chat(after, path=tmp_path / "chats.db", talk=talk)


def test_names_that_other_chats_have_for_a_command():
    async def script(d):
        await d.exchange("question", "answer")
        await d.command("/rename Mine")
        assert d.chat.talk.chat.title == "Mine"
        await d.type("/renam")
        assert [d.chat.entry.completion.chosen] == ["/title"]
        await d.press("tab")
        assert d.chat.entry.prompt.text == "/title "
        await d.command("/clear")
        assert d.chat.talk.turns == {}

    assert all(name not in commands.NAMED and known in commands.NAMED for name, known in commands.ALSO.items())
    chat(script)
