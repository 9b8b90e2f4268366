"""Writes what the store could not take at the end to a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ring_mlx import harmless, write_text
from tui.conversation import Conversation
from tui.store import Turn, exchange


def save_elsewhere(unsaved: list[tuple[Conversation, list[Turn]]]) -> list[str]:
    """Write chats with unsaved turns to the first folder that takes them; returns lines that say where, or the text."""
    return [line for talk, turns in unsaved for line in _saved(talk, turns)]


def _saved(talk: Conversation, turns: list[Turn]) -> list[str]:
    what = f"{len(turns)} {'turn' if len(turns) == 1 else 'turns'} of the chat {talk.chat.title or 'without a title'!r}"
    text = exchange.to_json(talk.chat, list(talk.turns.values()))
    for folder in _folders():
        file = folder / f"ring-mlx-unsaved-{talk.chat.id[:12]}.json"
        try:
            write_text(file, text, private=True)
        except (OSError, ValueError):
            continue
        where = harmless(str(file), is_name=True)
        return [f"[store] {what} could not be saved; the whole chat is in {where}, /import takes it back."]
    said = exchange.to_markdown(talk.chat, [turn for turn in talk.path() if turn in turns])
    return [f"[store] {what} could not be saved anywhere; they follow.", *said.splitlines()]


def _folders() -> list[Path]:
    found = [Path.cwd, Path.home, lambda: Path(tempfile.gettempdir())]
    folders = []
    for find in found:
        try:
            folders.append(find())
        except (OSError, RuntimeError):
            continue
    return [folder for folder in folders if os.access(folder, os.W_OK)]
