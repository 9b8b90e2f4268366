"""The stored values of a conversation."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, dataclass, field, fields
from typing import Any

USER, ASSISTANT = "user", "assistant"
MOST = 1e15


def new_id() -> str:
    """A unique name for a chat or turn."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Attachment:
    """A text that came with a question."""

    name: str
    text: str


@dataclass(frozen=True)
class Call:
    """A tool that the model asked for."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """How an answer came to be; tokens as counts, times in seconds, speeds in tokens a second, memory in GB."""

    model: str = ""
    quantisation: str = ""  # spelled as in the records that are stored already
    sampling: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    thinking_tokens: int = 0
    thinking_s: float = 0.0
    time_to_first_token_s: float = 0.0
    prompt_tps: float = 0.0
    generation_tps: float = 0.0
    peak_memory_gb: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finish_reason: str = ""
    system_prompt: str = ""
    is_edited: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Record:
        """Of JSON; names that this version does not know are left out, values of another type too."""
        plain = cls()
        known = {f.name: getattr(plain, f.name) for f in fields(cls)}
        return cls(**{k: v for k, v in raw.items() if k in known and _is_like(v, known[k])})


@dataclass
class Turn:
    """One turn of the tree; ``parent`` None is a first question, ``is_damaged`` one whose row has changed on the disk."""

    role: str
    content: str
    parent: str | None = None
    thinking: str = ""
    attachments: tuple[Attachment, ...] = ()
    calls: tuple[Call, ...] = ()
    record: Record | None = None
    id: str = field(default_factory=new_id)
    created: float = field(default_factory=time.time)
    is_damaged: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether an answer says nothing at all."""
        return not (self.content or self.thinking or self.calls)


@dataclass
class Chat:
    """A conversation.

    Args:
        leaf: The last turn in view.
        turns: Their number.
        deleted: When it was deleted, if it was.
        settings: Of its own, by name, as JSON has them: anything may be in them.
        are_settings_damaged: Whether they have changed on the disk.
    """

    title: str = ""
    leaf: str | None = None
    pinned: bool = False
    deleted: float | None = None
    turns: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    are_settings_damaged: bool = False
    id: str = field(default_factory=new_id)
    created: float = field(default_factory=time.time)
    changed: float = field(default_factory=time.time)


def _is_like(value: object, plain: object) -> bool:
    """Whether a value has the type of ``plain``; numbers must be finite."""
    if isinstance(plain, float) and not isinstance(value, bool):
        return isinstance(value, (int, float)) and abs(value) < MOST  # not so for NaN either
    return type(value) is type(plain) and (not isinstance(value, int) or abs(value) < MOST)
