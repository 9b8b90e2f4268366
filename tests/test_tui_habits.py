"""Keys that people know from elsewhere: Ctrl+C, Ctrl+D, messages that wait for their turn, the editor, copies, search."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from textual import events
from textual.widgets import Input
from textual.widgets.text_area import Selection

from tests.test_tui_keys import burst
from tests.tui_pilot import SIZES, chat, kept, pause
from tui import clipboard
from tui.config import Config, parse
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Ended, Failed
from tui.screens.text import HelpScreen
from tui.store import Attachment, Chat, drafts


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
        assert d.toasts[-1] == "Once more quits."

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


def waiting(d):
    return [w.text for w in d.chat.entry.queued.found]


def test_messages_sent_while_an_answer_runs_wait_and_can_be_taken_back():
    async def script(d):
        await d.say("one")
        for text in ("two", "three", "four"):
            await d.say(text)
        assert waiting(d) == ["two", "three", "four"]
        shown = "\n".join(d.screen_text)
        assert "next 1 · two" in shown
        assert "next 3 · Up takes it back · four" in shown
        await d.press("up")
        assert (d.chat.entry.prompt.text, waiting(d)) == ("four", ["two", "three"])
        await d.say(" changed")
        await d.pilot.click(d.app.query("Queued Row").first())
        await d.settle()
        assert (d.chat.entry.prompt.text, waiting(d)) == ("two", ["three", "four changed"])
        await d.press("ctrl+u")  # not wanted any more
        await d.post(d.text("1"), d.end())
        assert d.engine.asked[-1] == ["one", "1", "three"]
        assert waiting(d) == ["four changed"]
        await d.post(d.text("3"), d.end("length"))
        await d.post(d.text("4"), d.end())
        assert d.said == ["one", "1", "three", "3", "four changed", "4"]
        assert not d.chat.entry.queued.display

    chat(script, SIZES[1])


@pytest.mark.parametrize("ends", ["stopped", "failed", "empty"])
def test_what_waits_returns_to_the_prompt_if_the_answer_does_not_end_well(ends):
    async def script(d):
        await d.say("one")
        d.chat.entry.attachments.add(Attachment("a.txt", "text"))
        await d.say("two")
        await d.say("three")
        await d.type("begun")
        if ends == "failed":
            await d.post(d.text("half"), Failed("[x] broken", d.engine.number))
        else:
            await d.post(*([] if ends == "empty" else [d.text("half")]), d.end("stopped"))
        first = "one\n" if ends == "empty" else ""
        assert d.chat.entry.prompt.text == f"{first}two\nthree\nbegun"
        assert [a.name for a in d.chat.entry.attachments.found] == ["a.txt"]
        assert waiting(d) == []
        assert len(d.engine.questions) == 1

    chat(script)


def test_what_waits_belongs_to_its_chat_and_is_on_the_disk(tmp_path):
    path = tmp_path / "chats.db"

    async def script(d):
        await d.say("one")
        first = d.chat.talk.chat.id
        await d.post(d.text("half"))
        d.chat.entry.attachments.add(Attachment("a.txt", "text"))
        await d.say("two")
        await d.type("begun")
        d.chat.keep_draft()
        other = Keeper(path, print)  # as after a kill -9
        assert drafts.load(other.db, first) == "two\nbegun"
        assert drafts.load_attachments(other.db, first) == [Attachment("a.txt", "text")]
        other.close()
        await d.press("ctrl+n")
        assert waiting(d) == []
        assert d.chat.entry.prompt.text == ""
        await d.post(Ended(1, "stop"))
        assert len(d.engine.questions) == 1
        await d.chat.open_chat(d.chat.keeper.open(first))
        assert d.chat.entry.prompt.text == "two\nbegun"
        assert [a.name for a in d.chat.entry.attachments.found] == ["a.txt"]
        await d.say("")
        await d.say("three")
        await d.command("/delete")
        await d.command("/restore")
        assert d.chat.entry.prompt.text == "two\nbegun\nthree"  # the first was asked, but not answered

    chat(script, path=path)


def test_an_edit_that_ends_while_a_waiting_question_is_answered_is_not_lost():
    async def script(d):
        await d.exchange("q", "a")
        await d.say("r")
        await d.say("s")
        await d.post(d.text("b"))
        d.chat.answer, running = None, d.chat.answer
        await d.command("/edit")
        d.chat.answer = running
        await d.type(" changed")
        await d.press("ctrl+s")
        assert d.chat.entry.prompt.text.endswith("r changed")

    chat(script)


def editor(tmp_path, monkeypatch, script):
    """Have an editor that runs a shell script with the file as $1."""
    file = tmp_path / "an editor"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("EDITOR", f"'{file}' --wait")
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def test_the_prompt_in_an_editor(tmp_path, monkeypatch):
    editor(tmp_path, monkeypatch, 'printf "%s: \\033[1mmore\\n" "$(cat "$2")" > "$2"')

    async def script(d):
        await d.type("text")
        await d.press("f4")
        assert d.chat.entry.prompt.text == "text: \\x1b[1mmore"
        await d.press("ctrl+u")
        await d.command("/editor")
        assert d.chat.entry.prompt.text == ": \\x1b[1mmore"
        assert [*tmp_path.glob("ring-mlx-*")] == []

    chat(script)


BAD = {
    "exit 3": "an editor ended with code 3",
    "echo new > $2; exit 3": "an editor ended with code 3",
    "kill -9 $$": "an editor ended with code -9",
    "rm $2": "what it has left cannot be read (No such file or directory)",
    "printf 'a\\377b' > $2": "it has left no UTF-8 text",
    "rm $2; mkdir $2": "what it has left cannot be read (Is a directory)",
    "head -c 5000000 /dev/zero > $2": "what it has left cannot be read (it has more than 4 MB)",
}


def test_the_draft_stays_whatever_the_editor_does(tmp_path, monkeypatch):
    async def script(d):
        d.chat.entry.prompt.replace_text("my draft")
        for what, said in BAD.items():
            editor(tmp_path, monkeypatch, what)
            await d.press("f4")
            assert d.chat.entry.prompt.text == "my draft"
            assert said in d.toasts[-1]
            assert "the prompt is as it was" in d.toasts[-1]
            kept_files = [f for f in tmp_path.glob("ring-mlx-*.md") if f.is_file()]
            assert [str(f) in d.toasts[-1] for f in kept_files] == ([True] if "> $2" in what else [])
            for f in kept_files:
                f.unlink()

    chat(script)


def test_an_editor_that_does_not_exist(monkeypatch):
    async def script(d):
        await d.type("my draft")
        for command, said in (("nowhere/vi", "cannot be found"), ("'vi", "is no command"), ("/", "cannot be")):
            monkeypatch.setenv("VISUAL", command)
            await d.press("f4")
            assert said in d.toasts[-1]
            assert d.chat.entry.prompt.text == "my draft"

    chat(script)


def test_a_huge_text_from_the_editor_is_attached(tmp_path, monkeypatch):
    editor(tmp_path, monkeypatch, "yes | head -c 3000000 > $2")

    async def script(d):
        await d.type("x")
        await d.press("f4")
        assert d.chat.entry.prompt.text == ""
        assert [len(a.text) for a in d.chat.entry.attachments.found] == [2_999_999]

    chat(script)


def test_what_happens_while_the_editor_is_open(tmp_path, monkeypatch):
    """The answer goes on; a text for another prompt than the present one goes before it."""
    editor(tmp_path, monkeypatch, f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; echo edited > $2")

    async def script(d):
        await d.say("q")
        await d.type("draft")
        d.app.post_message(events.Key("f4", None))
        await asyncio.sleep(0.2)
        d.chat.post_message(d.text("written meanwhile"))
        d.chat.post_message(d.end())
        await asyncio.sleep(0.2)
        assert d.chat.keeper.open(d.chat.talk.chat.id).path()[-1].content == "written meanwhile"
        d.chat.entry.prompt.replace_text("other")
        (tmp_path / "go").touch()
        for _ in range(100):
            await asyncio.sleep(0.05)
            if "edited" in d.chat.entry.prompt.text:
                break
        assert d.chat.entry.prompt.text == "edited\nother"

    chat(script)


def tool(tmp_path, monkeypatch, name, script):
    """Have a program on the path, and be able to copy with it."""
    file = tmp_path / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(clipboard, "TOOLS", (("pbcopy",), ("wl-copy",), ("xclip", "-selection", "clipboard")))
    monkeypatch.delenv("SSH_CONNECTION", raising=False)


def test_a_copy_says_which_program_took_it(tmp_path, monkeypatch):
    """Those before it fail, as without a desktop; it keeps its output open and stays, as xclip does."""
    tool(tmp_path, monkeypatch, "pbcopy", "exit 1")
    tool(tmp_path, monkeypatch, "wl-copy", "exit 1")
    tool(tmp_path, monkeypatch, "xclip", f'echo "$@" > {tmp_path}/flags; cat > {tmp_path}/copied; sleep 5 &')

    async def script(d):
        await d.exchange("q", "an ünïcode answer")
        await d.command("/copy")
        assert d.toasts == ["Copied the answer with xclip."]
        assert (tmp_path / "copied").read_text() == "an ünïcode answer"
        assert (tmp_path / "flags").read_text() == "-selection clipboard\n"
        assert d.app.clipboard == "an ünïcode answer"

    chat(script)


def test_what_was_copied_stays_where_there_is_nothing_to_copy():
    async def script(d):
        d.app.copy_to_clipboard("before")
        await d.press("ctrl+x")  # in the empty prompt
        assert d.app.clipboard == "before"
        assert "There is nothing to copy." in d.toasts

    chat(script)


def test_by_ssh_the_terminal_copies(tmp_path, monkeypatch):
    tool(tmp_path, monkeypatch, "pbcopy", f"cat > {tmp_path}/copied")
    monkeypatch.setattr(clipboard, "TOOLS", clipboard.TOOLS[:1])
    monkeypatch.setenv("SSH_CONNECTION", "1 2 3 4")

    async def script(d):
        await d.exchange("q", "a")
        await d.command("/copy")
        assert d.toasts == ["Copied the answer through the terminal (OSC 52)."]
        assert not (tmp_path / "copied").exists()

    chat(script)


def test_a_program_that_hangs_holds_nothing_up(tmp_path, monkeypatch):
    tool(tmp_path, monkeypatch, "pbcopy", "sleep 60")
    monkeypatch.setattr(clipboard, "TOOLS", clipboard.TOOLS[:1])
    monkeypatch.setattr(clipboard, "PATIENCE_S", 0.5)

    async def script(d):
        await d.exchange("q", "a" * 200_000)
        await d.chat.action_command("copy")
        d.chat.entry.prompt.insert("x")
        assert d.toasts == []
        await d.settle()
        assert d.toasts == ["Copied the answer through the terminal (OSC 52)."]

    chat(script)


def test_a_long_answer_that_ends_unseen_rings(monkeypatch):
    async def script(d):
        rung = []
        monkeypatch.setattr(d.app, "bell", lambda: rung.append(1))
        at_once = Config(notify_after_s=0)
        cases = (
            (at_once, False, 1),
            (at_once, True, 0),
            (Config(), False, 0),
            (replace(at_once, notify="off"), False, 0),
        )
        for config, is_seen, rings in cases:
            d.chat.config = config
            await d.say("q")
            d.chat.entry.queue("waits", ())
            d.app.post_message(events.AppBlur())
            if is_seen:
                d.app.post_message(events.AppFocus())
            await d.post(d.text("a"), d.end())
            assert rung == []  # the next one is answered
            await d.post(d.text("b"), d.end())
            assert len(rung) == rings
            rung.clear()

    chat(script)


def test_settings_of_notifications_are_checked():
    found, wrong = parse({"notify": "drum", "notify_after_s": "soon"})
    assert (found.notify, found.notify_after_s) == ("bell", 10)
    assert wrong == ["notify is none of bell, osc9, off", "notify_after_s is not a whole number"]
    assert parse({"notify": "osc9", "notify_after_s": 3})[0] == Config(notify="osc9", notify_after_s=3)


def marked(d):
    """The text on the screen that is marked as found, and that of the hit at hand."""
    found, current = [], []
    for strip in d.app.screen._compositor.render_strips():
        for segment in strip:
            if segment.style and segment.style.reverse and segment.text.strip().isalnum():
                (current if segment.style.underline else found).append(segment.text)
    return found, current


def test_search_within_a_chat_marks_hits_and_goes_from_one_to_another():
    talk = Conversation(Chat("long"))
    talk.add("user", "where is a Needle")
    talk.add("assistant", "a **needle** here\n\n```python\nneedle = 1\n```\n\n| needle | b |\n|---|---|\n| 1 | 2 |")
    for n in range(10):
        talk.add("user", f"other {n}")
        talk.add("assistant", "hay")
    talk.add("user", "q")
    talk.add("assistant", "last needle")

    async def script(d):
        await d.press("ctrl+f")
        d.chat.find_bar.words.value = "needle"
        await d.settle()
        bar = d.chat.find_bar
        assert "5 of 5" in "\n".join(d.screen_text)
        found, current = marked(d)
        assert "".join(current) == "needle"
        await d.press("enter")
        await pause(0.3)
        assert "1 of 5" in "\n".join(d.screen_text)
        assert any("where is a Needle" in line for line in d.screen_text)
        found, current = marked(d)
        assert current == ["Needle"]
        assert len(found) >= 3
        await d.press("up")
        assert "5 of 5" in "\n".join(d.screen_text)
        assert any("last needle" in line for line in d.screen_text)
        bar.words.value = "nowhere"
        await d.settle()
        assert "nothing found" in "\n".join(d.screen_text)
        assert marked(d) == ([], [])
        await d.press("escape")
        assert not bar.display
        assert d.chat.entry.prompt.has_focus
        await d.command("/find last  NEEDLE")
        assert "1 of 1" in "\n".join(d.screen_text)
        await d.press("escape", "x")
        assert d.chat.entry.prompt.text == "x"
        assert marked(d) == ([], [])

    chat(script, SIZES[1], talk=talk)


def test_search_with_odd_words_and_while_an_answer_streams():
    async def script(d):
        await d.exchange("a.b (c", "x*y\x1b[0m \u202e")
        await d.say("q")
        await d.press("ctrl+f")
        for words in ("(c", "*", "\\x1b", "  ", "a.b  (C"):
            d.chat.find_bar.words.value = words
            await d.settle()
        assert "1 of 1" in "\n".join(d.screen_text)
        d.chat.find_bar.words.value = "tok"
        for n in range(3):
            await d.post(d.text(f"tok {n}\n\n"))
            await d.press("enter")
        assert "of 3" in "\n".join(d.screen_text)
        await d.press("escape")
        await d.post(d.end())
        assert marked(d) == ([], [])
        assert "tok 2" in "\n".join(d.screen_text)
        await d.press("ctrl+f", "ctrl+n")
        assert not d.chat.find_bar.display

    chat(script)
