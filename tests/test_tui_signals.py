"""What only a terminal shows: signals, Ctrl+Z and the shell around the chat."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import time

import pytest

from tests.tui_pty import Pty, chat_command, draft
from tui.signals import AGAIN_S
from tui.store import Database, chats, turns

LEFT = b"\x1b[?1049l"  # the alternate screen


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chats.db"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_end_by_a_signal_saves_the_draft_and_restores_the_terminal(path, tmp_path, number):
    t = Pty(chat_command(path), tmp_path, b"")
    try:
        t.write(b"typed ")  # before there is a prompt
        t.until(b"Settings")
        t.write(b"\x1a")
        t.until(b"no shell")  # that could bring it back, so it is not stopped
        t.write(b"just now")
        t.until(b"now")
        t.process.send_signal(number)
        assert t.process.wait(20) == 128 + number
        t.until(LEFT)
        assert draft(path) == "typed just now"
    finally:
        t.close()


def test_a_window_that_is_closed_loses_nothing(path, tmp_path):
    t = Pty(chat_command(path), tmp_path, b"Ask something")
    try:
        t.write(b"typed just now")
        t.until(b"now")
        t.hang_up()
        assert t.process.wait(30) is not None
        assert draft(path) == "typed just now"
    finally:
        t.close()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell with jobs")
def test_ctrl_z_goes_to_the_shell_and_fg_comes_back(path, tmp_path):
    t = Pty(["bash", "--norc", "--noprofile", "-i"], tmp_path, b"$", PS1="shell$ ")
    try:
        t.write(f"{' '.join(map(shlex.quote, chat_command(path)))}\r".encode())
        t.until(b"Ask something")
        t.write(b"before")
        t.until(b"before")
        t.write(b"\x1a")
        t.until(b"Stopped")
        assert LEFT in t.shown
        assert draft(path) == "before"  # already on the disk
        t.shown.clear()
        t.write(b"fg\r")
        t.until(b"before")
        t.until(b"Settings")  # in the last row
        t.write(b" and after")
        t.until(b"after")
        t.write(b"\x11")
        t.until(LEFT)
        t.write(b"echo code $?\r")
        t.until(b"code 0")
        assert draft(path) == "before and after"
    finally:
        t.close()


PLAIN = """
import sys
from pathlib import Path
from tests.tui_pilot import FakeEngine
from tui.config import Config
from tui.keeper import Keeper
from tui.plain import Plain
from tui.signals import SignalledExit, ending_by_signals

keeper = Keeper(Path(sys.argv[1]), print)
try:
    with ending_by_signals():
        engine = FakeEngine()
        engine.ask = lambda question: engine.post(Piece(question.number, "", "half an answer", FIGURES))
        code = Plain(engine, keeper, Config(), None, []).run()
except SignalledExit as e:
    code = e.code
keeper.close()
sys.exit(code)
""".replace("FakeEngine\n", "FIGURES, FakeEngine\nfrom tui.messages import Piece\n", 1)


def test_plain_mode_keeps_an_answer_that_a_signal_ends(path, tmp_path):
    t = Pty([sys.executable, "-c", PLAIN, str(path)], tmp_path, b"> ")
    try:
        t.write(b"not sent\x03")
        t.until(b"Once more quits.")
        time.sleep(AGAIN_S)
        t.write(b"question\r")
        t.until(b"half an answer")
        t.process.send_signal(signal.SIGTERM)
        assert t.process.wait(20) == 128 + signal.SIGTERM
    finally:
        t.close()
    db = Database(path)
    (found,) = chats.listed(db)
    answer = turns.load(db, found.id)[-1]
    assert (answer.content, answer.record.finish_reason) == ("half an answer", "stopped")
    db.close()


def test_plain_mode_ends_at_the_second_ctrl_c(path, tmp_path):
    t = Pty([sys.executable, "-c", PLAIN, str(path)], tmp_path, b"> ")
    try:
        t.write(b"\x03")
        t.until(b"Once more quits.")
        t.write(b"\x03")
        assert t.process.wait(20) == 0
    finally:
        t.close()


def test_a_terminal_without_the_focus_gets_a_notification(path, tmp_path):
    t = Pty(chat_command(path), tmp_path, b"Ask something")
    try:
        t.write(b"question")
        t.until(b"question")
        t.write(b"\r")
        time.sleep(1.0)  # a key says that the terminal has the focus
        t.write(b"\x1b[O")
        t.until(b"\x1b]9;kept: the answer has ended\x07")
    finally:
        t.close()
