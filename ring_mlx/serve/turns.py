"""Puts the messages that templates take together from the smaller parts that other protocols have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ring_mlx.serve.fields import check_count
from ring_mlx.serve.protocol import MOST_MESSAGES

Message = dict[str, Any]


class Turns:
    """A conversation in the making.

    Args:
        before: Messages that it goes on from, which are not changed.
    """

    def __init__(self, before: Iterable[Message] = ()) -> None:
        self._messages = list(before)
        self._turn: Message | None = None
        self._thoughts: list[str] = []
        self._texts: list[str] = []

    def begin(self) -> None:
        """Begin another turn of the assistant's, to which thoughts, texts and calls belong until the next message."""
        self._end()
        self._turn = {"role": "assistant", "content": ""}
        self._messages.append(self._turn)

    @property
    def has_answer(self) -> bool:
        """Whether the assistant's turn has text or calls."""
        return any(self._texts) or (self._turn is not None and "tool_calls" in self._turn)

    @property
    def has_text_last(self) -> bool:
        """Whether the assistant's turn ends in text."""
        return any(self._texts) and (self._turn is None or "tool_calls" not in self._turn)

    def think(self, text: str) -> None:
        self._open()
        self._thoughts.append(text)

    def say(self, text: str) -> None:
        self._open()
        self._texts.append(text)

    def call(self, name: str, arguments: Mapping[str, Any] | str, call_id: str | None) -> None:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        self._open().setdefault("tool_calls", []).append(call | ({"id": call_id} if call_id else {}))

    def take_back(self) -> None:
        """Forget the thought and the text of the assistant's turn."""
        self._thoughts, self._texts = [], []

    def put(self, role: str, content: str, **more: str) -> None:
        """A whole message that is not the assistant's."""
        self._end()
        self._messages.append({"role": role, "content": content, **more})

    def checked(self, param: str) -> list[Message]:
        """The messages. Raises ApiError if there are too many."""
        self._end()
        check_count("messages", len(self._messages), MOST_MESSAGES, param)
        return self._messages

    def _open(self) -> Message:
        if self._turn is None:
            self.begin()
        assert self._turn is not None
        return self._turn

    def _end(self) -> None:
        """Join the parts once: one by one takes time that grows with their square."""
        if self._turn is not None:
            self._turn["content"] = "".join(self._texts)
            if thought := "".join(self._thoughts):
                self._turn["reasoning_content"] = thought
        self._turn, self._thoughts, self._texts = None, [], []


def with_system(system: str, messages: list[Message]) -> list[Message]:
    """The messages after a system prompt; system messages before all others become one, since most templates take one."""
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    texts = [text for text in (system, *(m["content"] for m in messages[:first])) if text]
    return [*([{"role": "system", "content": "\n\n".join(texts)}] if texts else []), *messages[first:]]


def without_oldest(messages: list[Message]) -> list[Message]:
    """The messages without the older half of the turns; the same ones where there is only one."""
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > first]
    if not users:
        return messages
    return [*messages[:first], *messages[users[len(users) // 2] :]]
