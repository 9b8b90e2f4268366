"""/tree: a chat's turns as a tree, deep and wide, on every size of terminal, by keys and mouse."""

from __future__ import annotations

import re

import pytest

from tests.tui_pilot import chat
from tui.conversation import Conversation
from tui.screens.compact import WISH
from tui.screens.tree import TreeScreen, rows
from tui.store.records import ASSISTANT, USER


def branched():
    """A chat of three questions, the second of which was asked in three ways and answered twice in one of them."""
    talk = Conversation()
    talk.add(USER, "first")
    answer = talk.add(ASSISTANT, "1")
    second = talk.add(USER, "second")
    talk.add(ASSISTANT, "2")
    other = talk.beside(second, "another second, **in Markdown** and far too long for a row of so few columns")
    talk.add(ASSISTANT, "2 b")
    talk.add(ASSISTANT, "2 b again", parent=other.id)
    talk.beside(second, "third way")
    talk.show(second.id)
    talk.add(USER, "last")
    assert [t.content for t in talk.siblings(answer)] == ["1"]
    return talk


def shown(d):
    """The rows of the tree as they are on the screen."""
    found = [re.search("[◉●○].*", line) for line in d.screen_text]
    return [f[0].rstrip(" │▏▎▁▇") for f in found if f is not None and "its branch" not in f[0]]


def test_the_branch_in_view_runs_straight_down():
    talk = branched()
    assert [(t.content[:9], level, starts) for t, level, starts in rows(talk)] == [
        ("first", 0, False),
        ("1", 0, False),
        ("another s", 1, True),
        ("2 b", 2, True),
        ("2 b again", 1, True),
        ("third way", 1, True),
        ("second", 0, True),
        ("2", 0, False),
        ("last", 0, False),
    ]
    assert len(rows(Conversation())) == 0


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (200, 60)])
def test_choosing_a_turn_goes_there(size):
    async def script(d):
        await d.command("/tree")
        assert isinstance(d.app.screen, TreeScreen)
        found = shown(d)
        assert found[-1].endswith("◉ > last")
        if size[1] >= 24:
            assert found[:2] == ["● > first", "●   1"]
            assert found[3:6] == ["○ │ ├─  2 b", "○ ├─  2 b again", "○ ├─> third way"]
        assert all(len(line) <= size[0] for line in d.screen_text)
        await d.press(
            "left", "left", "left", "enter"
        )  # from the last turn to the start of the branch above the second one
        assert d.said == ["first", "1", d.said[2], "2 b again"]
        assert d.chat.focused_turn.content == "2 b again"
        await d.press("m")
        assert d.app.screen._rows.chosen == d.chat.talk.leaf.id
        await d.press("home", "enter")
        assert d.chat.focused_turn.content == "first"
        assert d.said[-1] == "2 b again"  # it is on this branch
        await d.command("/tree")
        await d.press("escape")
        await d.command("/undo")
        assert d.said[-1] == "last"
        await d.command("/tree")
        at = next(y for y, line in enumerate(d.screen_text) if "third way" in line)
        await d.pilot.click(offset=(size[0] // 2, at))
        await d.settle()
        assert d.said == ["first", "1", "third way"]

    chat(script, size, talk=branched())


def test_while_an_answer_runs_only_its_branch_is_gone_to():
    async def script(d):
        await d.say("more")
        await d.command("/tree")
        await d.press("home", "enter")
        assert d.chat.focused_turn.content == "first"
        await d.command("/tree")
        at = [t.content for t, _, _ in rows(d.chat.talk)].index("third way")
        await d.press("home", *["down"] * at, "enter")
        assert d.toasts[-1] == "An answer is running; Esc stops it."
        await d.post(d.text("fine"), d.end())
        assert d.said[-2:] == ["more", "fine"]

    chat(script, talk=branched())


def test_deep_and_wide_chats():
    talk, beside = Conversation(), []
    for n in range(500):
        turn = talk.add(USER if n % 2 == 0 else ASSISTANT, f"turn {n}")
        if n % 10 == 0:
            beside.append(talk.beside(turn, f"beside {n}"))  # newer than the turn that goes on
            talk.chat.leaf = turn.id
    wide = talk.leaf
    for n in range(50):
        talk.beside(wide, f"way {n}")

    async def script(d):
        await d.command("/tree")
        found = rows(talk)
        assert len(found) == 600
        assert max(level for _, level, _ in found) == 1
        assert shown(d)[-1] == "◉   way 49"
        talk.show(beside[0].id)
        levels = [level for _, level, _ in rows(talk)]
        assert max(levels) == 51
        await d.press("home")
        assert "turn 0" in "".join(shown(d))
        await d.press("enter")
        await d.command("/tree")
        d.app.screen._rows.highlighted = levels.index(51)
        await d.settle()
        assert all(len(line) <= 40 for line in d.screen_text)
        assert "45⋯│ │ │" in "".join(d.screen_text)

    chat(script, (40, 12), talk=talk)


def test_a_chat_is_summed_up_for_a_new_one():
    async def script(d):
        await d.command("/compact")
        assert d.engine.questions == []
        await d.exchange("question", "answer")
        old = d.chat.talk
        await d.command("/compact")
        assert d.engine.asked[-1] == ["question", "answer", WISH]
        await d.type("next")
        await d.post(d.text("All of it."), d.end())
        assert d.chat.talk is not old
        assert [t.content for t in old.path()] == ["question", "answer"]
        assert "All of it." in [t.content for t in old.turns.values()]
        (summary,) = d.chat.entry.attachments.found
        assert summary.text == "All of it."
        await d.command("more")
        assert d.engine.asked[-1] == [f"more\n\n{summary.name}:\n```\nAll of it.\n```"]
        await d.post(d.text("fine"), d.end())
        await d.command("/compact")
        await d.post(d.text("half"), d.end("stopped"))
        assert d.said[-1] == "half"
        assert d.chat.entry.attachments.found == []
        await d.exchange("another", "answer")
        assert d.said[-1] == "answer"

    chat(script)
