"""The schema, version by version (``PRAGMA user_version``); a migration never changes once it has been released."""

from __future__ import annotations

import sqlite3
from functools import cache
from typing import Any

from tui.store import rows

MIGRATIONS = (
    # 1: chats as trees of turns; rows are the integers that a full-text index needs.
    """
    CREATE TABLE chats (
      row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, leaf TEXT, pinned INTEGER NOT NULL,
      deleted REAL, created REAL NOT NULL, changed REAL NOT NULL);
    CREATE INDEX chats_by_change ON chats (pinned, changed);
    CREATE TABLE turns (
      row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, chat TEXT NOT NULL REFERENCES chats (id) ON DELETE CASCADE,
      parent TEXT, role TEXT NOT NULL, content TEXT NOT NULL, thinking TEXT NOT NULL, attachments TEXT NOT NULL,
      record TEXT, created REAL NOT NULL);
    CREATE INDEX turns_of_chat ON turns (chat);
    """,
    # 2: search over what was said, thoughts not included.
    """
    CREATE VIRTUAL TABLE found USING fts5 (
      content, content = 'turns', content_rowid = 'row', tokenize = 'unicode61 remove_diacritics 2', prefix = '2 3');
    CREATE TRIGGER turns_added AFTER INSERT ON turns BEGIN
      INSERT INTO found (rowid, content) VALUES (new.row, new.content);
    END;
    CREATE TRIGGER turns_removed AFTER DELETE ON turns BEGIN
      INSERT INTO found (found, rowid, content) VALUES ('delete', old.row, old.content);
    END;
    CREATE TRIGGER turns_changed AFTER UPDATE OF content ON turns BEGIN
      INSERT INTO found (found, rowid, content) VALUES ('delete', old.row, old.content);
      INSERT INTO found (rowid, content) VALUES (new.row, new.content);
    END;
    INSERT INTO found (found) VALUES ('rebuild');
    """,
    # 3: what was typed and not yet sent.
    """
    CREATE TABLE drafts (chat TEXT PRIMARY KEY, content TEXT NOT NULL);
    """,
    # 4: the tools that an answer asked for.
    """
    ALTER TABLE turns ADD COLUMN calls TEXT NOT NULL DEFAULT '[]';
    """,
    # 5: checksums; a row without one is damaged.
    """
    ALTER TABLE chats ADD COLUMN seal BLOB;
    ALTER TABLE turns ADD COLUMN seal BLOB;
    ALTER TABLE drafts ADD COLUMN seal BLOB;
    """,
    # 6: settings of a chat's own, and whether the user has named it.
    """
    CREATE TABLE settings (chat TEXT PRIMARY KEY, content TEXT NOT NULL, named INTEGER NOT NULL, seal BLOB);
    CREATE TRIGGER settings_removed AFTER DELETE ON chats BEGIN
      DELETE FROM settings WHERE chat = old.id;
    END;
    """,
)
SEALED_SINCE, SEALED_TABLES = 5, 3
NEWEST = len(MIGRATIONS)
REBUILD_INDEX = "INSERT INTO found (found) VALUES ('rebuild')"
CHECK_INDEX = "INSERT INTO found (found, rank) VALUES ('integrity-check', 1)"  # against the turns


def version_of(connection: sqlite3.Connection) -> int:
    """The version of an open database; 0 is an empty one."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a database to the newest version, all or nothing, even if two processes try at once."""
    if version_of(connection) >= NEWEST:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for n in range(version_of(connection), NEWEST):
            for statement in _statements(MIGRATIONS[n]):
                connection.execute(statement)
            if n + 1 == SEALED_SINCE:
                _seal_all(connection)
            connection.execute(f"PRAGMA user_version = {n + 1}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk ends it
            connection.execute("ROLLBACK")
        raise


@cache
def schema() -> dict[str, str]:
    """Name and SQL of everything that migrations make; what SQLite makes for the full-text index is left out."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        migrate(connection)
        return schema_of(connection)
    finally:
        connection.close()


def schema_of(connection: sqlite3.Connection) -> dict[str, str]:
    """Name and SQL of what is in a database."""
    sql = """
        SELECT name, sql FROM sqlite_master
        WHERE sql IS NOT NULL AND substr(name, 1, 6) != 'found_' AND substr(name, 1, 7) != 'sqlite_'"""
    return {str(name): " ".join(str(made).split()) for name, made in connection.execute(sql)}


def _seal_all(connection: sqlite3.Connection) -> None:
    """Seal what an older version has written, unless it is damaged already."""
    for table in rows.TABLES[:SEALED_TABLES]:
        found = f"SELECT rowid, {', '.join(table.content)} FROM {table.name} WHERE rowid > ? ORDER BY rowid LIMIT 256"
        last = -(2**63)
        while part := _undecoded(connection, found, last):
            for number, *values in part:
                last = number
                if (row := _decoded(table.content, values)) is not None:
                    connection.execute(f"UPDATE {table.name} SET seal = ? WHERE rowid = ?", (table.seal(row), number))


def _undecoded(connection: sqlite3.Connection, sql: str, last: int) -> list[tuple[Any, ...]]:
    cursor = connection.cursor()
    cursor.row_factory = None
    connection.text_factory, factory = bytes, connection.text_factory
    try:
        return cursor.execute(sql, (last,)).fetchall()
    finally:
        connection.text_factory = factory


def _decoded(columns: tuple[str, ...], values: list[Any]) -> dict[str, Any] | None:
    """A row with its text decoded, or None if its text or its JSON is broken."""
    try:
        row = {n: v.decode() if isinstance(v, bytes) else v for n, v in zip(columns, values, strict=True)}
    except ValueError:
        return None
    return row if rows.is_json(row) else None


def _statements(script: str) -> list[str]:
    """A script's statements; ``executescript`` would commit in between."""
    found, text = [], ""
    for line in script.splitlines(keepends=True):
        text += line
        if sqlite3.complete_statement(text):
            found.append(text)
            text = ""
    return found
