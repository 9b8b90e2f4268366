"""What a chat is about: its title, when, how many turns, the model, and its last exchange or the turn that was found."""

from __future__ import annotations

import re
import time

from textual.content import Content

from ring_mlx import harmless
from tui.fuzzy import HIT
from tui.gauges import counted
from tui.store import Chat, Turn
from tui.store.records import USER
from tui.themes import PALE

QUESTION_CHARACTERS, MOST_CHARACTERS, BEFORE_HIT = 240, 4000, 120
DAY_S = 86400.0


def preview(chat: Chat, turns: list[Turn], draft: str, words: str, age: str) -> Content:
    """A chat in many lines.

    Args:
        chat: Any.
        turns: The last question and its answer, or those of the turn that was found.
        draft: What is written and not sent, shown where there are no turns.
        words: That are searched for and marked.
        age: How long ago it was changed, in words.
    """
    model = next((t.record.model for t in reversed(turns) if t.record and t.record.model), "")
    days_old = time.time() - chat.changed > DAY_S
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(chat.changed)) if days_old else ""
    facts = [counted(chat.turns, "turn"), age, date, model]
    about = harmless(" · ".join(filter(None, facts)), is_name=True)
    parts = [
        Content.styled(harmless(chat.title or "untitled", is_name=True), "bold"),
        Content.styled(about, PALE),
        *(_said(turn, words) for turn in turns),
    ]
    if draft and not turns:
        parts.append(Content.styled(_text(draft, words, MOST_CHARACTERS), "italic"))
    return Content("\n").join(parts)


def _said(turn: Turn, words: str) -> Content:
    is_question = turn.role == USER
    text = turn.content.strip() or (turn.thinking.strip() if not is_question else "")
    shown = Content(_text(text, words, QUESTION_CHARACTERS if is_question else MOST_CHARACTERS) or "(no answer yet)")
    for word in words.split():
        shown = shown.highlight_regex(re.compile(re.escape(word), re.IGNORECASE), style=HIT)
    return Content.styled("▌ ", "$primary").append(shown) if is_question else shown


def _text(text: str, words: str, most: int) -> str:
    """The text from near the first word that is searched for, made harmless."""
    found = [at for word in words.split() if (at := text.lower().find(word.lower())) >= 0]
    start = max(0, min(found, default=0) - BEFORE_HIT)
    cut = text[start : start + most]
    return harmless(f"{'…' if start else ''}{cut}{'…' if start + most < len(text) else ''}")
