"""A damaged store: what is whole comes back exactly, what is not is marked, and nothing is overwritten."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys

import pytest

from tui.conversation import Conversation
from tui.store import Attachment, Call, Chat, Database, Record, StoreError, Turn, chats, drafts, exchange, search, turns
from tui.store.migrations import MIGRATIONS, SEALED_SINCE
from tui.store.rows import MARK

WORDS = [
    "linear",
    "attention",
    "ring",
    "model",
    "state",
    "decay",
    "cache",
    "tokén",
    "prefill",
    "gate",
    "线性",
    "router",
]


def fill(path, count=3):
    """Chats with a branch, long and short turns, attachments, calls, thoughts, records and drafts, by their ids."""
    db, talks, said = Database(path), {}, random.Random(1)
    for n in range(count):
        talk = Conversation(Chat(f"chat {n} about {WORDS[n]}"))
        for k in range(8):
            content = " ".join(said.choices(WORDS, k=said.choice((3, 30, 200, 900))))
            added = [Attachment("a.txt", "x " * said.choice((3, 3000)))] if k == 4 else []
            turn = talk.add("assistant" if k % 2 else "user", content, added)
            if k % 2:
                turn.record, turn.thinking, turn.calls = Record("m", generated_tokens=k), "hm", (Call("add", {"a": k}),)
            if k == 5:
                talk.beside(turn, "another answer")
        db.write(
            chats.saving(talk.chat),
            drafts.saving(talk.chat.id, f"draft {n}"),
            *(turns.saving(talk.chat.id, t) for t in talk.turns.values()),
        )
        talks[talk.chat.id] = talk
    db.close()
    return talks


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The bytes of a store, and what was written into it."""
    path = tmp_path_factory.mktemp("store") / "chats.db"
    talks = fill(path)
    return path.read_bytes(), talks


def read(db, talks):
    """Whole turns, damaged ones and missing ones; each that is not marked must be what was written."""
    whole, damaged = set(), set()
    for chat in chats.listed(db):
        assert MARK in chat.title or chat.title == talks[chat.id].chat.title
        draft = drafts.load(db, chat.id)
        assert not draft or MARK in draft or draft == f"draft {list(talks).index(chat.id)}"
        found = turns.load(db, chat.id)
        talk = Conversation(chat, found)
        assert exchange.to_markdown(chat, talk.path())
        assert {t.id for start in talk._children.get(None, []) for t in below(talk, start)} == {t.id for t in found}
        for turn in turns.load(db, chat.id):
            if turn.is_damaged:
                damaged.add(turn.id)
            else:
                assert turn == talks[chat.id].turns[turn.id]
                whole.add(turn.id)
    for words in ("ring", "线性", "draft"):
        for hit in search.find(db, words):
            assert MARK in hit.title or hit.title == talks[hit.chat].chat.title
            assert MARK in hit.snippet or hit.turn in whole or hit.turn in damaged
    assert set(turns.recent_questions(db)) <= {t.content for talk in talks.values() for t in talk.turns.values()}
    missing = {t for talk in talks.values() for t in talk.turns} - whole - damaged
    return whole, damaged, missing


def below(talk, start):
    """A turn and all that follow it."""
    waiting = [start]
    while waiting:
        yield talk.turns[waiting[-1]]
        waiting += talk._children.get(waiting.pop(), [])


def write_on(db):
    """A chat goes on, whatever was damaged."""
    for chat in chats.listed(db):
        db.write(turns.saving(chat.id, Turn("user", "and then?", chat.leaf)))
        db.write(chats.saving(chat))
        db.write(chats.renaming(chat.id, "renamed"))
        assert turns.load(db, chat.id)[-1].content == "and then?"
    chats.purge(db)


def flip(data, chance, start, stop):
    data[chance.randrange(start, stop)] ^= 1 << chance.randrange(8)


def garble(data, chance, start, stop):
    at, length = chance.randrange(start, stop), chance.choice((1, 2, 4, 16, 64))
    data[at : at + length] = chance.randbytes(len(data[at : at + length]))


