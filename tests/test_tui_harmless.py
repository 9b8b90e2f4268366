"""No view of the chat shows an override, a control character or what is invisible and deceives."""

from __future__ import annotations

import re

import pytest

from tests.tui_pilot import SIZES, chat
from tui.conversation import Conversation
from tui.messages import Loaded
from tui.store import Call

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


SPELT = "&#27;[2J &#x9b;2J &#x202e;evil &rlm;&#8294;&#xE0041; &amp;"


def test_characters_that_markdown_spells_are_harmless():
    """As text, title, cell, quotation, link, its title, and the picture that a link may be."""
    link = f"[l{SPELT}](http://x/&#x202e;y 'title {SPELT}') ![p{SPELT}](http://x/&#x202e; '{SPELT}') *e{SPELT}*"
    answer = f"# t{SPELT}\n\na{SPELT} {link}\n\n| h{SPELT} |\n|--|\n| c{SPELT} |\n\n> q{SPELT}\n\n- i{SPELT}\n"

    async def script(d):
        await d.exchange("q", *(f"{word} " for word in answer.split(" ")))
        for _ in range(2):  # as it came, and as it is shown later
            assert shown(d).count(r"\u202eevil") >= 7
            assert " &amp;" not in shown(d)
            assert not BAD.search(shown(d)), repr(BAD.search(shown(d)))
            styles = [s.style.meta for row in d.app.screen._compositor.render_strips() for s in row if s.style]
            assert not BAD.search(str(styles))
            await d.chat.refresh_turns()
            await d.settle()

    chat(script, (120, 60))


def test_a_tool_call_is_harmless():
    async def script(d):
        assert "tool" in shown(d)
        assert not BAD.search(shown(d))

    talk = Conversation()
    talk.add("user", "q")
    talk.add("assistant", "").calls = (Call(f"tool{EVIL}", {f"key{EVIL}": EVIL}),)
    chat(script, SIZES[1], talk=talk)
