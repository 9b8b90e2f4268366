"""``ring-mlx chat --plain``: a fake engine line by line, then the packaged model through a pipe."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from ring_mlx import RingError
from tests.tui_pilot import FIGURES, FakeEngine
from tests.tui_pilot import chat as screens
from tui import chat, command, config, paths
from tui.answering import Engine
from tui.config import Config
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Ended, Failed, Loaded, Piece
from tui.plain import Plain
from tui.store import Call, Database, chats, turns
from tui.store.records import ASSISTANT, USER
from tui.transfer import export_talk


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Answering(FakeEngine):
    """Answers at once: a thought, then "re: " and the question; "fail" fails."""

    def switch(self, choice):
        self.start(self.post)

    def ask(self, question):
        super().ask(question)
        text = question.messages[-1]["content"]
        if text == "fail":
            self.post(Failed("[prompt] too long; shorten it.", question.number))
            return
        self.post(Piece(question.number, "hm", "", FIGURES))
        self.post(Piece(question.number, "", f"\n\nre: {text}" if not question.continues else " and more", FIGURES))
        self.post(Ended(question.number, "length" if text in ("cut", "full") else "stop", self.figures(text)))

    def figures(self, text):
        return replace(FIGURES, prompt_tokens=4093) if text == "full" else FIGURES


def plain(monkeypatch, capsys, *lines):
    """The engine, the exit code, standard output and standard error of a session of these lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    engine, keeper = Answering(), Keeper(paths.data_file("chats.db"), print)
    code = Plain(engine, keeper, config.load(paths.config_file())[0], None, ["a note"]).run()
    assert keeper.close()
    return engine, code, *capsys.readouterr()


def test_answers_go_to_standard_output_and_nothing_else(monkeypatch, capsys):
    engine, code, out, err = plain(monkeypatch, capsys, "one", "", "two \\", "lines \x1b[2J", "/help")
    assert engine.asked[-1] == ["one", "re: one", "two \nlines \x1b[2J"]
    assert (code, out) == (0, "re: one\nre: two \nlines \x1b[2J\n")
    assert err.startswith("a note\n/new")
    assert "Ctrl" not in err
    db = Database(paths.data_file("chats.db"))
    (found,) = chats.listed(db)
    assert [t.content for t in turns.load(db, found.id)][1] == "re: one"
    assert found.title == "one: re: one"
    db.close()


def test_an_answer_that_was_cut_off_says_so_and_the_exit_code_tells(monkeypatch, capsys):
    _, code, out, err = plain(monkeypatch, capsys, "cut", "one")
    assert (code, out) == (4, "re: cut\nre: one\n")
    assert "[chat] the answer was cut off after 4 tokens; /continue goes on, or raise max_tokens.\n" in err
    _, code, _, err = plain(monkeypatch, capsys, "full", "fail")
    assert code == 2
    assert "[chat] the answer was cut off after 4 tokens; the context is full: begin a new chat" in err


def test_commands(monkeypatch, capsys, home):
    (home / "a.txt").write_text("text of a\n")
    lines = [
        "one",
        "/continue",
        "/regenerate",
        "/undo",
        "/title Ten",
        "/export md x.md",
        "/export json x.json",
        "/record",
    ]
    lines += ["/new", "/import x.json", "/attach a.txt", "see", "/attach nowhere", "/set temp 0", "/set temp hot"]
    lines += [
        "/budget 5",
        "/system Brief.",
        "/defaults save",
        "/preset save p",
        "/preset p",
        "/preset q",
        "/model toy",
        "/model",
        "/chats",
    ]
    lines += [
        "/chats re",
        "/chats \u00b2",
        f"/chats {'9' * 5000}",
        "/chats 1",
        "/fly",
        "/settings",
        "three",
        "/quit",
        "never",
    ]
    engine, code, out, err = plain(monkeypatch, capsys, *lines)
    assert code == 0
    assert out.splitlines()[:3] == ["re: one", " and more", "re: one"]
    assert engine.questions[1].continues
    assert "never" not in out
    assert (home / "x.md").read_text().startswith("# Ten\n")
    assert "a.txt:\n```\ntext of a\n```" in engine.asked[3][-1]
    for part in (
        "[attach] nowhere cannot be read",
        "temp 'hot' is not a number",
        "seed 7",
        "There are p.",
        "no command /fly",
    ):
        assert part in err
    assert "no command /settings in plain mode" in err
    assert engine.asked[-1][0] == "Brief."
    assert engine.questions[-1].sampling.thinking_budget == 5
    assert config.load(paths.config_file())[0].sampling.temp == 0


