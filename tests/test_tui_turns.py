"""Every command about turns and chats, with a fake engine and a store on disk."""

from __future__ import annotations

import json

import pytest
from textual import events
from textual.widgets import Input, OptionList, TextArea

from tests.tui_pilot import SIZES, chat, pause
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Loaded, Sampling, sampling_as_dict
from tui.screens.chats import ChatsScreen
from tui.screens.text import HelpScreen, RecordScreen, TextScreen
from tui.store import Attachment, Call, Chat, Database, chats, turns
from tui.widgets.answer import CodeBlock
from tui.widgets.turn import TurnView
from tui.widgets.welcome import Starts


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chats.db"


def focused(d):
    view = d.chat.focused
    return view.turn.content if isinstance(view, TurnView) else None


async def answer(d, text, reason="stop"):
    await d.post(d.text(text), d.end(reason))


def test_regenerate_and_switch_branches():
    async def script(d):
        await d.exchange("q", "one")
        await d.press("ctrl+r")
        assert d.engine.asked[-1] == ["q"]
        await answer(d, "two")
        assert d.said == ["q", "two"]
        assert "branch 2/2" in "".join(d.screen_text)
        await d.press("alt+up", "left_square_bracket")
        assert d.said == ["q", "one"]
        assert focused(d) == "one"
        assert "branch 1/2" in "".join(d.screen_text)
        await d.press("left_square_bracket")
        assert "no other branch" in d.toasts[-1] if hasattr(d.toasts, "__getitem__") else True
        await d.command("/next")
        assert d.said == ["q", "two"]
        await d.command("/undo")
        await d.command("/undo")
        assert d.said == ["q", "two"]
        await d.command("/undo")
        assert d.said == ["q", "one"]
        assert len(d.chat.talk.turns) == 3

    chat(script)


def test_a_regenerated_answer_without_text_gives_way_to_the_old_one():
    async def script(d):
        await d.exchange("q", "one")
        await d.command("/regenerate")
        await d.post(d.end("stopped"))
        assert d.said == ["q", "one"]
        assert d.chat.entry.prompt.text == ""

    chat(script)


def test_repeat_asks_with_the_seed_and_sampling_of_the_record():
    async def script(d):
        await d.command("/set temp 0.9")
        await d.command("/budget 50")
        await d.exchange("q1", "a1")
        await d.command("/set temp 0")
        await d.command("/budget")
        await d.exchange("q2", "a2")
        await d.command("/go 2")
        await d.press("s")
        asked = d.engine.questions[-1]
        assert d.engine.asked[-1] == ["q1"]
        assert asked.sampling == Sampling(temp=0.9, thinking_budget=50, seed=7)
        await d.command("/set temp 0.1")
        await answer(d, "a1")
        assert d.said == ["q1", "a1"]
        assert "branch 2/2" in "".join(d.screen_text)
        assert d.chat.talk.leaf.record.sampling == sampling_as_dict(asked.sampling)
        await d.exchange("q3", "a3")
        assert d.engine.questions[-1].sampling == Sampling(temp=0.1)
        assert d.engine.questions[-1].sampling.seed is None

    chat(script)


def test_repeat_says_why_it_cannot_or_will_not_be_the_same():
    async def script(d):
        await d.command("/repeat")
        assert "There is no answer yet." in "".join(d.screen_text)
        await d.exchange("q", "a")
        d.chat.talk.leaf.record.sampling.pop("seed")
        await d.command("/repeat")
        assert "names no seed" in "".join(d.screen_text)
        assert len(d.engine.questions) == 1
        d.chat.talk.leaf.record.sampling["seed"] = 7
        d.chat.post_message(Loaded("other", 10))
        await d.command("/repeat")
        assert "That answer was fake's" in "".join(d.screen_text)
        assert d.engine.questions[-1].sampling.seed == 7

    chat(script, SIZES[1])


def test_the_palette_repeats_with_the_same_seed():
    async def script(d):
        await d.exchange("q", "a")
        await d.press("ctrl+p")
        await d.type("repeat")
        await pause(0.3)
        assert "again with the same seed" in "\n".join(d.screen_text)
        await d.press("enter", "enter")
        assert [q.sampling.seed for q in d.engine.questions] == [None, 7]

    chat(script)


CALL = '{\n  "name": "add",\n  "arguments": {\n    "a": 1\n  }\n}'


