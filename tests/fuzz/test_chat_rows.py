"""Rows of chats.db with any value of any SQL type in any column, sealed or not: the chat opens, and goes on."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.profile import fuzz
from tui.chat_settings import MODEL_PARTS, default_settings, differences, settings_of
from tui.commands import SETTINGS
from tui.config import Config
from tui.conversation import Conversation, said
from tui.keeper import Keeper
from tui.records import record_lines, record_text, sampling_of, thought_size
from tui.screens.chats import _title, hit_line
from tui.store import Attachment, Call, Chat, Database, Record, chats, drafts, exchange, rows, search, turns
from tui.widgets.header import Header
from tui.widgets.turn import UserTurn

IDS = ("chat", "q1", "a1", "q2", "a2", "other", "x", "")
DEEP = "[" * 3000 + "]" * 3000

letters = st.text(max_size=12) | st.sampled_from(["", "\0", "a\0b", "\x1b[2J", "线性 ring", "\ufeff", "ring " * 2000])
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=True, allow_infinity=True)
plain = letters | numbers | st.binary(max_size=12) | st.sampled_from([b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | letters,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters, inner, max_size=3),
    max_leaves=8,
)
packed = values.map(json.dumps) | st.sampled_from(
    [DEEP, '["\\ud800"]', '[["\\ud800", "\\udc00\\ud83d"]]', '[["name", {"a": "\\ud800"}]]', "9" * 5000, "{", "[1e999]"]
)
calls = st.lists(st.tuples(letters, st.dictionaries(letters, values, max_size=3)), max_size=2).map(json.dumps)
attachments = st.lists(st.tuples(letters, letters), max_size=2).map(json.dumps)
records = st.fixed_dictionaries({}, optional=dict.fromkeys(Record().as_dict(), values)).map(json.dumps)
samplings = values.map(lambda value: json.dumps({"sampling": {"seed": value, "temp": value, "top_k": value}}))
ids, names = st.sampled_from(IDS), st.sampled_from(IDS) | plain
turn_rows = st.fixed_dictionaries(
    {
        "id": st.sampled_from(IDS) | letters,
        "chat": st.just("chat") | names,
        "parent": st.none() | names,
        "role": st.sampled_from(["user", "assistant"]) | plain,
        "content": plain,
        "thinking": plain,
        "calls": calls | packed | plain,
        "record": st.none() | records | samplings | packed | plain,
        "created": plain,
        "attachments": attachments | packed | plain,
    }
)
chat_rows = st.fixed_dictionaries(
    {
        "id": st.sampled_from(IDS) | letters,
        "title": plain,
        "leaf": st.none() | names,
        "pinned": plain,
        "deleted": st.none() | plain,
        "created": plain,
        "changed": plain,
    }
)
models = st.fixed_dictionaries({"path": st.none() | letters}, optional=dict.fromkeys(MODEL_PARTS[1:], letters | values))
owns = st.dictionaries(st.sampled_from([*SETTINGS, "system_prompt", "model"]) | letters, values | models, max_size=5)
setting_rows = st.fixed_dictionaries(
    {
        "chat": st.sampled_from(["chat", "whole", "nowhere"]),
        "content": owns.map(json.dumps) | packed | plain,
        "named": plain,
    }
)
draft_rows = st.fixed_dictionaries({"chat": st.just("chat") | letters, "content": plain})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a chat of two exchanges that stay whole: its bytes, and the turns."""
    path = tmp_path_factory.mktemp("rows") / "chats.db"
    db, talk = Database(path), Conversation(Chat("whole", id="whole"))
    for n, text in enumerate(("ring?", "a ring", "线性?", "yes")):
        turn = talk.add("assistant" if n % 2 else "user", text, [Attachment("a.txt", "one")] if n == 2 else [])
        if n % 2:
            turn.record, turn.calls = Record("m", generated_tokens=3), (Call("add", {"a": 1}),)
    db.write(chats.saving(talk.chat), *(turns.saving("whole", t) for t in talk.turns.values()))
    db.write(chats.saving(Chat("damaged", id="chat")))
    db.close()
    return path, path.read_bytes(), list(talk.turns.values())


