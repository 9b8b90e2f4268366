"""Chats to files and back, also those that the store could not take."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ring_mlx import harmless, text_of, whole_text, write_text
from tui.chat_settings import Settings, differences, settings_of
from tui.config import Config
from tui.conversation import Conversation
from tui.gauges import counted
from tui.messages import Sampling
from tui.paths import in_words
from tui.store import StoreError, Turn, exchange

MOST_BYTES = 512_000_000
LONGEST_NAME = 60  # of 4 bytes each, as far as a file's name goes


def export_talk(talk: Conversation, argument: str) -> str:
    """Write a chat as "md" or "json" to a path, by default one named after it; says where, or why not."""
    kind, _, path = argument.partition(" ") if argument.split(" ")[0] in ("md", "json") else ("", "", argument)
    if not kind and re.fullmatch(r"\w+", path):
        return f"[export] there is no format {path}; give md or json, and then a path if you like."
    kind = kind or ("json" if path.endswith(".json") else "md")
    name = re.sub(r"[^\w]+", "-", talk.chat.title.lower()).strip("-")[:LONGEST_NAME] or "chat"
    if kind == "md":
        own = settings_of(talk.chat.settings, Config())[0]
        sampling = differences(own, Settings(Sampling(), own.system_prompt))
        text = exchange.to_markdown(talk.chat, talk.path(), own.system_prompt, sampling)
    else:
        text = exchange.to_json(talk.chat, list(talk.turns.values()))
    file = Path(path.strip() or f"{name}.{kind}")
    try:
        file = file.expanduser()
        if not path.strip() and file.exists():
            return f"{file} is there already; /export {kind} PATH overwrites."
        if not file.parent.is_dir():
            return f"[export] there is no folder {file.parent}; make it, or give another path."
        write_text(file, whole_text(text), private=not file.exists())
    except (OSError, ValueError, RuntimeError) as e:
        return f"[export] {file} cannot be written ({in_words(e)}); give another path."
    return f"Written to {file}."


def import_talk(path: str) -> Conversation:
    """A chat from an exported file, not yet kept.

    Raises:
        StoreError: If it cannot be read or is something else.
    """
    try:
        return Conversation(*exchange.from_json(text_of(Path(path), MOST_BYTES)))
    except (OSError, ValueError) as e:
        raise StoreError(f"{path} cannot be read ({in_words(e)}); give a file of /export json.") from None


def save_elsewhere(unsaved: list[tuple[Conversation, list[Turn]]]) -> list[str]:
    """Write chats with unsaved turns to the first folder that takes them; returns lines that say where, or the text."""
    return [line for talk, turns in unsaved for line in _saved(talk, turns)]


def _saved(talk: Conversation, turns: list[Turn]) -> list[str]:
    what = f"{counted(len(turns), 'turn')} of the chat {talk.chat.title or 'without a title'!r}"
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


def _folders() -> Iterator[Path]:
    for find in (Path.cwd, Path.home, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, RuntimeError):
            if os.access(folder := find(), os.W_OK):
                yield folder