def lose_page(data, chance, start, stop):
    at = chance.randrange(len(data) // 4096) * 4096
    data[at : at + 4096] = bytes(4096) if chance.random() < 0.5 else chance.randbytes(4096)


def cut(data, chance, start, stop):
    del data[chance.randrange(1, stop) :]


@pytest.mark.parametrize(
    ("damage", "count", "stop"),
    [(flip, 90, None), (flip, 30, 100), (garble, 40, None), (lose_page, 12, None), (cut, 12, None)],
)
def test_no_damage_is_taken_for_what_was_said(tmp_path, store, damage, count, stop):
    """184 stores, each damaged elsewhere: no other text, no traceback, and after a flip no turn is missing."""
    data, talks = store
    chance, refused = random.Random(7), 0
    everything = {t for talk in talks.values() for t in talk.turns}
    for n in range(count):
        path = tmp_path / str(n) / "chats.db"
        path.parent.mkdir()
        broken = bytearray(data)
        damage(broken, chance, 0, stop or len(broken))
        path.write_bytes(broken)
        try:
            db = Database(path)
        except StoreError as e:
            refused += "newer ring-mlx" in str(e) or 100
            assert path.read_bytes() == broken
            continue
        whole, _, missing = read(db, talks)
        if damage is flip:
            assert not missing
            assert len(whole) >= len(everything) - 1
        if db.notes:
            kept = path.with_name("chats.db.damaged-1")
            assert kept.read_bytes() == broken
            assert f"the damaged one is kept as {kept}." in db.notes[0]
        elif len(whole) == len(everything):
            write_on(db)
        db.close()
        shutil.rmtree(path.parent)
    assert refused < 8


@pytest.mark.parametrize(
    "column", ["content", "thinking", "role", "parent", "attachments", "calls", "record", "created"]
)
def test_a_change_in_any_column_of_a_turn_marks_it_and_no_other(tmp_path, column):
    (talk,) = fill(tmp_path / "chats.db", 1).values()
    turn = talk.path()[3]
    outside = sqlite3.connect(tmp_path / "chats.db")
    # Such as could have been written: what cannot be unpacked is marked whatever its seal.
    said = {"role": "user", "attachments": '[["a.txt", "other"]]', "calls": '[["f", {}]]', "record": '{"model": "x"}'}
    value = {"parent": talk.path()[0].id, "created": 5.5, **said}.get(column, "[1]")
    outside.execute(f"UPDATE turns SET {column} = ? WHERE id = ?", (value, turn.id))
    outside.commit()
    outside.close()
    db = Database(tmp_path / "chats.db")
    again = Conversation(chats.load(db, talk.chat.id), turns.load(db, talk.chat.id))
    assert [t.id for t in again.turns.values() if t.is_damaged] == [turn.id]
    db.write(turns.saving(talk.chat.id, again.turns[turn.id]))
    assert [t.id for t in turns.load(db, talk.chat.id) if t.is_damaged] == [turn.id], "the mark stays"
    assert "damaged on the disk" in exchange.to_markdown(again.chat, again.path(turn.id))
    _, imported = exchange.from_json(exchange.to_json(again.chat, list(again.turns.values())))
    assert sum(t.is_damaged for t in imported) == 1
    db.close()


@pytest.mark.parametrize(("column", "value"), [("title", "other"), ("deleted", 1.0), ("leaf", "x"), ("changed", 3.0)])
def test_a_change_in_any_column_of_a_chat_marks_its_title_and_deletes_nothing(tmp_path, column, value):
    fill(tmp_path / "chats.db", 1)
    outside = sqlite3.connect(tmp_path / "chats.db")
    outside.execute(f"UPDATE chats SET {column} = ?", (value,))
    outside.commit()
    outside.close()
    db = Database(tmp_path / "chats.db")
    chats.purge(db)
    (found,) = chats.listed(db)
    assert found.title.startswith(MARK)
    assert search.find(db, "ring")[0].title.startswith(MARK)
    db.write(chats.saving(found))
    assert chats.listed(db)[0].title.count(MARK) == 1
    db.write(chats.renaming(found.id, "mended by hand"))
    assert chats.listed(db)[0].title == "mended by hand"
    db.close()


def test_a_damaged_draft_is_marked_and_recalled_questions_leave_damaged_ones_out(tmp_path):
    (talk,) = fill(tmp_path / "chats.db", 1).values()
    outside = sqlite3.connect(tmp_path / "chats.db")
    outside.execute("UPDATE drafts SET content = 'other'")
    outside.execute("UPDATE turns SET content = 'other' WHERE role = 'user'")
    outside.commit()
    outside.close()
    db = Database(tmp_path / "chats.db")
    assert drafts.load(db, talk.chat.id) == f"{MARK} other"
    assert turns.recent_questions(db) == []
    assert search.find(db, "other")[0].snippet.startswith(MARK)
    assert search.find(db, "线性")
    db.close()


@pytest.mark.parametrize("size", [0, 1 << 30])
def test_a_damaged_index_of_words_is_made_again(tmp_path, monkeypatch, size):
    (talk,) = fill(tmp_path / "chats.db", 1).values()
    db = Database(tmp_path / "chats.db")
    whole = len(search.find(db, "ring"))
    db._connection.execute("UPDATE found_data SET block = x'00ff' WHERE id > 9")
    db.close()
    monkeypatch.setattr("tui.store.connection.INDEX_CHECKED_BYTES", size)
    db = Database(tmp_path / "chats.db")
    assert len(search.find(db, "ring")) == whole
    db._connection.execute("UPDATE found_data SET block = x'00ff' WHERE id > 9")
    talk.leaf.content = "ring " * 3
    db.write(turns.saving(talk.chat.id, talk.leaf))
    assert turns.load(db, talk.chat.id)[-1].content == talk.leaf.content
    db.close()


def test_an_index_of_words_that_breaks_while_the_chat_runs_is_made_again(tmp_path):
    (talk,) = fill(tmp_path / "chats.db", 1).values()
    db = Database(tmp_path / "chats.db")
    whole = len(search.find(db, "ring"))
    for broken in (b"\0\xff", b"", b"\xff" * 99):
        db._connection.execute("UPDATE found_data SET block = ? WHERE id > 9", (broken,))
        assert len(search.find(db, "ring")) == whole > 1
        db._connection.execute("UPDATE found_data SET block = ? WHERE id <= 9", (broken,))
        db.write(turns.saving(talk.chat.id, turn := Turn("user", f"and {broken.hex()} then?", talk.leaf.id)))
        assert turns.load(db, talk.chat.id)[-1] == turn
    db.close()


@pytest.mark.parametrize(
    "content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000, b"\0" * 9000]
)
def test_what_is_no_store_is_kept_beside_a_new_one(tmp_path, content):
    path = tmp_path / "chats.db"
    path.write_bytes(content)
    for n in (1, 2):
        db = Database(path)
        assert "\n" not in db.notes[0]
        assert f"chats.db.damaged-{n}." in db.notes[0]
        assert chats.listed(db) == []
        db.close()
        assert path.with_name(f"chats.db.damaged-{n}").read_bytes() == content
        path.write_bytes(content)


def test_the_log_of_a_damaged_store_is_read_too(tmp_path):
    source = tmp_path / "open.db"
    (talk,) = fill(source, 1).values()
    db = Database(source)
    db.write(turns.saving(talk.chat.id, late := Turn("user", "only in the log", talk.leaf.id)))
    path = tmp_path / "copy" / "chats.db"
    path.parent.mkdir()
    for end in ("", "-wal"):
        shutil.copy(f"{source}{end}", f"{path}{end}")
    db.close()
    broken = bytearray(path.read_bytes())
    broken[0] ^= 1
    path.write_bytes(broken)
    db = Database(path)
    assert db.notes
    assert late in turns.load(db, talk.chat.id)
    assert path.with_name("chats.db.damaged-1-wal").stat().st_size
    db.close()


def left_behind(path, talk_of):
    """A store as a killed process leaves it, with its log; and the turns that only the log holds."""
    source = path.with_name("source.db")
    (talk,) = talk_of(source).values()
    db, late = Database(source), []
    for n in range(6):
        late.append(Turn("user", f"late {n} " * 30, late[-1].id if late else talk.leaf.id))
        db.write(turns.saving(talk.chat.id, late[-1]))
    for end in ("", "-wal"):
        shutil.copy(f"{source}{end}", f"{path}{end}")
    db.close()
    return talk, late


def test_a_damaged_log_is_not_passed_over_without_a_word(tmp_path):
    """SQLite forgets all commits from the first wrong checksum on; the last alone may be what a kill left."""
    path, chance, unsaid = tmp_path / "chats.db", random.Random(5), 0
    talk, late = left_behind(path, lambda source: fill(source, 1))
    data, log = path.read_bytes(), path.with_name("chats.db-wal").read_bytes()
    for n in range(30):
        path.write_bytes(data)
        broken = bytearray(log)
        if n:
            broken[chance.randrange(0, 4000 if n < 10 else len(broken))] ^= 1 << chance.randrange(8)
        path.with_name("chats.db-wal").write_bytes(broken)
        db = Database(path)
        found = {t.id: t for t in turns.load(db, talk.chat.id)}
        lost = [t for t in late if t.id not in found or (found[t.id] != t and not found[t.id].is_damaged)]
        assert len(lost) <= 1
        assert len([t for t in late if found.get(t.id) == t]) >= len(late) - 1
        if bool(db.notes) != (n > 0):
            assert lost in ([], late[-1:])
            unsaid += 1
        db.close()
        for kept in tmp_path.glob("chats.db*"):
            kept.unlink()
    assert unsaid < 8


def test_a_log_that_a_kill_tore_loses_nothing_that_was_said(tmp_path):
    """The header of the last frame is there, its page is not, or is what the log held before."""
    path, frame = tmp_path / "chats.db", 24 + 4096
    talk, late = left_behind(path, lambda source: fill(source, 1))
    data, log = path.read_bytes(), path.with_name("chats.db-wal").read_bytes()
    for page in (bytes(4096), log[32 + 24 : 32 + frame]):
        path.write_bytes(data)
        path.with_name("chats.db-wal").write_bytes(log[:-4096] + page)
        db = Database(path)
        assert db.notes == []
        found = {t.id: t for t in turns.load(db, talk.chat.id)}
        assert [t for t in late[:-1] if found.get(t.id) != t] == []
        db.close()
        for kept in tmp_path.glob("chats.db*"):
            kept.unlink()
    damaged = bytearray(data)
    damaged[20] ^= 1
    path.write_bytes(damaged)
    path.with_name("chats.db-wal").write_bytes(log[:-4096] + bytes(4096))
    db = Database(path)
    assert db.notes
    found = {t.id: t for t in turns.load(db, talk.chat.id)}
    assert [t for t in late[:-1] if found.get(t.id) != t] == []
    db.close()


def test_another_window_keeps_a_store_from_being_mended(tmp_path, store, monkeypatch):
    monkeypatch.setattr("tui.store.access.LOCK_WAIT_S", 0.05)
    path = tmp_path / "chats.db"
    path.write_bytes(store[0])
    other = Database(path)
    broken = bytearray(store[0])
    broken[20] ^= 1
    path.write_bytes(broken)
    with pytest.raises(StoreError, match="another window has it open"):
        Database(path)
    assert path.read_bytes() == broken
    other.close()
    db = Database(path)
    assert len(read(db, store[1])[0]) == sum(len(talk.turns) for talk in store[1].values())
    db.close()


def test_a_rescue_that_is_killed_is_finished_by_the_next_one(tmp_path, store, monkeypatch):
    path = tmp_path / "chats.db"
    broken = bytearray(store[0])
    broken[0] ^= 1
    path.write_bytes(broken)
    replace, left = os.replace, [0]

    def killed(*args):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*args)

    for allowed in (0, 1):
        left[0] = allowed
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Database(path)
        monkeypatch.setattr(os, "replace", replace)
        assert path.read_bytes() == broken
    db = Database(path)
    assert len(read(db, store[1])[0]) == sum(len(talk.turns) for talk in store[1].values())
    db.close()


