"""A chat as Markdown to read, or as JSON to keep and take back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ring_mlx import harmless, harmless_json
from tui.store import rows
from tui.store.failures import StoreError
from tui.store.records import ASSISTANT, USER, Attachment, Call, Chat, Record, Turn, new_id

DAMAGED = "damaged on the disk: this may not be what was said"
FORMAT, VERSION = "ring-mlx chat", 1
KEPT = ("id", "parent", "role", "content", "thinking", "attachments", "calls", "record", "created")


def to_markdown(chat: Chat, path: Sequence[Turn], system_prompt: str = "", sampling: Sequence[str] = ()) -> str:
    """The turns of one branch, below what was set for them; thoughts are left out."""
    parts = [f"# {_name(chat.title) or 'Chat'}"]
    parts += [f"*{', '.join(sampling)}*"] if sampling else []
    parts += ["## System", system_prompt] if system_prompt.strip() else []
    for turn in path:
        model = turn.record.model if turn.record else ""
        parts.append("## You" if turn.role == USER else f"## {_name(model) or 'Answer'}")
        parts += [f"*{DAMAGED}*"] if turn.is_damaged else []
        parts += [answer] if (answer := written(turn).strip()) else []
        parts += [f"{_name(a.name)}:\n\n{fenced(a.text)}" for a in turn.attachments]
    return harmless("\n\n".join(parts)) + "\n"


def _name(text: str) -> str:
    return harmless(text, is_name=True)


def written(turn: Turn) -> str:
    """A turn as Markdown, with its tool calls, without its thought."""
    return "\n\n".join([*([turn.content] if turn.content.strip() else []), *map(call_text, turn.calls)])


def call_text(call: Call) -> str:
    """A tool call as a code block with its name and arguments."""
    return fenced(harmless_json({"name": call.name, "arguments": call.arguments}, indent=2), "json")


def fenced(text: str, language: str = "") -> str:
    """A text as a code block, whose fence is longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def to_json(chat: Chat, turns: Sequence[Turn]) -> str:
    """The whole tree, with thoughts and records."""
    kept = {name: getattr(chat, name) for name in ("title", "leaf", "pinned", "created", "settings")}
    found = [
        {name: values[name] for name in KEPT} | ({"damaged": True} if values["is_damaged"] else {})
        for values in map(asdict, turns)
    ]
    return harmless_json({"format": FORMAT, "version": VERSION, "chat": kept, "turns": found}, indent=1)


def from_json(text: str) -> tuple[Chat, list[Turn]]:
    """A chat from `to_json`, under new ids, so that it never overwrites one that is there.

    Raises:
        StoreError: If the text is something else, or newer.
    """
    try:
        raw = rows.unpacked(text)
        if raw["format"] != FORMAT:
            raise ValueError("another format")
        if raw["version"] > VERSION:
            raise StoreError(
                f"the file is of format {raw['version']}, this ring-mlx reads {VERSION}; upgrade ring-mlx."
            )
        ids: dict[str, str] = {}
        turns = [_turn(t, ids) for t in raw["turns"]]
        chat = raw["chat"]
        leaf = ids.get(chat["leaf"]) or (turns[-1].id if turns else None)
        settings = dict(chat.get("settings") or {})
        return Chat(title=str(chat["title"]), leaf=leaf, pinned=bool(chat["pinned"]), settings=settings), turns
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise StoreError(f"the file is no exported chat ({type(e).__name__}: {e}); give one of /export json.") from None


def _turn(raw: dict[str, Any], ids: dict[str, str]) -> Turn:
    """A turn whose parent, if any, came before it, so that the tree has no cycle."""
    if raw["role"] not in (USER, ASSISTANT):
        raise ValueError(f"role {raw['role']!r}")
    parent = None if raw["parent"] is None else ids[raw["parent"]]
    ids[raw["id"]] = new_id()
    return Turn(
        role=raw["role"],
        content=str(raw["content"]),
        parent=parent,
        thinking=str(raw["thinking"]),
        attachments=tuple(Attachment(str(a["name"]), str(a["text"])) for a in raw["attachments"]),
        calls=tuple(Call(str(c["name"]), dict(c["arguments"])) for c in raw.get("calls", [])),
        record=Record.from_dict(raw["record"]) if raw["record"] else None,
        id=ids[raw["id"]],
        created=rows.number(raw["created"]),
        is_damaged=bool(raw.get("damaged")),
    )
