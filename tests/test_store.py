"""The store of chats: what is written is there after kill -9, beside another writer, and from an older version."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import time

import pytest

from tui.conversation import Conversation, said, title_of
from tui.store import Attachment, Call, Chat, Database, Record, StoreError, Turn, chats, drafts, exchange, search, turns
from tui.store.migrations import MIGRATIONS, NEWEST, SEALED_SINCE, version_of
from tui.store.rows import CHATS, TURNS

RECORD = Record(
    model="mini", quantisation="4-bit", sampling={"temp": 0.6}, generated_tokens=7, thinking_s=1.5, finish_reason="stop"
)


@pytest.fixture
def db(tmp_path):
    database = Database(tmp_path / "chats.db")
    yield database
    database.close()


def filled(db, title="Sums", question="What is two and two?", answer="It is **four**."):
    """A chat of one exchange in the store."""
    talk = Conversation(Chat(title))
    talk.add("user", question, [Attachment("a.txt", "one\n```\ntwo")])
    talk.add("assistant", answer).record = RECORD
    talk.leaf.thinking = "hm"
    talk.leaf.calls = (Call("add", {"a": [1, "é"]}),)
    db.write(chats.saving(talk.chat), *(turns.saving(talk.chat.id, t) for t in talk.turns.values()))
    return talk


def test_a_chat_comes_back_as_it_was(db):
    talk = filled(db)
    again = Conversation(chats.load(db, talk.chat.id), turns.load(db, talk.chat.id))
    assert again.turns == talk.turns
    assert again.path() == talk.path()
    assert (again.chat.title, again.chat.leaf, again.chat.turns) == ("Sums", talk.chat.leaf, 2)
    assert db.read("PRAGMA journal_mode")[0][0] == "wal"


def test_saving_a_turn_again_replaces_its_text_and_its_index(db):
    talk = filled(db)
    talk.leaf.content = "It is five."
    db.write(turns.saving(talk.chat.id, talk.leaf))
    assert not search.find(db, "four")
    assert search.find(db, "five")[0].turn == talk.leaf.id


def test_list_rename_pin_delete_and_restore(db):
    first, second = filled(db, "first").chat, filled(db, "second").chat
    second.changed = first.changed + 1
    db.write(chats.saving(second))
    assert [c.title for c in chats.listed(db)] == ["second", "first"]
    db.write(chats.pinning(first.id, True))
    db.write(chats.renaming(first.id, "renamed"))
    assert [(c.title, c.pinned) for c in chats.listed(db)] == [("renamed", True), ("second", False)]
    db.write(chats.deleting(first.id))
    assert [c.title for c in chats.listed(db)] == ["second"]
    assert {h.title for h in search.find(db, "two")} == {"second"}
    db.write(chats.restoring(first.id))
    assert len(chats.listed(db)) == 2
    db.write(chats.deleting(first.id))
    chats.purge(db)
    assert chats.load(db, first.id)
    chats.purge(db, older_than_s=-1)
    assert chats.load(db, first.id) is None
    assert turns.load(db, first.id) == []


def test_drafts(db):
    db.write(drafts.saving("x", "half a"), drafts.saving("x", "half a thought"))
    assert drafts.load(db, "x") == "half a thought"
    db.write(drafts.saving("x", ""))
    assert drafts.load(db, "x") == ""


@pytest.mark.parametrize(
    ("typed", "marked"),
    [
        ("Säule", "säulen"),
        ("saul", "säulen"),
        ("zeh säu", "zehn"),
        ('"quo"; -te* NEAR(', None),
        ("", None),
        ("(", None),
        ("线性", "线性"),
    ],
)
def test_search_marks_hits_and_takes_any_text(db, typed, marked):
    filled(db, question="Wo stehen zehn säulen? \x1b[2J", answer="什么是线性注意力机制")
    hits = search.find(db, typed)
    assert bool(hits) == (marked is not None)
    if marked:
        assert f"{search.OPEN}{marked}{search.CLOSE}" in hits[0].snippet


def test_search_among_many(db):
    """The bound is generous; benchmarks/chat_load.py measures it."""
    rows = [(f"c{n}", f"chat {n}", 0, float(n), float(n)) for n in range(10_000)]
    said = [
        (f"t{n}", f"c{n}", f"number {n} word{n % 97} and the ring model of {n // 7}", float(n)) for n in range(10_000)
    ]
    c = db._connection
    c.execute("BEGIN")
    c.executemany("INSERT INTO chats (id, title, pinned, created, changed) VALUES (?, ?, ?, ?, ?)", rows)
    c.executemany(
        "INSERT INTO turns (id, chat, role, content, thinking, attachments, created) VALUES (?, ?, 'user', ?, '', '[]', ?)",
        said,
    )
    c.execute("COMMIT")
    for typed in ("word96", "ring", "the ring model", "w", "9999"):
        started = time.process_time()
        assert search.find(db, typed)
        assert time.process_time() - started < 1.0
    started = time.process_time()
    assert len(chats.listed(db)) == 1000
    assert time.process_time() - started < 1.0


def test_two_thousand_turns(db):
    talk = Conversation(Chat("long"))
    for n in range(2000):
        talk.add("assistant" if n % 2 else "user", f"turn {n}")
    db.write(chats.saving(talk.chat), *(turns.saving(talk.chat.id, t) for t in talk.turns.values()))
    started = time.process_time()
    again = Conversation(chats.load(db, talk.chat.id), turns.load(db, talk.chat.id))
    assert [t.content for t in again.path()] == [f"turn {n}" for n in range(2000)]
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("version", range(1, NEWEST))
def test_an_older_store_is_brought_up_to_date(tmp_path, version):
    path = tmp_path / "chats.db"
    old = sqlite3.connect(path)
    for script in MIGRATIONS[:version]:
        old.executescript(script)
    old.execute(f"PRAGMA user_version = {version}")
    columns = "row, id, title, leaf, pinned, deleted, created, changed"
    old.execute(f"INSERT INTO chats ({columns}) VALUES (1, 'c', 'old', 't', 0, NULL, 1, 2)")
    columns = "row, id, chat, parent, role, content, thinking, attachments, record, created"
    old.execute(f"INSERT INTO turns ({columns}) VALUES (1, 't', 'c', NULL, 'user', 'ancient words', '', '[]', NULL, 1)")
    if version >= SEALED_SINCE:
        old.row_factory = sqlite3.Row
        for table in (CHATS, TURNS):
            (found,) = old.execute(f"SELECT * FROM {table.name}")
            old.execute(f"UPDATE {table.name} SET seal = ?", (table.seal(found),))
    old.commit()
    old.close()
    db = Database(path)
    assert version_of(db._connection) == NEWEST
    assert search.find(db, "ancient")[0].title == "old"
    assert drafts.load(db, "c") == ""
    assert (chats.load(db, "c").title, chats.load(db, "c").settings) == ("old", {})
    assert not turns.load(db, "c")[0].is_damaged
    db.close()


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "chats.db"
    monkeypatch.setattr(
        "tui.store.migrations.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE extra (x); CREATE TABLE chats (x);")
    )
    monkeypatch.setattr("tui.store.migrations.NEWEST", NEWEST + 1)
    with pytest.raises(StoreError):
        Database(path)
    plain = sqlite3.connect(path)
    assert version_of(plain) == 0
    assert plain.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    plain.close()


def failure(path):
    with pytest.raises(StoreError) as e:
        Database(path)
    text = str(e.value)
    assert text.startswith("[store] ")
    assert "\n" not in text
    assert "stays in memory" in text
    return text


def test_a_newer_store_is_refused(tmp_path, db):
    db._connection.execute("PRAGMA user_version = 99")
    assert "format 99" in failure(tmp_path / "chats.db")


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "stays in memory" in failure(tmp_path / "file" / "chats.db")
    (tmp_path / "chats.db").mkdir()
    assert "cannot be opened" in failure(tmp_path / "chats.db")


def test_a_full_disk_loses_nothing_that_was_saved(db):
    talk = filled(db)
    pages = db.read("PRAGMA page_count")[0][0]
    db._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreError, match=r"^\[store\] .*has no room left; free some disk space"):
        db.write(turns.saving(talk.chat.id, Turn("user", "x" * 100_000)))
    assert len(turns.load(db, talk.chat.id)) == 2
    db._connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    db.write(turns.saving(talk.chat.id, Turn("user", "x" * 100_000)))
    assert len(turns.load(db, talk.chat.id)) == 3


def test_a_store_that_may_only_be_read(db):
    db._connection.execute("PRAGMA query_only = 1")
    with pytest.raises(StoreError, match="cannot be opened or written; check the folder"):
        db.write(chats.saving(Chat()))


def test_a_locked_store_is_said_to_be_busy_and_works_afterwards(tmp_path, db):
    other = Database(tmp_path / "chats.db", wait_s=0.01)
    db._connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="kept busy by another window"):
        other.write(chats.saving(Chat("late")))
    db._connection.execute("COMMIT")
    late = Chat("late")
    other.write(chats.saving(late))
    assert chats.load(db, late.id) == late
    assert chats.listed(db) == []  # nothing was said in it yet
    other.close()


WRITER = """
import sys
from pathlib import Path
from tui.conversation import Conversation
from tui.store import Chat, Database, chats, turns
db = Database(Path(sys.argv[1]))
talk = Conversation(Chat(sys.argv[2]))
talk.add("user", "go on")
answer = talk.add("assistant", "")
db.write(chats.saving(talk.chat), *(turns.saving(talk.chat.id, t) for t in talk.turns.values()))
print(answer.id, flush=True)
for n in range(int(sys.argv[3])):
    answer.content += f"w{n} "
    db.write(turns.saving(talk.chat.id, answer))
    print(n, flush=True)