def test_a_stored_tool_call_is_sent_back_and_not_continued(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/continue\nmore\n"))
    engine, talk = Answering(), Conversation()
    talk.add("user", "q")
    talk.add("assistant", "I call.").calls = (Call("add", {"a": 1}),)
    assert Plain(engine, Keeper(None, print), Config(), talk, []).run() == 0
    (question,) = engine.questions
    assert question.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_a_name_has_no_line_of_its_own(monkeypatch, capsys, tmp_path):
    odd, seen = "a\n  2 fake\tb\u202e", r"a\n  2 fake\tb\u202e"
    monkeypatch.chdir(tmp_path)
    keeper = Keeper(paths.data_file("chats.db"), print)
    for _ in range(2):
        talk = Conversation()
        talk.chat.title = odd
        keeper.keep(talk, talk.add("user", "q"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("/chats\n/chats 1\none\n/export x/y\n"))
    monkeypatch.setattr("tui.front_end.export_talk", lambda *_: f"Written to {odd}.")
    chat = Plain(Answering(), keeper, Config(), None, [f"from {odd}"])
    assert chat.run() == 0
    chat.model = Loaded(odd, 9)
    chat.command("/model")
    assert keeper.close()
    err = capsys.readouterr().err.splitlines()
    listed = [f"  {n} {seen}" for n in (1, 2)]
    assert [line for line in err if "fake" in line and "Opened" not in line] == [
        f"from {seen}",
        *listed,
        f"Written to {seen}.",
        f"The model is {seen}; /model NAME loads another one.",
    ]
    assert not [line for line in err if line.startswith("  2 fake")]


def test_a_long_title_fits_into_the_name_of_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talk = Conversation()
    talk.chat.title = "\U00010400" * 200  # four bytes each
    assert export_talk(talk, "").startswith("Written to ")


def test_repeat_and_preset_delete(monkeypatch, capsys):
    lines = ["/repeat", "/set temp 0.9", "one", "/preset save p", "/set temp 0", "/repeat", "two", "/preset delete p"]
    engine, _, _, err = plain(monkeypatch, capsys, *lines, "/preset")
    assert [q.sampling.temp for q in engine.questions] == [0.9, 0.9, 0.0]
    assert [q.sampling.seed for q in engine.questions] == [None, 7, None]
    assert engine.asked[:2] == [["one"], ["one"]]
    assert "names no seed" in err
    assert "There are no presets." in err


def test_a_failure_is_said_and_remembered_in_the_exit_code(monkeypatch, capsys):
    _, code, out, err = plain(monkeypatch, capsys, "fail", "fine")
    assert (code, out) == (2, "re: fine\n")
    assert "[prompt] too long; shorten it." in err


def test_a_model_that_cannot_be_loaded(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    engine = FakeEngine(loads=False)
    engine.start = lambda post: post(Failed("[hub] no such folder"))
    assert Plain(engine, Keeper(None, print), Config(), None, []).run() == 2
    assert capsys.readouterr().err == "[hub] no such folder\n"


class Named:
    """What answers for a model; one whose name is "bad" cannot be loaded."""

    def __init__(self, choice, post):
        if choice.path == "bad":
            raise RingError(f"no {choice.path}")
        post(Loaded(choice.path or "toy", 4096))

    def answer(self, question, stopped, post):
        post(Piece(question.number, "", "fine", FIGURES))
        return Ended(question.number, "stop", FIGURES)

    def stop(self):
        pass

    close = stop


def test_the_old_model_answers_after_others_could_not_be_loaded(monkeypatch, capsys):
    lines = ["/model bad", "/model bad", "hi", "/record", "/model bad", "/model good", "hi", "/record"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    engine = Engine(load=Named)
    assert Plain(engine, Keeper(None, print), Config(), None, []).run() == 0
    assert engine.close()
    out, err = capsys.readouterr()
    assert out == "fine\nfine\n"
    assert [line.split()[-1] for line in err.splitlines() if line.startswith("model ")] == ["toy", "good"]


def test_the_packaged_model_through_a_pipe(home):
    command = [sys.executable, "-m", "ring_mlx", "chat", "--plain", "--temp", "0", "--max-tokens", "200"]
    asked = "What is 27 + 35?\n/record\n"
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The sum is 62.\n"
    assert "end          stop" in done.stderr
    again = subprocess.run([*command, "--resume"], input="/regenerate\n", capture_output=True, text=True, check=False)
    assert again.stdout == "The sum is 62.\n"
    assert (home / "snapshots").is_dir()


def test_what_was_typed_is_private_also_in_an_older_history(home):
    readline = pytest.importorskip("readline")
    history = paths.data_file("history")
    umask = os.umask(0)
    try:
        for prepare in (lambda: None, lambda: history.chmod(0o644)):
            prepare()
            chat = Plain(FakeEngine(), Keeper(None, print), Config(), None, [])
            chat._is_terminal = True
            assert chat._start_history() is readline
            assert oct(history.stat().st_mode & 0o777) == "0o600"
            history.unlink()  # readline makes it again
            readline.add_history("typed")
            chat._keep_history(readline)
            assert oct(history.stat().st_mode & 0o777) == "0o600"
            assert "typed" in history.read_text()
    finally:
        os.umask(umask)
        readline.clear_history()


@pytest.mark.parametrize(
    ("term", "is_plain"), [("dumb", True), ("unknown", True), ("xterm-256color", False), (None, False)]
)
def test_a_terminal_that_cannot_place_letters_gets_plain_mode(monkeypatch, term, is_plain):
    started = []

    class Started:
        """Plain mode or the screens."""

        def __init__(self, engine, keeper, settings, talk, notes):
            self.notes, self.return_code = notes, 0

        tell = show_warning = print

        def run(self):
            started.append((type(self).__name__, self.notes))
            return 0

    monkeypatch.setattr("tui.chat.Plain", type("Plain", (Started,), {}))
    monkeypatch.setattr("tui.app.RingChat", type("RingChat", (Started,), {}))
    monkeypatch.setattr("tui.chat.Engine", lambda choice: FakeEngine())
    if term is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", term)
    parser = argparse.ArgumentParser()
    command.add(parser)
    assert chat.run(parser.parse_args([])) == 0
    note = f"[terminal] TERM={term} shows no screens; this is plain mode, /help lists its commands."
    assert started == [("Plain", [note]) if is_plain else ("RingChat", [])]


def test_find_within_the_chat(monkeypatch, capsys):
    *_, err = plain(monkeypatch, capsys, "a long\x1b line", "other", "/find long", "/find no", "/find")
    assert "  1 user: …a long" in err
    assert "  2 assistant: …re: a long" in err
    assert "Nothing is found." in err
    assert "/find TEXT searches in this chat." in err
    assert "\x1b" not in err


def test_a_question_from_the_editor(monkeypatch, capsys, tmp_path):
    file = tmp_path / "editor"
    file.write_text("#!/bin/sh\necho from the editor > $1\n")
    file.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(file))
    engine, code, _, _ = plain(monkeypatch, capsys, "/editor")
    assert (engine.asked, code) == ([["from the editor"]], 0)
    monkeypatch.setenv("VISUAL", "false")
    engine, code, _, err = plain(monkeypatch, capsys, "/editor")
    assert (engine.asked, code) == ([], 0)
    assert "[editor] false ended with code 1; the prompt is as it was." in err


def test_ctrl_c_twice_while_the_model_loads_ends_in_order(monkeypatch, capsys):
    """The second one comes while the engine is being closed, and must not end that."""
    engine, closed = FakeEngine(loads=False), []

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        closed.append(True)
        return True

    engine.close = interrupt
    engine.start = lambda post: os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr("tui.chat.Engine", lambda choice: engine)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser()
    command.add(parser)
    try:
        assert chat.run(parser.parse_args(["--plain"])) == 130
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert closed == [True]
    assert "interrupted" in capsys.readouterr().err


def test_an_answer_that_was_killed_says_so_when_its_chat_is_opened_again(monkeypatch, capsys, home):
    talk, keeper = Conversation(), Keeper(paths.data_file("chats.db"), print)
    keeper.keep(
        talk,
        talk.add(USER, "q"),
        talk.add(
            ASSISTANT,
            "",
        ),
    )
    talk.leaf.thinking = "half a thought"
    keeper.keep(talk, talk.leaf)
    keeper.close()
    assert (
        "[chat] the answer is not finished; /regenerate asks again."
        in plain(monkeypatch, capsys, "/chats", "/chats 1")[3]
    )

    async def script(d):
        assert "the answer is not finished; /regenerate asks again." in "".join(d.screen_text)
        await d.command("/regenerate")
        assert "not finished" not in "".join(d.screen_text)  # it is being written
        await d.post(d.text("half"), d.end("stopped"))
        assert "not finished" not in "".join(d.screen_text)

    screens(script, talk=talk)


def test_a_line_end_in_two_pieces_is_one(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    pieces = ["one\r", "\ntwo", "\r", "\n", "\r", "three\r\r", "\nfour\r"]

    def ask(self, question):
        self.questions.append(question)
        for piece in pieces:
            self.post(Piece(question.number, "", piece, FIGURES))
        self.post(Ended(question.number, "stop"))

    monkeypatch.setattr(Answering, "ask", ask)
    assert plain(monkeypatch, capsys, "q")[2] == "one\ntwo\n\\x0dthree\\x0d\nfour\n"

    async def script(d):
        await d.exchange("q", *pieces)
        assert any(row.endswith(r" one two \x0dthree\x0d four") for row in d.screen_text)
        assert d.said[-1] == "".join(pieces)

    screens(script)