def test_a_schema_that_is_no_text_is_mended(tmp_path, store):
    """SQLite quotes it in its error."""
    path = tmp_path / "chats.db"
    for name in (b"CREATE TABLE turns (", b"CREATE TRIGGER turns_added", b"CREATE VIRTUAL TABLE found"):
        broken = bytearray(store[0])
        at = broken.index(name)
        broken[at : at + 12] = b"CREATE \xf5\xf5\xf5TA"
        path.write_bytes(broken)
        db = Database(path)
        assert len(read(db, store[1])[0]) == sum(len(talk.turns) for talk in store[1].values())
        db.close()


@pytest.mark.parametrize(("at", "value"), [(18, 3), (19, 9), (20, 1), (59, 2), (59, 3)])
def test_a_wrong_byte_of_the_header_does_not_make_a_store_read_only_or_foreign(tmp_path, store, at, value):
    path = tmp_path / "chats.db"
    broken = bytearray(store[0])
    broken[at] = value
    path.write_bytes(broken)
    db = Database(path)
    assert len(read(db, store[1])[0]) == sum(len(talk.turns) for talk in store[1].values())
    write_on(db)
    db.close()


def test_a_damage_that_nobody_thought_of_is_one_line_too(tmp_path, monkeypatch):
    path = tmp_path / "chats.db"
    path.write_bytes(b"x" * 5000)
    monkeypatch.setattr("tui.store.rescue._Found", lambda pages: 1 / 0)
    with pytest.raises(StoreError, match=r"is damaged; .*ZeroDivisionError"):
        Database(path)
    assert path.read_bytes() == b"x" * 5000


