"""Every key takes effect in the order typed: in the prompt, across screens and chats, and while an answer streams."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from textual import events
from textual.widgets import Input

from tests.tui_pilot import KEYS, chat, kept
from tui.screens.chats import ChatsScreen
from tui.screens.text import LineScreen
from tui.store import chats, drafts


def key(name):
    """A key as a terminal sends it: a letter, or a name such as "backspace"."""
    return events.Key(KEYS.get(name, name), name if len(name) == 1 else None)


async def burst(d, names):
    """Press keys without any pause, and wait until they have taken effect."""
    for name in names:
        d.app.post_message(key(name))
    while d.app.message_queue_size or any(w.group == "typed" for w in d.app.workers):
        await asyncio.sleep(0.005)
    await d.app.settle()


class Editor:
    """What a line of text should be after keys."""

    def __init__(self):
        self.text, self.at = "", 0

    def press(self, name):
        before, after = self.text[: self.at], self.text[self.at :]
        if len(name) == 1:
            before += name
        elif name == "backspace":
            before = before[:-1]
        elif name == "delete":
            after = after[1:]
        elif name == "ctrl+u":
            before = ""
        elif name == "ctrl+k":
            after = ""
        moved = {"left": -1, "right": 1, "home": -len(before), "end": len(after)}.get(name, 0)
        self.text = before + after
        self.at = min(max(len(before) + moved, 0), len(self.text))


class Model:
    """The chat as a person means it: an editor for each chat, and one for the words to search for."""

    def __init__(self):
        self.chats, self.words = [Editor()], None

    def press(self, name):
        if name == "ctrl+n" and self.words is None:
            self.chats.append(Editor())
        elif name == "ctrl+o" and self.words is None:
            self.words = Editor()
        elif name == "escape":
            self.words = None
        elif name not in ("ctrl+n", "ctrl+o"):
            (self.words or self.chats[-1]).press(name)


EDITS = ["backspace", "delete", "left", "right", "home", "end", "ctrl+u", "ctrl+k"]
names = st.one_of(st.sampled_from("abc "), st.sampled_from(EDITS), st.sampled_from(["ctrl+n", "ctrl+o", "escape"]))
bursts = st.lists(st.lists(names, min_size=1, max_size=15), min_size=1, max_size=2)


UPDATE_EVERY_S = 0.06


async def stream(d):
    """An answer of 300 tokens a second, as the engine posts it."""
    while True:
        d.chat.post_message(d.text("word **bold** " * 8 + "\n\n"))
        await asyncio.sleep(UPDATE_EVERY_S)


@settings(max_examples=3, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(bursts)
def test_bursts_while_an_answer_streams(typed):
    async def script(d):
        await d.say("question")
        first, model = d.chat.talk, Model()
        streaming = asyncio.create_task(stream(d))
        for one in typed:
            await burst(d, one)
            for name in one:
                model.press(name)
            assert d.chat.entry.prompt.text == model.chats[-1].text
            if isinstance(d.app.screen, ChatsScreen):
                assert d.app.screen.query_one(Input).value == model.words.text
            assert isinstance(d.app.screen, ChatsScreen) == (model.words is not None)
        streaming.cancel()
        if len(model.chats) > 1:
            assert drafts.load(d.chat.keeper.db, first.chat.id) == model.chats[0].text

    chat(script)


@pytest.mark.parametrize(
    ("typed", "left", "text"),
    [
        ("abcd⌫⌫xy", None, "abxy"),
        ("teh⌫⌫he", None, "the"),
        ("a^ub", None, "b"),
        ("old^nnew", "old", "new"),
        ("old^n^ow^en", "old", "n"),
        ("/new\nnext", "", "next"),
        ("/ne\nnext", "", "next"),
        ("x/title A\ny", None, "y"),
    ],
)
def test_what_people_type_quickly(typed, left, text):
    keys = typed.translate({ord("⌫"): "\0"}).replace("^u", "\1").replace("^n", "\2").replace("^o", "\3")
    special = {"\0": "backspace", "\1": "ctrl+u", "\2": "ctrl+n", "\3": "ctrl+o", "\n": "enter"}
    keys = [special.get(k, k) for k in keys.replace("^e", "\4")]
    keys = ["escape" if k == "\4" else k for k in keys]

    async def script(d):
        await d.exchange("q", "a")
        first = d.chat.talk.chat.id
        await burst(d, keys)
        assert d.chat.entry.prompt.text == text
        assert (d.chat.talk.chat.id != first) == (left is not None)
        if left is not None:
            assert drafts.load(d.chat.keeper.db, first) == left

    chat(script)


def test_the_list_of_chats_in_one_burst():
    """Open the list, go down, rename, search, open: each key acts on what the one before has shown."""

    async def script(d):
        ids = [kept(d, f"chat {n}", n) for n in range(5)]
        await burst(d, ["ctrl+o", "down", "down", "ctrl+r", "ctrl+u", *"new", "enter", "ctrl+t"])
        assert chats.load(d.chat.keeper.db, ids[2]).title == "new"
        assert chats.load(d.chat.keeper.db, ids[2]).pinned
        await burst(d, ["enter", *"hello"])
        assert d.chat.talk.chat.id == ids[2]
        assert d.chat.entry.prompt.text == "hello"
        assert not isinstance(d.app.screen, LineScreen | ChatsScreen)

    chat(script)


def test_a_letter_is_painted_before_the_next_frame(monkeypatch):
    """A frame lays out the answer first; the last letter of a burst does not wait for it."""

    async def script(d):
        prompt, painted = d.chat.entry.prompt, []
        monkeypatch.setattr(type(d.chat), "_on_timer_update", lambda self: None)  # no frame comes
        monkeypatch.setattr(d.app, "_display", lambda _, update: painted.append(None if d.app._batch_count else update))
        for word in ("a", "bc"):
            painted.clear()
            await burst(d, word)
            assert any(painted)
        with d.app.batch_update():  # as while blocks are mounted
            painted.clear()
            await burst(d, "d")
            assert any(painted)
        assert prompt.text == "abcd"
        assert d.screen_text[prompt.region.y + 1].strip(" │▊▎") == "abcd"

    chat(script)


@pytest.mark.parametrize("wait_s", [0.0, 0.02, 0.05, 0.1])
def test_keys_that_are_still_to_come_do_not_disturb_the_end(wait_s):
    async def script(d):
        for key in ("ctrl+p", "pageup", "escape", "ctrl+s", "enter", "f3", "escape", "ctrl+o", "ctrl+t", "escape") * 3:
            d.app.post_message(events.Key(key, None))
        d.app.post_message(events.Paste("text"))
        await asyncio.sleep(wait_s)
        d.app.leave_chat(0)
        await asyncio.sleep(0.5)

    assert chat(script).all_saved


def test_a_click_on_what_has_just_been_removed_does_nothing():
    async def script(d):
        await d.exchange("q", "words to click")
        block = d.app.screen.query("MarkdownParagraph").first()
        (x, y), parent = block.region.offset, block._parent
        block._parent = None  # as while an answer is written; the screen is painted later
        await d.app.on_event(events.MouseDown(None, x, y, 0, 0, 1, False, False, False, x, y))
        block._parent = parent

    chat(script)


@pytest.mark.parametrize("key", ["ctrl+p", "ctrl+s"])
def test_a_dialog_ends_once(key):
    async def script(d):
        await d.press(key)
        dialog = d.app.screen
        assert dialog is not d.chat
        await d.press("escape")
        dialog.dismiss(None)  # as a choice does that comes after the key
        await d.settle()
        assert d.app.screen is d.chat

    chat(script)


@pytest.mark.parametrize("screen", ["settings", "chats", "model"])
def test_a_screen_that_opens_while_the_chat_ends_does_not_disturb_it(screen):
    async def script(d):
        d.app.leave_chat(0)
        await d.chat.action_command(screen)
        await asyncio.sleep(0.1)

    assert chat(script).all_saved
