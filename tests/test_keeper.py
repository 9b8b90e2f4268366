"""What cannot be written waits, is told, is written when it can be, and is somewhere else at the end if it never can."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys

import pytest

from ring_mlx.cli import build_parser
from tests.test_tui_plain import Answering
from tui import chat
from tui.conversation import Conversation
from tui.keeper import RETRY_EVERY_S, ROOM_BYTES, Keeper
from tui.store import Database, chats, turns
from tui.transfer import import_talk

FAULTS = [
    "database or disk is full",
    "attempt to write a readonly database",
    "disk I/O error",
    "database is locked",
    "database disk image is malformed",
    "out of memory",
]


class Faulty:
    """A connection whose writes fail while ``fault`` says how; reading goes on."""

    def __init__(self, connection, fault):
        self._connection, self.fault = connection, fault

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def execute(self, sql, values=()):
        if self.fault and sql.startswith(("BEGIN", "INSERT")):
            raise sqlite3.OperationalError(self.fault)
        return self._connection.execute(sql, values)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def told():
    return []


def spoil(keeper, fault):
    keeper.db._connection = faulty = Faulty(keeper.db._connection, fault)
    return faulty


def stored(path):
    db = Database(path)
    try:
        return [[t.content for t in turns.load(db, chat.id)] for chat in chats.listed(db)]
    finally:
        db.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_failing_store_does_not_take_is_written_later(tmp_path, told, fault):
    clock, talk = Clock(), Conversation()
    keeper = Keeper(tmp_path / "chats.db", told.append, clock)
    keeper.keep(talk, talk.add("user", "before"))
    faulty = spoil(keeper, fault)
    for n in range(3):
        keeper.keep(talk, talk.add("user", f"while {n}"))
        clock.now += 0.1
    assert len(told) == 1
    assert told[0].startswith("[store] ")
    assert fault in told[0]
    assert [len(unsaved) for _, unsaved in keeper.unsaved_turns()] == [3]
    faulty.fault = ""
    clock.now += RETRY_EVERY_S
    keeper.keep(talk, talk.add("user", "after"))
    assert keeper.close()
    assert stored(tmp_path / "chats.db") == [["before", "while 0", "while 1", "while 2", "after"]]


def test_snapshots_give_way_where_the_disk_is_full(tmp_path, told):
    asked = []

    def make_room(nbytes):
        asked.append(nbytes)
        faulty.fault = ""
        return nbytes

    keeper, talk = Keeper(tmp_path / "chats.db", told.append, make_room=make_room), Conversation()
    faulty = spoil(keeper, "database or disk is full")
    keeper.keep(talk, talk.add("user", "hello"))
    assert asked == [ROOM_BYTES]
    assert told == ["[store] snapshots were removed to make room for the chat."]
    assert keeper.close()
    assert stored(tmp_path / "chats.db") == [["hello"]]


def test_another_failure_takes_no_snapshots(tmp_path, told):
    keeper, talk = Keeper(tmp_path / "chats.db", told.append, make_room=lambda n: pytest.fail("room")), Conversation()
    spoil(keeper, "disk I/O error")
    keeper.keep(talk, talk.add("user", "hello"))
    keeper.close()


def test_a_folder_that_is_gone_is_made_again_with_the_whole_chat(tmp_path, told):
    path, talk = tmp_path / "data" / "chats.db", Conversation()
    keeper = Keeper(path, told.append)
    keeper.keep(talk, talk.add("user", "before"))
    shutil.rmtree(path.parent)
    keeper.keep(talk, talk.add("assistant", "after"))
    assert keeper.close()
    assert stored(path) == [["before", "after"]]


def test_a_file_that_another_one_replaced_is_opened_again(tmp_path, told):
    path, talk = tmp_path / "chats.db", Conversation()
    keeper = Keeper(path, told.append)
    keeper.keep(talk, talk.add("user", "before"))
    for file in tmp_path.iterdir():
        file.unlink()
    Database(path).close()
    keeper.keep(talk, talk.add("assistant", "after"))
    assert keeper.close()
    assert stored(path) == [["before", "after"]]


def test_damage_in_the_middle_is_mended_and_loses_nothing(tmp_path, told):
    path, clock, talk = tmp_path / "chats.db", Clock(), Conversation()
    keeper = Keeper(path, told.append, clock)
    for n in range(200):
        talk.add("user", f"turn {n} " * 40)
    keeper.keep(talk, *talk.turns.values())
    keeper.db.read("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as f:
        f.seek(100)
        f.write(b"\xff" * 3000)
    keeper.db.read("PRAGMA shrink_memory")
    keeper.db.close()
    keeper.db._connection = sqlite3.connect(path, isolation_level=None)
    keeper.keep(talk, talk.add("user", "after"))
    clock.now += RETRY_EVERY_S
    keeper.keep(talk)
    assert keeper.close()
    assert any("was damaged" in line for line in told)
    assert stored(path) == [[t.content for t in talk.path()]]


def test_a_store_that_is_locked_to_the_end_is_said_and_the_chat_is_elsewhere(tmp_path, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keeper, talk = Keeper(tmp_path / "chats.db", told.append), Conversation()
    other = sqlite3.connect(tmp_path / "chats.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    keeper.keep(talk, talk.add("user", "hello"), talk.add("assistant", "hi"))
    assert not keeper.close()
    (line,) = keeper.report()
    other.close()
    assert "2 turns of the chat" in line
    file = re.search(r"is in (\S+),", line)[1]
    assert oct(os.stat(file).st_mode & 0o777) == "0o600"
    assert [t.content for t in import_talk(file).path()] == ["hello", "hi"]


def test_where_no_folder_takes_the_chat_its_text_is_said(tmp_path, told, monkeypatch):
    keeper, talk = Keeper(tmp_path / "chats.db", told.append), Conversation()
    spoil(keeper, "database or disk is full")
    keeper.keep(talk, talk.add("user", "hello"))
    assert not keeper.close()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tui.transfer.write_text", full)
    lines = keeper.report()
    assert "1 turn of the chat 'without a title' could not be saved anywhere" in lines[0]
    assert "hello" in lines


def test_a_draft_that_cannot_be_saved_is_named(tmp_path, told):
    keeper = Keeper(tmp_path / "chats.db", told.append)
    spoil(keeper, "database or disk is full")
    keeper.keep_draft("x", "half a thought")
    assert not keeper.close()
    assert keeper.report() == ["[store] what was typed and not sent, or a title or pin, could not be saved."]


def arguments():
    return build_parser().parse_args(["chat", "--plain"])


def run_plain(monkeypatch, tmp_path, *lines):
    """The exit code of plain mode with an engine that repeats what it hears."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    monkeypatch.setattr("tui.chat.Engine", lambda choice: Answering())
    return chat.run(arguments())