"""


def writer(path, title, count):
    command = [sys.executable, "-c", WRITER, str(path), title, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_kill_at_random_moments_loses_nothing_that_was_said_to_be_written(tmp_path):
    """50 writers, each killed after a random number of writes and a random while."""
    path, chance = tmp_path / "chats.db", random.Random(7)
    Database(path).close()
    for n in range(50):
        process = writer(path, f"chat {n}", 1_000_000)
        answer = process.stdout.readline().strip()
        said = [process.stdout.readline() for _ in range(chance.randrange(30))]
        time.sleep(chance.random() * 0.004)
        process.kill()
        said += process.stdout.read().split()
        process.stdout.close()
        process.wait()
        db = Database(path)
        (row,) = db.read("SELECT content FROM turns WHERE id = ?", (answer,))
        words = row["content"].split()
        assert words == [f"w{i}" for i in range(len(words))]
        assert len(words) >= len(said)
        db.close()
    db = Database(path)
    assert db.read("PRAGMA integrity_check")[0][0] == "ok"
    db.write(("INSERT INTO found (found, rank) VALUES ('integrity-check', 1)", ()))
    assert len(chats.listed(db)) == 50
    db.close()


def test_two_writers_at_once(tmp_path):
    path = tmp_path / "chats.db"
    both = [writer(path, name, 300) for name in ("one", "two")]
    for process in both:
        assert len(process.stdout.read().split()) == 301
        process.stdout.close()
        assert process.wait() == 0
    db = Database(path)
    assert db.read("PRAGMA integrity_check")[0][0] == "ok"
    assert {c.title for c in chats.listed(db)} == {"one", "two"}
    for chat in chats.listed(db):
        assert len(turns.load(db, chat.id)[1].content.split()) == 300
    db.close()


def test_export_and_import(db):
    talk = filled(db)
    talk.beside(talk.path()[-1], "It is 4.")
    text = exchange.to_json(talk.chat, list(talk.turns.values()))
    chat, found = exchange.from_json(text)
    again = Conversation(chat, found)
    assert [said(t) for t in again.path()] == [said(t) for t in talk.path()]
    assert len(again.siblings(again.leaf)) == 2
    assert again.path()[0].id != talk.path()[0].id
    assert [t.record for t in found] == [None, RECORD, None]
    assert found[1].calls == (Call("add", {"a": [1, "é"]}),)
    db.write(chats.saving(chat), *(turns.saving(chat.id, t) for t in found))
    assert len(chats.listed(db)) == 2


def test_markdown_has_no_thought_and_fences_attachments(db):
    text = exchange.to_markdown(filled(db).chat, filled(db).path())
    assert text == (
        "# Sums\n\n## You\n\nWhat is two and two?\n\na.txt:\n\n````\none\n```\ntwo\n````\n\n## mini\n\nIt is **four**.\n"
        '\n```json\n{\n  "name": "add",\n  "arguments": {\n    "a": [\n      1,\n      "é"\n    ]\n  }\n}\n```\n'
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(format="x"),
        lambda raw: raw.update(version=2),
        lambda raw: raw.pop("turns"),
        lambda raw: raw["turns"][0].update(role="system"),
        lambda raw: raw["turns"][0].update(parent=raw["turns"][1]["id"]),
        lambda raw: raw.update(turns=[3]),
        lambda raw: raw["turns"][0].update(attachments=None),
    ],
)
def test_a_foreign_file_is_not_imported(db, change):
    raw = json.loads(exchange.to_json(Chat(), list(filled(db).turns.values())))
    change(raw)
    with pytest.raises(StoreError, match=r"^\[store\] the file is"):
        exchange.from_json(json.dumps(raw))
    for text in ("", "[]", "null", "{", "[" * 100_000):
        with pytest.raises(StoreError):
            exchange.from_json(text)


def test_a_record_takes_only_what_it_knows():
    assert Record.from_dict({"model": 3, "thinking_s": 2, "new": 1, "is_edited": True}) == Record(
        thinking_s=2, is_edited=True
    )


def tree():
    talk = Conversation()
    talk.add("user", "q1")
    talk.add("assistant", "a1")
    talk.add("user", "q2")
    talk.add("assistant", "a2")
    return talk


def texts(talk):
    return [t.content for t in talk.path()]


def test_edits_branches_and_undo():
    talk = tree()
    q2 = talk.path()[2]
    talk.mark()
    other = talk.beside(q2, "q2 edited")
    assert texts(talk) == ["q1", "a1", "q2 edited"]
    assert talk.switch(other, -1) is q2
    assert texts(talk) == ["q1", "a1", "q2", "a2"]
    assert talk.switch(q2, -1) is None
    talk.cut_after(talk.path()[1])
    talk.mark()
    talk.add("user", "third")
    assert len(talk.siblings(talk.leaf)) == 3
    for expected in (["q1", "a1"], ["q1", "a1", "q2", "a2"], ["q1", "a1", "q2 edited"], ["q1", "a1", "q2", "a2"]):
        assert talk.undo()
        assert texts(talk) == expected
    assert not talk.undo()
    assert len(talk.turns) == 6


def test_undo_of_a_continued_answer():
    talk = tree()
    talk.mark(talk.leaf)
    talk.leaf.content += " and more"
    assert talk.undo()
    assert talk.leaf.content == "a2"


def test_turns_without_their_parent_are_not_lost():
    orphan = Turn("user", "left", parent="gone")
    talk = Conversation(Chat(leaf="nowhere"), [orphan])
    assert texts(talk) == ["left"]
    assert talk.siblings(orphan) == [orphan]


@pytest.mark.parametrize(
    ("question", "answer", "title"),
    [
        ("What is a ring?", "A set.", "What is a ring?"),
        ("## hi", "**Hello!** How can I help?\nMore", "hi: Hello! How can I help?"),
        (
            "Explain linear attention to me as if I were a physicist",
            "",
            "Explain linear attention to me as if I were a…",
        ),
        ("\n\n", "", ""),
        ("x" * 60, "", "x" * 48 + "…"),
    ],
)
def test_titles(question, answer, title):
    assert title_of(question, answer) == title


def test_turns_that_follow_themselves_begin_branches():
    circle = [Turn("user", name, parent, id=name) for name, parent in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "d"))]
    talk = Conversation(Chat(leaf="b"), [*circle, Turn("user", "e", "a", id="e")])
    assert [t.id for t in talk.siblings(talk.turns["d"])] == ["c", "d"]
    assert texts(talk) == ["c", "b"]
    talk.show("a")
    assert texts(talk) == ["c", "b", "a", "e"]
    assert talk.switch(talk.turns["c"], 1).id == "d"
    assert texts(talk) == ["d"]
