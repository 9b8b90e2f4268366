"""Settings of a chat in the store: saved, merged, damaged, rescued, exported."""

from __future__ import annotations

import json
import sqlite3

import pytest

from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.store import Chat, Database, StoreError, Turn, chats, drafts, exchange, settings, turns
from tui.store.migrations import MIGRATIONS
from tui.store.rows import MARK

MINE = {"system_prompt": "Be brief.", "temp": 0.25, "seed": None, "model": {"path": "owner/ring"}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chats.db"


def stored(path, mine=MINE, chat_id="c"):
    """A store with a chat of one question."""
    db = Database(path)
    db.write(chats.saving(Chat("one", id=chat_id)), turns.saving(chat_id, Turn("user", "q")))
    db.write(settings.changing(chat_id, mine))
    return db


def outside(path, *statements):
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(*statement)
    connection.commit()
    connection.close()


def found(db):
    chat = chats.load(db, "c")
    return chat.settings, chat.are_settings_damaged


def test_settings_outlive_the_process_and_the_chat_is_saved_without_them(path):
    stored(path).close()
    db = Database(path)
    assert found(db) == (MINE, False)
    db.write(chats.saving(Chat("one", id="c")), chats.pinning("c", True))
    assert found(db) == (MINE, False)
    db.close()


def test_two_windows_change_different_settings(path):
    db, other = stored(path), Database(path)
    other.write(settings.changing("c", {"temp": 0.5}))
    db.write(settings.changing("c", {"seed": 3}))
    assert found(other)[0] == {**MINE, "temp": 0.5, "seed": 3}
    db.close()
    other.close()


def test_settings_of_a_chat_that_is_not_there_are_not_kept_and_go_with_it(path):
    db = stored(path)
    db.write(settings.changing("nowhere", MINE), drafts.saving("c", "half"))
    db.write(chats.deleting("c"))
    chats.purge(db, older_than_s=-1)
    assert db.read("SELECT * FROM settings") == db.read("SELECT * FROM drafts") == []
    db.close()


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ('{"temp": 9}', {"temp": 9}),
        ("{", {}),
        ("[1]", {}),
        ("3", {}),
        (b"\xff", {}),
        (7, {}),
        ("[" * 5000, {}),
        ('{"a":' * 500, {}),
    ],
)
def test_damaged_settings_say_so_until_all_are_given(path, content, left):
    stored(path).close()
    outside(path, ("UPDATE settings SET content = ?", (content,)))
    db = Database(path)
    assert found(db) == (left, True)
    assert chats.load(db, "c").title == "one"
    db.write(settings.changing("c", {"seed": 1}))
    assert found(db) == ({**left, "seed": 1}, bool(left))
    db.write(settings.changing("c", {**MINE, "temp": 1}))
    assert found(db) == ({**MINE, "temp": 1}, False)
    db.close()


def test_any_changed_column_is_seen(path):
    for change in ("content = replace(content, 'brief', 'grief')", "named = 1", "seal = x'00'", "seal = NULL"):
        stored(path).close()
        outside(path, (f"UPDATE settings SET {change}",))
        db = Database(path)
        assert found(db)[1], change
        db.close()
        path.unlink()


def test_a_rescued_store_has_the_settings_and_keeps_them_from_drafts(path):
    db = stored(path)
    db.write(drafts.saving("c", "half a thought"), chats.renaming("c", "mine"))
    db.close()
    broken = bytearray(path.read_bytes())
    broken[20] ^= 1
    path.write_bytes(broken)
    db = Database(path)
    assert db.notes
    assert found(db) == (MINE, False)
    assert drafts.load(db, "c") == "half a thought"
    db.write(chats.entitling("c", "model's"))
    assert chats.load(db, "c").title == "mine"
    db.close()


@pytest.mark.parametrize("what", [settings.changing("c" * 32, MINE), drafts.saving("c" * 32, "half a thought")])
def test_a_row_whose_chat_has_another_name_finds_it_again(path, what):
    db = Database(path)
    db.write(chats.saving(Chat("one", id="c" * 32)), turns.saving("c" * 32, Turn("user", "q")), what)
    db.close()
    table = "settings" if callable(what) else "drafts"
    outside(path, (f"UPDATE {table} SET chat = ?", ("c" * 31 + "b",)))
    broken = bytearray(path.read_bytes())
    broken[20] ^= 1
    path.write_bytes(broken)
    db = Database(path)
    if callable(what):
        assert settings.load(db, "c" * 32) == (MINE, False)
    else:
        assert drafts.load(db, "c" * 32) == "half a thought"
    db.close()