def called(content, *calls):
    """A chat of an older version or from elsewhere, whose answer asks for tools."""
    talk = Conversation()
    talk.add("user", "q")
    talk.add("assistant", content).calls = calls
    return talk


def test_a_stored_tool_call_is_shown_copied_kept_and_sent_back(path):
    async def script(d):
        assert d.app.query(CodeBlock).first().code.rstrip() == CALL
        rows = "".join(d.screen_text)
        assert rows.index("I call.") < rows.index('"add"') < rows.index('"sub"')
        assert "\x9b" not in rows
        await d.command("/code 1")
        assert d.app.clipboard.rstrip() == CALL
        await d.command("/copy")
        assert d.app.clipboard.startswith(f"I call.\n\n```json\n{CALL}\n```")
        await d.command("/continue")
        assert any("nothing to go on from" in text for text in d.toasts)
        await d.exchange("more", "ok")
        assert d.engine.questions[-1].messages[1] == {
            "role": "assistant",
            "content": "I call.",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
                {"type": "function", "function": {"name": "sub", "arguments": {"text": "\x9b<b>"}}},
            ],
        }
        await d.command("/go 2")
        await d.press("e")
        d.app.screen.query_one(TextArea).text = "I rather call."
        await d.press("ctrl+s")
        assert [c.name for c in d.chat.talk.leaf.calls] == ["add", "sub"]

    calls = (Call("add", {"a": 1}), Call("sub", {"text": "\x9b<b>"}))
    chat(script, SIZES[1], path=path, talk=called("I call.", *calls))
    keeper = Keeper(path, print)
    assert [c.name for c in keeper.latest().leaf.calls] == ["add", "sub"]
    keeper.close()


def test_an_answer_that_is_only_a_tool_call_is_sent_back():
    async def script(d):
        assert '"name": "add"' in "".join(d.screen_text)
        await d.exchange("more", "ok")
        assert [m["role"] for m in d.engine.questions[-1].messages] == ["user", "assistant", "user"]

    chat(script, talk=called("", Call("add", {"a": 1})))


def test_edit_a_question():
    async def script(d):
        await d.exchange("q1", "a1")
        await d.exchange("q2", "a2")
        await d.press("alt+up", "up", "up", "up")
        assert focused(d) == "q1"
        await d.press("e")
        assert isinstance(d.app.screen, TextScreen)
        d.app.screen.query_one(TextArea).text = "q1 better"
        await d.press("ctrl+s")
        assert d.engine.asked[-1] == ["q1 better"]
        await answer(d, "a better")
        assert d.said == ["q1 better", "a better"]
        await d.command("/undo")
        assert d.said == ["q1", "a1", "q2", "a2"]

    chat(script)


def test_an_edit_that_is_left_is_not_lost():
    async def script(d):
        await d.exchange("q1", "a1")
        await d.command("/edit")
        d.app.screen.query_one(TextArea).text = "q1 much better"
        await d.press("escape")
        assert (d.said, d.chat.entry.prompt.text) == (["q1", "a1"], "")
        await d.press("up")
        assert d.chat.entry.prompt.text == "q1 much better"

    chat(script)


def test_an_edit_of_nothing_asks_nothing():
    """Also where signs were made visible in it."""

    async def script(d):
        await d.exchange("q1 \x1b[31m", "a1")
        asked = len(d.engine.questions)
        await d.command("/edit")
        await d.press("ctrl+s")
        assert len(d.engine.questions) == asked
        assert d.said == ["q1 \x1b[31m", "a1"]

    chat(script)


def test_edit_an_answer_asks_nothing():
    async def script(d):
        await d.exchange("q1", "a1")
        asked = len(d.engine.questions)
        await d.press("alt+up", "e")
        d.app.screen.query_one(TextArea).text = "my own"
        await d.press("ctrl+s")
        assert d.said == ["q1", "my own"]
        assert d.chat.talk.leaf.record.is_edited
        assert len(d.engine.questions) == asked
        await d.press("alt+up", "e", "escape")
        assert d.said == ["q1", "my own"]

    chat(script)