def old_store(path, count=1500):
    """A store of the last version without seals, with one row that is damaged already."""
    old = sqlite3.connect(path)
    for script in MIGRATIONS[: SEALED_SINCE - 1]:
        old.executescript(script)
    old.execute(f"PRAGMA user_version = {SEALED_SINCE - 1}")
    old.execute("PRAGMA journal_mode = WAL")
    old.execute("INSERT INTO chats VALUES (1, 'c', 'old', NULL, 0, NULL, 1, 2)")
    for n in range(count):
        said = f"turn {n}" if n != 7 else b"\xff\xfe"
        old.execute(
            "INSERT INTO turns VALUES (?, ?, 'c', NULL, 'user', CAST(? AS TEXT), '', '[]', NULL, 1, '[]')",
            (n, f"t{n}", said),
        )
    old.execute("INSERT INTO turns VALUES (?, 'json', 'c', NULL, 'user', 'x', '', '[', NULL, 1, '[]')", (count,))
    old.commit()
    old.close()


def test_a_migration_seals_what_is_whole_and_marks_what_is_not(tmp_path):
    old_store(tmp_path / "chats.db")
    db = Database(tmp_path / "chats.db")
    found = turns.load(db, "c")
    assert [t.id for t in found if t.is_damaged] == ["t7", "json"]
    assert [t.content for t in found if not t.is_damaged] == [f"turn {n}" for n in range(1500) if n != 7]
    assert "\ufffd" in found[7].content
    assert not chats.load(db, "c").title.startswith(MARK)
    db.close()


MIGRATE = "import sys; from pathlib import Path; from tui.store import Database; print(flush=True); Database(Path(sys.argv[1]))"


def test_a_migration_that_is_killed_loses_nothing(tmp_path):
    old_store(tmp_path / "old.db", 4000)
    chance = random.Random(3)
    for n in range(6):
        path = tmp_path / f"{n}.db"
        shutil.copy(tmp_path / "old.db", path)
        process = subprocess.Popen([sys.executable, "-c", MIGRATE, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.001 + 0.02 * chance.random())
        process.kill()
        process.stdout.close()
        process.wait()
        db = Database(path)
        assert db.notes == []
        assert len([t for t in turns.load(db, "c") if not t.is_damaged]) == 3999
        db.close()


def test_a_damaged_store_without_seals_is_believed_where_it_can_be_read(tmp_path):
    path = tmp_path / "chats.db"
    old_store(path, 100)
    broken = bytearray(path.read_bytes())
    broken[0] ^= 1
    path.write_bytes(broken)
    db = Database(path)
    assert [t.content for t in turns.load(db, "c") if not t.is_damaged] == [f"turn {n}" for n in range(100) if n != 7]
    db.close()