def put(connection, table, row, is_sealed):
    """Put a row into a table, with bytes as text that is no UTF-8, and a seal that fits if it can have one."""
    seal = next(t.seal for t in rows.TABLES if t.name == table)
    row = {**row, "seal": seal(row) if is_sealed else None}
    marks = ", ".join("CAST(? AS TEXT)" if isinstance(v, bytes) and n != "seal" else "?" for n, v in row.items())
    with contextlib.suppress(sqlite3.IntegrityError):  # a number that is none is no value for SQLite
        connection.execute(f"INSERT OR REPLACE INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))


def use(talk):
    """Whatever screens, exports and engines do with a chat."""
    assert len(talk.path()) <= len(talk.turns)
    assert json.dumps(talk.messages())
    exchange.to_markdown(talk.chat, talk.path()).encode()
    text = exchange.to_json(talk.chat, list(talk.turns.values()))
    text.encode()
    for turn in list(talk.turns.values()):
        assert turn in talk.siblings(turn)
        said(turn).encode()
        exchange.written(turn).encode()
        assert UserTurn(turn, (1, 1)).content is not None
        if turn.record:
            assert record_lines(turn.record)
            assert record_text(turn.record) + thought_size(turn.record) is not None
            sampling_of(turn.record)
        talk.switch(turn, 1)
        talk.switch(turn, -1)
        talk.show(turn.id)
        assert talk.path()
    while talk.undo():
        pass
    talk.entitle()
    own, wrong = settings_of(talk.chat.settings, Config())
    assert all("\n" not in line for line in wrong)
    shown = differences(own, default_settings(Config()))
    assert Header(id="header").show(talk.chat.title, shown) is None
    again = settings_of(json.loads(json.dumps(own.as_raw())), Config())
    assert again == (own, []) or own.model != again[0].model  # a path that begins with the home
    exchange.to_markdown(talk.chat, talk.path(), own.system_prompt, shown).encode()


@fuzz(72)
@given(
    st.lists(st.tuples(turn_rows, st.booleans()), max_size=5),
    st.lists(st.tuples(chat_rows, st.booleans()), max_size=2),
    st.lists(st.tuples(draft_rows, st.booleans()), max_size=2),
    st.lists(st.tuples(setting_rows, st.booleans()), max_size=2),
)
def test_rows_of_any_kind_stop_no_chat(store, turn_rows, chat_rows, draft_rows, setting_rows):
    path, data, whole = store
    for end in ("-wal", "-shm"):
        path.with_name(f"chats.db{end}").unlink(missing_ok=True)
    path.write_bytes(data)
    outside = sqlite3.connect(path, isolation_level=None)
    made_rows = {"turns": turn_rows, "chats": chat_rows, "drafts": draft_rows, "settings": setting_rows}
    for table, made in made_rows.items():
        for row, is_sealed in made:
            put(outside, table, row, is_sealed)
    outside.close()
    started = time.monotonic()
    told = []
    keeper = Keeper(path, told.append)
    keeper.latest()
    for chat in chats.listed(keeper.db):
        assert str(_title(chat)) is not None
        drafts.load(keeper.db, chat.id).encode()
        talk = keeper.open(chat.id)
        if talk is not None:
            use(talk)
            keeper.keep(talk, talk.add("user", "and then?"))
            keeper.keep_settings(talk, {"temp": 0.5})
            keeper.refresh_settings(talk)
            assert talk.chat.settings["temp"] == 0.5
            keeper.entitle(talk, "a title")
            assert not keeper.unsaved
    for words in ("ring", "线性", "a"):
        assert [str(hit_line(hit, words)) for hit in search.find(keeper.db, words)] != None
    keeper.recent_questions()
    found = turns.load(keeper.db, "whole")
    assert [t for t in found if t.id in {w.id for w in whole}] == whole
    assert keeper.close()
    assert all(line.startswith("[store] ") and "\n" not in line for line in told)
    assert time.monotonic() - started < 10


exported = st.fixed_dictionaries(
    {
        "format": st.just(exchange.FORMAT),
        "version": st.just(exchange.VERSION) | values,
        "chat": st.fixed_dictionaries(
            {"title": values, "leaf": values, "pinned": values}, optional={"settings": owns | values}
        )
        | values,
        "turns": st.lists(
            st.fixed_dictionaries(
                {
                    "id": ids,
                    "parent": st.none() | ids,
                    "role": st.sampled_from(["user", "assistant"]),
                    "content": values,
                    "thinking": values,
                    "attachments": st.lists(st.fixed_dictionaries({"name": values, "text": values}), max_size=2)
                    | values,
                    "calls": st.lists(st.fixed_dictionaries({"name": values, "arguments": values}), max_size=2)
                    | values,
                    "record": st.none() | st.fixed_dictionaries({"thinking_s": values, "sampling": values}) | values,
                    "created": values,
                }
            ),
            max_size=4,
        ),
    }
)


@fuzz(90)
@given(exported.map(json.dumps) | packed | letters)
def test_an_imported_chat_is_a_chat_or_refused(text):
    talk = Conversation()
    with contextlib.suppress(exchange.StoreError):
        talk = Conversation(*exchange.from_json(text))
    use(talk)
    keeper = Keeper(None, print)
    keeper.keep(talk, *talk.turns.values())
    assert not keeper.unsaved
    keeper.close()
