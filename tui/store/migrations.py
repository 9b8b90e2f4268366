"""The schema, version by version (``PRAGMA user_version``); a migration never changes once it has been released."""

from __future__ import annotations

import sqlite3

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
)
NEWEST = len(MIGRATIONS)


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
            connection.execute(f"PRAGMA user_version = {n + 1}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _statements(script: str) -> list[str]:
    """A script's statements; ``executescript`` would commit in between."""
    found, text = [], ""
    for line in script.splitlines(keepends=True):
        text += line
        if sqlite3.complete_statement(text):
            found.append(text)
            text = ""
    return found