def test_continue_a_stopped_answer():
    async def script(d):
        await d.say("q")
        await d.post(d.thought("hm", 5, 0.5), d.text("one"), d.end("stopped"))
        await d.press("ctrl+g")
        assert d.engine.questions[-1].continues
        assert d.engine.asked[-1] == ["q", "one"]
        await answer(d, " two")
        assert d.said == ["q", "one two"]
        assert d.chat.talk.leaf.record.generated_tokens == 8
        assert "one two" in "".join(d.screen_text)
        await d.command("/undo")
        assert d.said == ["q", "one"]

    chat(script)


def test_branch_from_any_turn():
    async def script(d):
        for n in range(3):
            await d.exchange(f"q{n}", f"a{n}")
        await d.command("/go 2")
        assert focused(d) == "a0"
        await d.press("b")
        assert d.said == ["q0", "a0"]
        await d.exchange("other", "way")
        assert d.said == ["q0", "a0", "other", "way"]
        assert d.engine.asked[-1] == ["q0", "a0", "other"]
        await d.command("/previous")
        assert d.said == ["q0", "a0", "q1", "a1", "q2", "a2"]
        await d.command("/go 3")
        await d.press("b")
        assert d.said == ["q0", "a0"]
        assert d.chat.entry.prompt.text == "q1"

    chat(script)


def test_undo_gives_the_question_back():
    async def script(d):
        await d.exchange("q", "a")
        await d.command("/undo")
        assert d.said == []
        assert d.chat.entry.prompt.text == "q"
        await d.command("/undo")
        assert "nothing to undo" in "".join(d.screen_text)

    chat(script)


def test_going_from_turn_to_turn():
    async def script(d):
        for n in range(3):
            await d.exchange(f"q{n}", f"a{n}")
        await d.press("alt+up")
        assert focused(d) == "a2"
        await d.press("k", "k", "up")
        assert focused(d) == "q1"
        await d.press("home")
        assert focused(d) == "q0"
        await d.press("end")
        assert focused(d) == "a2"
        await d.press("down")
        assert d.chat.focused is d.chat.entry.prompt
        await d.press("shift+tab")
        assert focused(d) == "a2"
        await d.press("tab")
        assert d.chat.focused is d.chat.entry.prompt
        for number in ("99", "\u00b2", "9" * 5000):  # a digit that is no number, and more than Python reads
            await d.command(f"/go {number}")
            assert d.chat.focused is d.chat.entry.prompt

    chat(script)


def test_copies_have_no_thought():
    async def script(d):
        await d.say("q")
        await d.post(d.thought("secret", 2, 0.1), d.text("It is\n\n```py\nx = 1\n```\n\n```\ny\n```\n"), d.end())
        await d.command("/copy")
        assert d.app.clipboard.startswith("It is")
        assert "secret" not in d.app.clipboard
        await d.command("/code")
        assert d.app.clipboard == "y"
        await d.command("/code 1")
        assert d.app.clipboard == "x = 1"
        for number in ("5", "9" * 5000):
            await d.command(f"/code {number}")
            assert d.app.clipboard == "x = 1"
        await d.command("/code \u00b2")
        assert d.app.clipboard == "y"
        await d.pilot.click("#turns CodeBlock:last-of-type .copy")
        await d.settle()
        await d.press("alt+up", "up", "c")
        assert d.app.clipboard == "q"

    chat(script, SIZES[1])


def test_the_record_of_an_answer():
    async def script(d):
        await d.command("/record")
        await d.exchange("q", "a")
        await d.press("alt+up", "i")
        assert isinstance(d.app.screen, RecordScreen)
        text = "\n".join(d.screen_text)
        for part in ("fake, 4-bit", "seed 7", "20 tokens, 8 of them reused", "after 0.12 s", "99.0 tok/s", "stop"):
            assert part in text
        await d.press("escape")
        assert d.app.screen is d.chat

    chat(script)


def test_every_turn_is_on_disk_while_it_comes_and_afterwards(path):
    async def script(d):
        await d.say("what is it")
        await d.post(d.thought("hm", 2, 0.1), d.text("half"))
        d.chat.keeper._wrote_at = 0
        await d.post(d.text(" an answer"))
        other = Database(path)
        (found,) = chats.listed(other)
        assert [t.content for t in turns.load(other, found.id)] == ["what is it", "half an answer"]
        await d.post(d.end())
        (found,) = chats.listed(other)
        assert found.title == "what is it: half an answer"[:48] or found.title.startswith("what is it")
        assert turns.load(other, found.id)[1].record.finish_reason == "stop"
        other.close()

    assert chat(script, path=path).all_saved


