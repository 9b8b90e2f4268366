"""How a model is asked for the title of an exchange, and which of its titles are taken."""

from __future__ import annotations

import re
from typing import Any

from ring_mlx import Sampling, harmless

MOST_ASKED, MOST_CHARACTERS, MOST_WORDS = 600, 60, 10
ASKED_FOR_A_TITLE: dict[str, Any] = {
    "sampling": Sampling(temp=0.0),
    "max_tokens": 32,
    "thinking_budget": 0,
    "template_options": {"enable_thinking": False},
    "aside": True,
}
_WISH = """\
Write a title of at most six words for this conversation, in its language. Say nothing but the title.

Question: {}

Answer: {}"""
_PREFIX = re.compile(r"^(?:title|titel|titre|título|titolo|标题|题目|タイトル)\s*[:\uff1a]\s*", re.IGNORECASE)
_COMMON = frozenset(
    [
        "what",
        "when",
        "where",
        "which",
        "with",
        "that",
        "this",
        "have",
        "from",
        "your",
        "about",
        "they",
        "them",
        "then",
        "than",
        "will",
        "only",
        "here",
    ]
)
_AROUND = " \t\n\"'`*_#“”„«»「」『』"
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff]")


def messages(question: str, answer: str) -> list[dict[str, str]]:
    """What a model is asked; of long texts the beginning."""
    return [{"role": "user", "content": _WISH.format(question[:MOST_ASKED], answer[:MOST_ASKED])}]


def title_from(said: str, exchange: str) -> str:
    """The title in what a model has said about an exchange, or nothing if it is none.

    A title is one short line without tags and invisible characters, and has something of the exchange in it: a model that
    cannot make titles says something else.
    """
    title = _PREFIX.sub("", said.strip(_AROUND)).strip(_AROUND).rstrip(".\u3002").rstrip(_AROUND)
    is_line = len(title.splitlines()) == 1 and harmless(title, is_name=True) == title and "\t" not in title
    if not is_line or re.search(r"<[^<>]*>", title) or not re.search(r"[^\W_]", title):
        return ""
    if len(title) > MOST_CHARACTERS or len(title.split()) > MOST_WORDS:
        return ""
    return title if _stems(title) & _stems(exchange) else ""


def _stems(text: str) -> set[str]:
    """The beginnings of words, numbers, and letters of scripts without spaces."""
    words = {w for w in re.findall(r"\w+", text.casefold()) if w not in _COMMON}
    return {w[:4] for w in words if len(w) > 3 or w.isdecimal()} | set(_UNSPACED.findall(text))
