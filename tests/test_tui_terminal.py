"""The packaged model in a real terminal, through tmux: type, stream, stop, edit, branch, quit, restart, search, resume."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ring_mlx import harmless
from tests.parrot import make_parrot
from tui.keeper import WRITE_EVERY_S
from tui.store import Database, chats, turns

# What was shown so long ago is on the disk, also where a busy machine lets the chat run late.
LATE_S = WRITE_EVERY_S + 1.5
# The packaged model thinks for 230 tokens, so that there is time to stop it.
LONG = "Sort: 9 8 7 6 5 4 3 2 1 0 12 14 16 18 20 31 44"

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux for a real terminal")


class Terminal:
    """A tmux server of its own with one window of 100 x 30."""

    def __init__(self, folder):
        self.socket, self.folder = str(folder / "tmux"), folder

    def tmux(self, *args):
        command = ["tmux", "-S", self.socket, "-f", os.devnull, *args]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout

    def start(self, *options):
        chat = f"RING_MLX_HOME={self.folder} TERM=xterm-256color {sys.executable} -m ring_mlx chat {' '.join(options)}"
        self.tmux("new-session", "-d", "-x", "100", "-y", "30", f"{chat}; echo code $?; sleep 60")

    def kill(self):
        """kill -9 the chat, not the shell around it."""
        (shell,) = self.tmux("list-panes", "-F", "#{pane_pid}").split()
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", shell], capture_output=True, text=True, check=True)
        (chat,) = children.stdout.split()
        os.kill(int(chat), signal.SIGKILL)

    @property
    def screen(self):
        return self.tmux("capture-pane", "-p")

    def keys(self, *keys):
        """Press keys as a person does: the focus has moved before the next one."""
        self.tmux("send-keys", *keys)
        time.sleep(0.8)  # 0.3 s did not do beside a second suite

    def type(self, text):
        self.tmux("send-keys", "-l", text)

    def until(self, *texts, missing=(), timeout_s=60):
        """The screen once it shows all texts and none of ``missing``."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            found = self.screen
            if all(t in found for t in texts) and not any(t in found for t in missing):
                return found
            time.sleep(0.05)
        raise AssertionError(f"{texts} not within {timeout_s} s; the screen:\n{self.screen}")

    def close(self):
        self.tmux("kill-server")


@pytest.fixture
def terminal(tmp_path):
    found = Terminal(tmp_path)
    yield found
    found.close()


def test_a_day_in_the_life(terminal, tmp_path):
    t = terminal
    t.start("--temp", "0")
    t.until("ready", "Ask something")
    t.type("What is 27 + 35?")
    t.keys("Enter")
    t.until("The sum is 62.", "tok/s", "thought")
    t.type(LONG)
    t.tmux("send-keys", "Enter")
    t.until("thinking")
    t.tmux("send-keys", "Escape")
    t.until("stopped")
    t.keys("BTab")
    t.keys("Up")
    t.keys("e")
    t.until("Edit the question")
    t.keys("C-u")
    t.until("Edit the question", missing=[LONG[:12]])
    t.type("What is 3 + 4?")
    t.until("What is 3 + 4?")
    t.keys("C-s")
    t.until("The sum is 7.", "branch 2/2")
    t.keys("BTab")
    t.keys("Up")
    t.keys("[")
    t.until(LONG[:12], "branch 1/2", missing=["The sum is 7."])
    t.keys("]")
    t.until("The sum is 7.")
    t.keys("C-q")
    t.until("code 0")
    t.tmux("kill-session")
    t.start()
    t.until("ready")
    t.keys("C-o")
    t.until("What is 27 + 35?", "turns")
    t.type("Sort")
    t.until("1 found")
    t.keys("Enter")
    t.until(LONG[:12], "The sum is 62.", missing=["1 found"])
    t.keys("C-q")
    t.until("code 0")
    t.tmux("kill-session")
    t.start("--resume")
    t.until("The sum is 62.", "ready")
    t.type("What is 5 + 4?")
    t.keys("Enter")
    t.until("reused")
    t.keys("C-q")
    t.until("code 0")
    db = Database(tmp_path / "chats.db")
    (found,) = chats.listed(db)
    contents = [x.content for x in turns.load(db, found.id)]
    db.close()
    assert contents[0] == "What is 27 + 35?"
    assert "What is 3 + 4?" in contents


def test_a_killed_terminal_keeps_what_was_on_the_screen(terminal, tmp_path):
    terminal.start("--temp", "0")
    terminal.until("ready")
    terminal.type("What is 27 + 35?")
    terminal.keys("Enter")
    terminal.until("The sum is 62.")
    terminal.close()
    db = Database(tmp_path / "chats.db")
    (found,) = chats.listed(db)
    assert [x.content for x in turns.load(db, found.id)] == ["What is 27 + 35?", "The sum is 62."]
    db.close()


def letters(text):
    """What a screen shows of a text, without breaks and signs."""
    return re.sub(r"[^A-Za-z0-9]", "", harmless(text))


def stored(folder):
    """Content and thought of each turn of the one chat."""
    db = Database(folder / "chats.db")
    (found,) = chats.listed(db)
    kept = [(t.content, t.thinking) for t in turns.load(db, found.id)]
    db.close()
    return kept


def watched(t, until_s):
    """The thought's letters as the screen showed them, each with its time."""
    seen, end = [], time.monotonic() + until_s
    while time.monotonic() < end:
        screen = t.screen
        shown = screen.partition("▾")[2].partition("\n")[2] if "▾" in screen else screen
        seen.append((time.monotonic(), letters(shown.partition("▊▔")[0])))
        time.sleep(0.05)
    return seen


def test_killed_while_it_streams_it_keeps_what_was_on_the_screen(terminal, tmp_path):
    """The model thinks for longer than the test takes, and the open thought shows it letter by letter."""
    model = make_parrot(tmp_path / "model", [f" so{n}x" for n in range(8000)], max_position_embeddings=32768)
    t, chance, kept = terminal, random.Random(11), []
    for n in range(2):
        t.start("--resume", "--model", str(model))
        t.until("ready")
        t.type(f"What is {n} + 35?")
        t.tmux("send-keys", "Enter")
        t.until("▸ thinking")
        t.type("/thought")
        t.tmux("send-keys", "Enter")
        t.until("x so")
        seen = watched(t, LATE_S + 0.3 + chance.random())
        killed = time.monotonic()
        t.kill()
        t.until("code 137")
        t.tmux("kill-session")
        now = stored(tmp_path)
        assert now[: len(kept)] == kept, "an earlier turn has changed"
        assert now[len(kept)] == (f"What is {n} + 35?", "")
        kept, (content, thinking) = now, now[len(kept) + 1]
        shown = [text for at, text in seen if at < killed - LATE_S][-1]
        assert content == ""
        assert len(shown) > 20
        assert shown in letters(thinking)
    t.start("--resume", "--model", str(model))
    t.until("ready", f"What is {n} + 35?", "▸ thought")
    assert stored(tmp_path) == kept