@pytest.mark.parametrize("begun", ["", "\n"])
def test_a_question_taken_back_is_no_turn_on_disk_but_a_draft(path, begun):
    async def script(d):
        await d.say("hi")
        if begun:
            await d.post(d.text(begun))
        await d.post(d.end("stopped"))

    chat(script, path=path)
    db = Database(path)
    assert db.read("SELECT count(*) FROM turns")[0][0] == 0
    assert [chat.title for chat in chats.listed(db)] == ["draft: hi"]
    db.close()


def test_a_chat_is_resumed_with_its_draft_and_branches(path):
    async def first(d):
        await d.exchange("q", "one")
        await d.command("/regenerate")
        await answer(d, "two")
        await d.command("/previous")
        d.chat.entry.prompt.replace_text("unsent")
        await d.press("ctrl+q")

    chat(first, path=path)
    db = Database(path)
    (found,) = chats.listed(db)
    talk = Conversation(chats.load(db, found.id), turns.load(db, found.id))
    db.close()

    async def second(d):
        assert d.said == ["q", "one"]
        assert d.chat.entry.prompt.text == "unsent"
        assert "one" in "".join(d.screen_text)
        assert d.chat.entry.prompt.past == ["q"]
        await d.command("/next")
        assert d.said == ["q", "two"]

    chat(second, path=path, talk=talk)


async def three_chats(d):
    for n in ("alpha", "beta", "gamma"):
        await d.exchange(f"{n} question here", f"answer about {n} rings")
        await d.press("ctrl+n")


@pytest.mark.parametrize("size", SIZES)
def test_the_chats_screen(size, path):
    async def script(d):
        await three_chats(d)
        await d.press("ctrl+o")
        screen = d.app.screen
        assert isinstance(screen, ChatsScreen)
        rows = [option.prompt.plain for option in screen.query_one(OptionList).options]
        assert [c for c in " ".join(rows).split() if c in ("alpha", "beta", "gamma")] == ["gamma", "beta", "alpha"]
        await d.press("down", "ctrl+t")
        assert "★ beta" in "\n".join(d.screen_text)
        await d.press("ctrl+x")
        assert screen.query_one(OptionList).option_count == 2
        await d.press("ctrl+z")
        assert screen.query_one(OptionList).option_count == 3
        await d.press("up", "up", "ctrl+r")
        d.app.screen.query_one(Input).value = "renamed"
        await d.press("enter")
        assert "★ renamed" in "\n".join(d.screen_text)
        await d.press(*"alph")
        assert screen.query_one(OptionList).option_count == 2
        text = "\n".join(d.screen_text)
        assert "answer about alpha rings" in text
        await d.press("enter")
        assert d.app.screen is d.chat
        assert d.said == ["alpha question here", "answer about alpha rings"]
        assert focused(d) is not None

    chat(script, size, path=path)


def test_search_from_the_prompt_and_a_hit_on_another_branch(path):
    async def script(d):
        await d.exchange("q", "needle")
        await d.command("/regenerate")
        await answer(d, "hay")
        await d.exchange("more", "hay")
        await d.command("/chats needle")
        await d.press("enter")
        assert d.said == ["q", "needle"]
        assert focused(d) == "needle"
        await d.command("/undo")
        assert d.said == ["q", "hay", "more", "hay"]

    chat(script, path=path)


def test_title_pin_delete_and_restore(path):
    async def script(d):
        await d.exchange("question", "answer")
        await d.command("/title My chat")
        await d.command("/pin")
        (found,) = chats.listed(d.chat.keeper.db)
        assert (found.title, found.pinned) == ("My chat", True)
        await d.command("/delete")
        assert d.said == []
        assert all(kind != "open" for kind, _ in d.chat.query_one(Starts).keys), "it is not among the recent chats"
        assert chats.listed(d.chat.keeper.db) == []
        await d.command("/restore")
        assert d.said == ["question", "answer"]
        assert len(chats.listed(d.chat.keeper.db)) == 1

    chat(script, path=path)


