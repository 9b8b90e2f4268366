"""No view of the chat shows an override, a control character or what is invisible and deceives."""

from __future__ import annotations

import re

import pytest

from tests.tui_pilot import SIZES, chat
from tui.messages import Loaded

EVIL = "\u202eevil\u2066\x9b2J\u200f\U000e0041"
BAD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")


def shown(d):
    """The rows of the screen as one text."""
    return "\n".join(d.screen_text)


@pytest.mark.parametrize("size", SIZES)
def test_views_of_a_chat(size):
    async def script(d):
        d.engine.post(Loaded(f"model{EVIL}", 4096, "4-bit", 16_000_000_000))
        await d.settle()
        await d.exchange(f"ask{EVIL}", f"# say{EVIL}\n\n- `code{EVIL}`\n\n```py{EVIL}\nx{EVIL}\n```\n")
        assert r"\u202eevil" in shown(d)
        assert not BAD.search(shown(d)), repr(BAD.search(shown(d)))
        await d.command(f"/title title{EVIL}")
        await d.command("/chats")
        await d.settle()
        assert r"title\u202eevil" in shown(d)
        assert not BAD.search(shown(d))

    chat(script, size)


def test_a_tool_call_is_harmless():
    async def script(d):
        await d.say("q")
        await d.post(d.call(f"tool{EVIL}", **{f"key{EVIL}": EVIL}), d.end())
        assert "tool" in shown(d)
        assert not BAD.search(shown(d))

    chat(script, SIZES[1])
