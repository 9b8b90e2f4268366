"""The chat in a pseudo-terminal that is its controlling one, with an engine that answers after two seconds."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.store import Chat, Database, chats, drafts

ROOT = Path(__file__).parent.parent
CHAT = """
import sys
from pathlib import Path
from threading import Timer
from tests.tui_pilot import FIGURES, FakeEngine
from tui.app import RingChat
from tui.config import Config
from tui.keeper import Keeper
from tui.messages import Ended, Piece

keeper, engine = Keeper(Path(sys.argv[1]), print), FakeEngine()

def answer(q):
    engine.post(Piece(q.number, "", "an answer", FIGURES))
    engine.post(Ended(q.number, "stop"))

engine.ask = lambda q: Timer(2.0, answer, (q,)).start()
config = Config(notify="osc9", notify_after_s=0)
app = RingChat(engine, keeper, config, talk=keeper.latest())
app.run()
keeper.close()
sys.exit(app.return_code)
"""
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Pty:
    """A command in a terminal of its own.

    Args:
        command: What to run.
        home: Where the chat keeps its files.
        ready: What is shown once it is ready.
    """

    def __init__(self, command, home, ready, **environment):
        self._ours, theirs = pty.openpty()
        named = {"RING_MLX_HOME": str(home), "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, **named},
            cwd=ROOT,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = bytearray()
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()
        self.until(ready)

    def write(self, data):
        os.write(self._ours, data)

    def until(self, text):
        until(lambda: text in self.shown)

    def hang_up(self):
        """Close the terminal, as its window does."""
        handle, self._ours = self._ours, None
        if handle is not None:
            os.close(handle)

    def close(self):
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        self.hang_up()

    def _drain(self):
        with contextlib.suppress(OSError, TypeError):  # the other end is closed, or ours
            while data := os.read(self._ours, 65536):
                self.shown += data


def chat_command(path):
    """What runs the chat of a store; it has two turns."""
    talk, keeper = Conversation(Chat("kept")), Keeper(path, print)
    keeper.keep(talk, talk.add("user", "q"), talk.add("assistant", "a"))
    keeper.close()
    return [sys.executable, "-c", CHAT, str(path)]


def draft(path):
    """The draft of the one chat in the store."""
    db = Database(path)
    try:
        return drafts.load(db, chats.listed(db)[0].id)
    finally:
        db.close()


def until(is_so, every_s=0.1, timeout_s=30):
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(every_s)
