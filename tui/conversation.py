"""A chat as a tree of turns with one branch in view.

Nothing is ever removed: an edit or a new answer is a sibling, going back moves the leaf, and undo moves it back.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tui.store.exchange import fenced
from tui.store.records import ASSISTANT, USER, Attachment, Call, Chat, Turn, new_id

TITLE_LENGTH, SHORT = 48, 12


class Conversation:
    """One chat in memory.

    Args:
        chat: Its title and leaf.
        turns: Of all branches; those whose parent is missing, or follows them, begin a branch of their own.
    """

    def __init__(self, chat: Chat | None = None, turns: Iterable[Turn] = ()) -> None:
        self.chat = chat or Chat()
        self.turns: dict[str, Turn] = {}
        self._children: dict[str | None, list[str]] = {}
        self._steps: list[tuple[str | None, Turn | None]] = []  # leaves, and turns as they were before they went on
        for turn in turns:
            self.turns.setdefault(turn.id, turn)
        self._begin_branches()
        for turn in self.turns.values():
            self._children.setdefault(turn.parent, []).append(turn.id)
        if self.chat.leaf not in self.turns:
            self.chat.leaf = next(reversed(self.turns), None)

    @property
    def leaf(self) -> Turn | None:
        """The last turn in view."""
        return self.turns.get(self.chat.leaf or "")

    def path(self, leaf: str | None = None) -> list[Turn]:
        """The branch in view, the first turn first; or the one that ends in ``leaf``."""
        found: list[Turn] = []
        at, seen = leaf or self.chat.leaf, set[str]()
        while at in self.turns and at not in seen:
            seen.add(at)
            found.append(self.turns[at])
            at = self.turns[at].parent
        return found[::-1]

    def add(self, role: str, content: str, attachments: Iterable[Attachment] = (), parent: str | None = None) -> Turn:
        """A new turn below the leaf, or below ``parent``; it becomes the leaf."""
        return self._insert(Turn(role, content, parent or self.chat.leaf, attachments=tuple(attachments)))

    def beside(self, turn: Turn, content: str) -> Turn:
        """A sibling with another text; it becomes the leaf."""
        return self._insert(Turn(turn.role, content, turn.parent, attachments=turn.attachments))

    def again(self, turn: Turn) -> Turn:
        """A copy beside a turn; it becomes the leaf."""
        return self._insert(replace(turn, id=new_id()))

    def siblings(self, turn: Turn) -> list[Turn]:
        """The turn and its alternatives, the oldest first."""
        return self.continuations(turn.parent)

    def continuations(self, turn_id: str | None) -> list[Turn]:
        """What follows a turn, or None the chat's beginning, the oldest first."""
        return [self.turns[i] for i in self._children.get(turn_id, [])]

    def switch(self, turn: Turn, step: int) -> Turn | None:
        """Bring the next or the previous alternative into view, to its newest end; None if there is none."""
        siblings = self.siblings(turn)
        at = siblings.index(turn) + step
        if not 0 <= at < len(siblings):
            return None
        self.mark()
        self.show(siblings[at].id)
        return siblings[at]

    def show(self, turn_id: str) -> None:
        """Bring the branch that holds a turn into view, to its newest end."""
        while children := self._children.get(turn_id):
            turn_id = children[-1]
        self.chat.leaf = turn_id

    def reveal(self, turn_id: str) -> None:
        """Bring a turn into view if it is not; undo goes back."""
        if turn_id in self.turns and turn_id not in {t.id for t in self.path()}:
            self.mark()
            self.show(turn_id)

    def cut_after(self, turn: Turn | None) -> None:
        """End the view after a turn, or before the first; the next turn begins a branch."""
        self.mark()
        self.chat.leaf = turn.id if turn else None

    def mark(self, changed: Turn | None = None) -> None:
        """Remember the place for undo; ``changed`` is a turn that is about to be continued."""
        self._steps.append((self.chat.leaf, copy.copy(changed)))

    def undo(self) -> bool:
        """Go back before the last change; returns whether there was one."""
        if not self._steps:
            return False
        self.chat.leaf, before = self._steps.pop()
        if before is not None:
            turn = self.turns[before.id]
            turn.content, turn.calls, turn.record = before.content, before.calls, before.record
        return True

    def take_in(self, stored: Iterable[Turn]) -> list[Turn]:
        """Have turns as another window has written them; returns those that are new. The view stays where it is."""
        new = []
        for turn in stored:
            if (known := self.turns.get(turn.id)) is not None:
                vars(known).update(vars(turn), parent=known.parent)
                continue
            turn.parent = turn.parent if turn.parent in self.turns else None
            self.turns[turn.id] = turn
            self._children.setdefault(turn.parent, []).append(turn.id)
            new.append(turn)
        return new

    def drop(self, turn: Turn) -> None:
        """Forget a turn without children that was never shown; its parent becomes the leaf."""
        self._children[turn.parent].remove(turn.id)
        del self.turns[turn.id]
        self.chat.leaf = turn.parent

    def has_answers(self, turn: Turn) -> bool:
        """Whether anything follows a turn, in view or not."""
        return bool(self._children.get(turn.id))

    def messages(self) -> list[dict[str, Any]]:
        """The branch in view as messages, attachments written out, thoughts and calls with the answers."""
        found = []
        for t in self.path():
            if t.role == USER or t.content or t.calls:
                thought = {"reasoning_content": t.thinking} if t.thinking else {}
                calls = {"tool_calls": [_as_message(c) for c in t.calls]} if t.calls else {}
                found.append({"role": t.role, "content": said(t), **thought, **calls})
        return found

    def entitle(self) -> None:
        """Make a title from the first exchange, unless there is one."""
        path = self.path()
        if not self.chat.title and path:
            answer = next((t.content for t in path if t.role == ASSISTANT), "")
            self.chat.title = title_of(path[0].content or path[0].attachments[0].name, answer)

    def _begin_branches(self) -> None:
        """Let a turn whose parent is missing, or that comes after itself, begin a branch."""
        reached = set[str]()
        for turn in self.turns.values():
            if turn.parent in reached:  # nearly always: a parent was said before
                reached.add(turn.id)
                continue
            way: dict[str, Turn] = {}
            at: Turn | None = turn
            while at is not None and at.id not in reached and at.id not in way:
                way[at.id] = at
                if at.parent not in self.turns or at.parent in way:
                    at.parent = None
                at = self.turns.get(at.parent or "")
            reached |= way.keys()

    def _insert(self, turn: Turn) -> Turn:
        self.turns[turn.id] = turn
        self._children.setdefault(turn.parent, []).append(turn.id)
        self.chat.leaf = turn.id
        return turn


def said(turn: Turn) -> str:
    """A turn's text with its attachments written out."""
    return "\n\n".join(filter(None, [turn.content, *(f"{a.name}:\n{fenced(a.text)}" for a in turn.attachments)]))


def _as_message(call: Call) -> dict[str, Any]:
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def title_of(question: str, answer: str) -> str:
    """The question's first line, with the answer's if the question is short; without Markdown."""
    first = first_line(question)
    if len(first) < SHORT and (more := first_line(answer)):
        first = f"{first}: {more}" if first else more
    if len(first) <= TITLE_LENGTH:
        return first
    return first[:TITLE_LENGTH].rsplit(" ", 1)[0].rstrip(" ,.;:") + "…"


def first_line(text: str) -> str:
    """The first line of a text that has a word, without Markdown."""
    line = next((found for found in text.splitlines() if re.search(r"\w", found)), "")
    return " ".join(re.sub(r"^[\s#>*\-]+|[`*_]", "", line).split())