def test_what_the_list_or_another_window_does_to_the_chat_in_view_is_kept(path):
    async def script(d):
        await d.exchange("question", "answer")
        await d.press("ctrl+o", "ctrl+r")
        d.app.screen.query_one(Input).value = "from the list"
        await d.press("enter", "ctrl+t", "escape")
        other = Database(path)
        await d.exchange("more", "text")
        (found,) = chats.listed(other)
        assert (found.title, found.pinned, found.turns) == ("from the list", True, 4)
        other.write(chats.renaming(found.id, "from elsewhere"))
        await d.exchange("yet more", "text")
        assert chats.listed(other)[0].title == "from elsewhere"
        other.close()
        await d.press("ctrl+o", "ctrl+x", "escape")
        assert d.said == []
        await d.command("/restore")
        assert d.said[0] == "question"

    chat(script, path=path)


def test_export_and_import(path, tmp_path):
    async def script(d):
        await d.exchange("question one", "answer")
        await d.command("/export")
        assert (tmp_path / "question-one.md").read_text().startswith("# question one\n\n## You\n\nquestion one\n")
        await d.command("/export")
        assert "is there already" in "".join(d.screen_text)
        await d.command("/export json out.json")
        assert json.loads((tmp_path / "out.json").read_text())["turns"][1]["content"] == "answer"
        await d.command("/import out.json")
        assert d.said == ["question one", "answer"]
        assert len(chats.listed(d.chat.keeper.db)) == 2
        await d.command("/import nowhere.json")
        await d.command("/export question-one.md/x.md")
        await d.press("escape", "ctrl+o", "ctrl+e")  # without toasts, which may lie over the dialog's own line
        assert "question-one.md is there already" in "".join(d.screen_text)

    chat(script, path=path)


def test_attachments_from_mentions_commands_and_drops(tmp_path):
    (tmp_path / "notes.txt").write_text("some notes\n")
    (tmp_path / "my file.txt").write_text("spaces\n")
    (tmp_path / "binary").write_bytes(b"\xff\x00")

    async def script(d):
        prompt = d.chat.entry.prompt
        await d.type("read @not")
        await d.press("enter")
        assert prompt.text == "read @notes.txt "
        await d.press("enter")
        assert d.engine.asked == [["read @notes.txt\n\nnotes.txt:\n```\nsome notes\n```"]]
        assert d.chat.talk.path()[0].attachments == (Attachment("notes.txt", "some notes\n"),)
        await answer(d, "ok")
        d.app.post_message(events.Paste(str(tmp_path / "my file.txt").replace(" ", "\\ ")))
        await d.settle()
        assert [a.name for a in d.chat.entry.attachments.found] == ["my file.txt"]
        assert "my file.txt 7 B, 1 line" in "".join(d.screen_text)
        await d.press("backspace")
        assert not d.chat.entry.attachments.found
        await d.command("/attach notes.txt")
        await d.pilot.click("Chip")
        assert not d.chat.entry.attachments.found
        await d.command("/attach binary")
        await d.command("/attach nowhere")
        assert not d.chat.entry.attachments.found
        await d.command("/attach notes.txt")
        await d.press("enter")
        assert d.engine.asked[-1][-1] == "notes.txt:\n```\nsome notes\n```"
        await d.post(d.end("stopped"))
        assert [a.name for a in d.chat.entry.attachments.found] == ["notes.txt"]

    chat(script, SIZES[1])


def test_pastes():
    async def script(d):
        prompt = d.chat.entry.prompt
        d.app.post_message(events.Paste("a\x1b[2Jb\rc\r\nd\te"))
        await d.settle()
        assert prompt.text == "a\\x1b[2Jb\nc\nd\te"
        d.app.post_message(events.Paste("and/or"))
        await d.settle()
        assert prompt.text.endswith("eand/or")
        d.app.post_message(events.Paste("long\n" * 100))
        await d.settle()
        assert [a.name for a in d.chat.entry.attachments.found] == ["pasted 1"]
        assert "long" not in prompt.text
        assert d.engine.asked == []

    chat(script)


def test_slash_commands_complete_and_wrong_ones_are_said():
    async def script(d):
        prompt, completion = d.chat.entry.prompt, d.chat.entry.completion
        await d.press("slash", "b")
        assert [o.prompt.plain.split()[0] for o in completion.options] == ["/branch", "/budget"]
        await d.press("down", "tab")
        assert prompt.text == "/budget "
        assert not completion.display
        await d.press(*"100", "enter")
        assert d.chat.sampling.thinking_budget == 100
        await d.press("slash", "x", "x", "enter")
        assert "There is no command /xx" in "".join(d.screen_text)
        assert prompt.text == "/xx"
        prompt.replace_text("")
        await d.press("slash", "h", "e", "enter")
        assert isinstance(d.app.screen, HelpScreen)
        await d.press("escape", "slash", "escape")
        assert not completion.display
        prompt.replace_text("")
        await d.say("/usr/bin is a path")
        assert d.engine.asked == [["/usr/bin is a path"]]

    chat(script, SIZES[1])


