"""Finding one's way in the chat: fuzzy matching, the list of commands."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tui_pilot import chat
from tui import commands, files, fuzzy
from tui.config import Config

HARD = "aabb" * 140 + "xc"  # Textual's own search tries more ways than there are atoms


def marks(content):
    """The marked letters of a text."""
    return "".join(content.plain[s.start : s.end] for s in content.spans if s.style == fuzzy.HIT)


def names(query, *texts):
    return [item for item, _ in fuzzy.best(query, texts, str)]


def test_the_best_comes_first_and_equals_stay_in_order():
    assert names("", "b", "a") == ["b", "a"]
    assert names("rml", "formal", "ring-mini-linear", "none") == ["ring-mini-linear", "formal"]
    assert names("one", "stone", "one", "not here", "number one") == ["one", "number one", "stone"]
    assert names("x", "x1", "x2", "x3") == ["x1", "x2", "x3"]
    assert names("linear RING", "ring-mini-linear", "linear") == ["ring-mini-linear"]


@pytest.mark.parametrize("text", [HARD, HARD + "\n[b]", "İ" * 400 + HARD])
def test_no_text_takes_long(text):
    started = time.process_time()
    assert fuzzy.best("ab" * 100 + "c", [text], str) != []
    assert fuzzy.best("ab" * 100 + "d", [text], str) == []
    assert time.process_time() - started < 2


@given(st.text(), st.lists(st.text(), max_size=4))
def test_marked_letters_are_those_of_the_query(query, texts):
    for text, shown in fuzzy.best(query, texts, str):
        assert shown.plain == fuzzy.harmless(text, is_name=True)
        words = sorted(set("".join(query.split()).lower()))
        found = marks(shown)
        assert {c.lower() for c in found} <= set(words)
        assert len(found) >= max(map(len, query.split()), default=0)


def columns(d):
    """The rows of the completion."""
    completion = d.chat.entry.completion
    assert completion.display
    region = completion.region
    return [row[region.x : region.right].rstrip() for row in d.screen_text[region.y : region.bottom]]


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (120, 40)])
def test_the_list_of_commands_is_in_columns(size):
    async def script(d):
        await d.type("/")
        rows = columns(d)
        assert len(rows) > 3
        ends = {row.index(help) for row in rows for c in commands.COMMANDS if (help := c.help[:12]) in row}
        keys = {row.index(key) for row in rows for key in ("Esc", "f2", "^o", "^l", "^s", "^r") if f" {key} " in row}
        assert len(ends) == len(keys) == 1
        assert any("/new " in row and " f2 " in row for row in rows)
        assert all(len(row) < size[0] for row in rows)
        assert ("[WORDS]" in "".join(rows)) == (size[0] >= 100)
        await d.type("xprt")
        assert [row.split()[0] for row in columns(d)] == ["/export"]
        assert marks(d.chat.entry.completion.options[0].prompt) == "xprt"

    chat(script, size, config=Config(keys={"new": "f2"}))


def test_a_command_of_no_such_name_offers_nothing():
    async def script(d):
        await d.type("/zzz")
        assert not d.chat.entry.completion.display

    chat(script)


def test_files_are_completed_by_some_of_their_letters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    for name in ("notes.txt", "src/chat_view.py", "src/chat.py", "src/conversation.py", "src/.hidden"):
        (tmp_path / name).write_text("text")
    assert [path for path, _ in files.completions("src/cvpy")] == ["src/chat_view.py", "src/conversation.py"]
    assert [path for path, _ in files.completions("")] == ["src/", "notes.txt"]

    async def script(d):
        await d.type("@src/cvw")
        assert marks(d.chat.entry.completion.options[0].prompt) == "cvw"
        await d.press("tab")
        assert d.chat.entry.prompt.text == "@src/chat_view.py "

    chat(script)