def test_plain_mode_ends_with_2_where_the_chat_is_not_saved(monkeypatch, tmp_path, capsys):
    (tmp_path / "home" / "chats.db").mkdir(parents=True)
    assert run_plain(monkeypatch, tmp_path, "one", "two") == 2
    out, err = capsys.readouterr()
    assert out == "re: one\nre: two\n"
    assert "4 turns of the chat 'one: re: one' could not be saved" in err
    (file,) = (tmp_path / "work").iterdir()
    assert str(file) in err
    assert len(import_talk(str(file)).path()) == 4


def test_plain_mode_ends_with_0_where_it_is(monkeypatch, tmp_path, capsys):
    assert run_plain(monkeypatch, tmp_path, "one") == 0
    assert "[store]" not in capsys.readouterr().err
    assert stored(tmp_path / "home" / "chats.db") == [["one", "re: one"]]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB."""
    place = tmp_path / "home"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill_up(disk, leave=0):
    with (disk / "film").open("wb", buffering=0) as f:
        while (left := shutil.disk_usage(disk).free - leave) > 0:
            f.write(bytes(min(left, 1 << 20)))


@pytest.mark.parametrize("leave", [0, 50_000, 130_000, 300_000])
def test_a_full_disk_loses_no_exchange(monkeypatch, tmp_path, small_disk, capsys, leave):
    """Twelve exchanges on a disk that is full from the start or in the middle: in the store, or all in the other file."""
    fill_up(small_disk, leave)
    said = [f"question {n} {'long ' * 300}".strip() for n in range(12)]
    code = run_plain(monkeypatch, tmp_path, *said)
    err = capsys.readouterr().err
    wanted = [text for question in said for text in (question, f"re: {question}")]
    if code == 0:
        assert stored(small_disk / "chats.db") == [wanted]
        return
    assert code == 2
    assert "has no room left" in err
    (file,) = (tmp_path / "work").iterdir()
    assert str(file) in err
    assert [t["content"] for t in json.loads(file.read_text())["turns"]] == wanted


def test_a_disk_that_gets_room_again_has_the_whole_chat(small_disk, told):
    clock, talk = Clock(), Conversation()
    keeper = Keeper(small_disk / "chats.db", told.append, clock)
    fill_up(small_disk)
    for n in range(20):
        keeper.keep(talk, talk.add("user", f"{n} {'long ' * 9000}"))
    assert keeper.unsaved
    (small_disk / "film").unlink()
    clock.now += RETRY_EVERY_S
    keeper.keep(talk)
    assert keeper.close()
    assert [len(said) for said in stored(small_disk / "chats.db")] == [20]