def test_keys_that_are_faster_than_the_list_do_not_run_its_first_command(monkeypatch):
    async def script(d):
        await d.press("slash")
        assert d.chat.entry.completion.chosen == "/stop"
        monkeypatch.setattr(d.chat.entry.completion, "offer", lambda *_: None)
        await d.press(*"help", "enter")
        assert isinstance(d.app.screen, HelpScreen)
        assert d.engine.stops == 0

    chat(script)


def test_a_store_that_fails_keeps_the_chat_in_memory(path):
    async def script(d):
        await d.exchange("before", "saved")
        d.chat.keeper._clock = lambda: 1e9  # no time to try again, however long the rest takes
        d.chat.keeper.db._connection.execute("PRAGMA query_only = 1")
        await d.exchange("while", "broken")
        assert "[store]" in "".join(d.screen_text)
        assert d.said == ["before", "saved", "while", "broken"]
        assert d.chat.keeper.unsaved
        d.chat.keeper.db._connection.execute("PRAGMA query_only = 0")
        d.chat.keeper._tried_at = 0
        d.chat.keeper.flush()
        assert not d.chat.keeper.unsaved

    assert chat(script, path=path).all_saved
    db = Database(path)
    assert db.read("SELECT count(*) FROM turns")[0][0] == 4
    db.close()


def test_a_store_that_is_no_store_is_kept_beside_a_new_one(tmp_path):
    (tmp_path / "chats.db").write_bytes(b"no database" * 1000)

    async def script(d):
        assert "was damaged" in " ".join("".join(d.screen_text).split())
        await d.exchange("q", "a")
        assert d.said == ["q", "a"]

    assert chat(script, SIZES[1], path=tmp_path / "chats.db").all_saved
    assert (tmp_path / "chats.db.damaged-1").read_bytes() == b"no database" * 1000


def test_a_store_that_cannot_be_opened_is_written_when_it_can_be(tmp_path):
    path = tmp_path / "chats.db"
    path.mkdir()

    async def script(d):
        assert "cannot be opened" in " ".join("".join(d.screen_text).split())
        await d.exchange("q", "a")
        d.chat._flush()
        await d.settle()
        assert "2 turns not saved" in "".join(d.screen_text)
        assert len(chats.listed(d.chat.keeper.db)) == 1
        path.rmdir()
        d.chat.keeper._tried_at = 0
        d.chat._flush()
        await d.settle()
        assert "not saved" not in "".join(d.screen_text)
        assert d.said == ["q", "a"]

    assert chat(script, SIZES[1], path=path).all_saved
    db = Database(path)
    assert [t.content for t in turns.load(db, chats.listed(db)[0].id)] == ["q", "a"]
    db.close()


def test_a_long_chat_mounts_a_window():
    talk = Conversation(Chat("long"))
    for n in range(600):
        talk.add("assistant" if n % 2 else "user", f"turn number {n}")

    async def script(d):
        assert len(d.chat.turns.views) <= 24
        assert "turn number 599" in "".join(d.screen_text)
        for _ in range(5):
            await d.press("pageup")
        assert len(d.chat.turns.views) <= 48
        numbers = [int(v.turn.content.split()[-1]) for v in d.chat.turns.views]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] < 580
        seen = [line for line in d.screen_text if "turn number" in line]
        assert seen
        await d.press("alt+up")
        await d.press("home")
        assert focused(d) == "turn number 0"
        assert "turn number 0" in "".join(d.screen_text)
        for _ in range(3):
            await d.press("pagedown")
        assert "turn number 0" not in "".join(d.screen_text)
        await d.command("/go 300")
        assert focused(d) == "turn number 299"
        await d.say("new")
        await d.settle()

    async def then(d):
        await script(d)
        await d.press("escape")
        await d.exchange("new", "newest")
        assert d.said[-1] == "newest"
        assert "newest" in "".join(d.screen_text)

    chat(then, talk=talk)