def test_a_title_of_the_users_is_never_replaced(path):
    db, other = stored(path), Database(path)
    db.write(chats.entitling("c", "first"))
    assert chats.load(db, "c").title == "first"
    other.write(chats.renaming("c", "first"))  # even if it is the same
    db.write(chats.entitling("c", "second"), settings.changing("c", {"temp": 0}), chats.entitling("c", "third"))
    assert chats.load(db, "c").title == "first"
    outside(path, ("UPDATE settings SET named = 0",))
    db.write(chats.entitling("c", "fourth"))
    assert chats.load(db, "c").title == "first"
    db.close()
    other.close()


def test_equal_titles_are_told_apart(path):
    db = stored(path)
    for title, wanted in (("one", "one (2)"), ("on", "on"), ("one", "one (3)"), ("ONE", "ONE")):
        chat = Chat(title)
        chat.title = chats.distinct(db, chat)
        assert chat.title == wanted
        db.write(chats.saving(chat))
        assert chats.distinct(db, chat) == wanted
    db.write(chats.deleting("c"))
    assert chats.distinct(db, Chat("one")) == "one"
    db.close()


def test_an_older_program_refuses_the_new_file_in_one_line(path, monkeypatch):
    stored(path).close()
    monkeypatch.setattr("tui.store.migrations.NEWEST", len(MIGRATIONS) - 1)
    monkeypatch.setattr("tui.store.connection.NEWEST", len(MIGRATIONS) - 1)
    with pytest.raises(StoreError, match=r"^\[store\] .*newer ring-mlx \(format 6, this one reads 5\); upgrade") as e:
        Database(path)
    assert "\n" not in str(e.value)


def test_settings_are_exported_and_imported():
    talk = Conversation(Chat("t", settings=MINE))
    talk.add("user", "q")
    text = exchange.to_json(talk.chat, list(talk.turns.values()))
    assert exchange.from_json(text)[0].settings == MINE
    raw = json.loads(text)
    del raw["chat"]["settings"]
    assert exchange.from_json(json.dumps(raw))[0].settings == {}
    raw["chat"]["settings"] = 5
    with pytest.raises(StoreError, match="no exported chat"):
        exchange.from_json(json.dumps(raw))


def test_settings_wait_for_the_chat_and_for_the_disk(path):
    keeper = Keeper(path, lambda line: None)
    talk = Conversation()
    keeper.keep_settings(talk, {"temp": 0.5})
    assert keeper.unsaved == 1
    keeper.keep_settings(talk, {"seed": 4})
    keeper.keep_draft(talk.chat.id, "half", talk.chat)
    assert keeper.open(talk.chat.id).chat.settings == {"temp": 0.5, "seed": 4}
    keeper.db._connection.execute("PRAGMA query_only = ON")
    keeper.keep_settings(talk, {"temp": 0.75})
    keeper.keep_settings(talk, {"seed": 5})
    assert keeper.unsaved
    assert keeper.close() is False
    assert keeper.report() == ["[store] settings of a chat could not be saved."]
    again = Keeper(path, lambda line: None)
    assert again.open(talk.chat.id).chat.settings == {"temp": 0.5, "seed": 4}
    again.keep_settings(talk, {"temp": 0.75})
    path.unlink()
    again.keep(talk, talk.add("user", "q"))
    assert again.open(talk.chat.id).chat.settings == {"temp": 0.75, "seed": 5}
    assert again.close()


def test_a_store_that_stands_in_hands_all_settings_over(path):
    path.mkdir()
    keeper, talk = Keeper(path, lambda line: None, clock=iter(range(0, 1000, 10)).__next__), Conversation()
    keeper.keep(talk, talk.add("user", "q"))
    keeper.keep_settings(talk, {"temp": 0.5})
    keeper.flush()
    keeper.keep_settings(talk, {"seed": 5})
    path.rmdir()
    keeper.flush()
    assert keeper.close()
    db = Database(path)
    chat = chats.load(db, talk.chat.id)
    assert (chat.settings, chat.title.startswith(MARK)) == ({"temp": 0.5, "seed": 5}, False)
    db.close()
