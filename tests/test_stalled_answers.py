"""A model that stops for long in mid-answer: what was shown before is on the disk meanwhile, should the chat be killed."""

from __future__ import annotations

import io
import sys
import threading
import time

import pytest

from tests.tui_pilot import FIGURES, FakeEngine, chat, pause
from tui import config, keeper, paths
from tui.keeper import Keeper
from tui.messages import Ended, Piece
from tui.plain import Plain
from tui.store import Database, chats, turns

PIECES = ("One", ", two")
WAIT_S = 20


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing of the user's is touched; each write counts as costly, so that the second piece waits for its turn."""
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    monkeypatch.setattr(keeper, "COST", 1e9)


def answer_on_disk():
    """What another process would read."""
    db = Database(paths.data_file("chats.db"))
    try:
        return [turn.content for c in chats.listed(db) for turn in turns.load(db, c.id)][1:]
    finally:
        db.close()


def test_on_the_screen():
    async def script(d):
        await d.say("Count.")
        d.chat.post_message(d.text(PIECES[0]))
        d.chat.post_message(d.text(PIECES[1]))
        end = time.monotonic() + WAIT_S
        while answer_on_disk() != ["".join(PIECES)]:
            assert time.monotonic() < end
            await pause(0.05)
        await d.post(d.end())

    chat(script, path=paths.data_file("chats.db"))


class Stalling(FakeEngine):
    """Ends its answer once that is on the disk."""

    seen = None

    def ask(self, question):
        for text in PIECES:
            self.post(Piece(question.number, "", text, FIGURES))
        threading.Thread(target=self.end_later, args=(question.number,)).start()

    def end_later(self, number):
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end and self.seen != ["".join(PIECES)]:
            time.sleep(0.05)
            self.seen = answer_on_disk()
        self.post(Ended(number, "stop", FIGURES))


def test_without_a_screen(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Count.\n"))
    engine, kept = Stalling(), Keeper(paths.data_file("chats.db"), print)
    assert Plain(engine, kept, config.load(paths.config_file())[0], None, []).run() == 0
    assert kept.close()
    assert engine.seen == ["".join(PIECES)]
