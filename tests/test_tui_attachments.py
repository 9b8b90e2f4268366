"""Attachments as chips: their tokens, a preview, rows on narrow screens, and questions that are too long."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from textual.widgets import TextArea

from ring_mlx import Session, demo_model_path, read_json
from ring_mlx.errors import NoFitError, PromptError
from ring_mlx.model.config import RingConfig
from ring_mlx.model.memory import WORKSPACE_BYTES, cache_bytes, check_prompt
from tests.tui_pilot import FakeEngine, chat
from tui.answering import SHORTEN, Engine, not_answered
from tui.store import Attachment
from tui.widgets.attachments import Chip, attachment_text

TIMES = "\N{MULTIPLICATION SIGN}"
NAMES = [
    "notes.txt",
    "a name with spaces.md",
    "x" * 80,
    "日本語" * 20,
    "b\u202e\x1b[2J.txt",
    "folder/",
    "log.txt#20-45",
]


class Counting(FakeEngine):
    """Has a token for every two bytes, and refuses more than so many."""

    def __init__(self, most=1000):
        super().__init__()
        self.threads, self.most, self.checked = set(), most, 0
        self.go = threading.Event()
        self.go.set()

    def count_tokens(self, text):
        self.threads.add(threading.current_thread())
        self.go.wait(10)
        return len(text.encode()) // 2

    def refusal(self, messages):
        self.threads.add(threading.current_thread())
        self.checked += 1
        self.go.wait(10)
        tokens = sum(self.count_tokens(m["content"]) for m in messages)
        return f"[prompt] {tokens} tokens exceed the context of {self.most}." if tokens > self.most else ""


def shown(d):
    return [(chip.region, str(chip.render())) for chip in d.app.query(Chip)]


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (200, 60)])
def test_chips_are_in_as_many_rows_as_they_need(size):
    async def script(d):
        for name in NAMES:
            d.chat.entry.attachments.add(Attachment(name, "some text\n" * 30))
        await d.settle()
        chips, area = shown(d), d.chat.entry.attachments
        rows = {region.y for region, _ in chips}
        assert len(rows) == {40: 7, 80: 7, 200: 4}[size[0]]
        for region, text in chips:
            assert region.right <= size[0] - 1
            assert region.height == 1
            assert cell_len(text) == region.width
            assert text.startswith("▪ ")
            assert text.endswith((f"300 B, 30 lines, 150 tokens {TIMES}", f"150 tokens {TIMES}"))
        assert not any(a.overlaps(b) for n, (a, _) in enumerate(chips) for b, _ in chips[:n])
        assert area.region.height <= 4
        assert d.chat.entry.prompt.region.height >= 3
        await d.pilot.resize_terminal(60, 20)
        await d.settle()
        assert all(cell_len(text) <= 57 for _, text in shown(d))
        await d.pilot.click(Chip)
        assert len(d.chat.entry.attachments.found) == len(NAMES) - 1

    chat(script, size, engine=Counting())


def test_a_name_is_cut_in_its_middle_and_nothing_else():
    for name in NAMES:
        for room in range(30, 120, 7):
            text = attachment_text(Attachment(name, "x"), 1234, room)
            assert cell_len(text) <= max(room, 24)
            assert text.endswith("1,234 tokens")
    assert (
        attachment_text(Attachment("a-very-long-name-of-a-file.txt", "x"), 12, 44)
        == "▪ a-very-l…a-file.txt 1 B, 1 line, 12 tokens"
    )


def test_tokens_are_counted_beside_the_screen_and_anew_for_another_model():
    engine = Counting()

    async def script(d):
        engine.go.clear()
        d.chat.entry.attachments.add(Attachment("a.txt", "x" * 100))
        await d.pilot.pause()
        await d.pilot.press("h", "i")
        assert d.chat.entry.prompt.text == "hi"
        assert f"a.txt 100 B, 1 line {TIMES}" in "".join(d.screen_text)
        engine.go.set()
        await d.settle()
        assert f"a.txt 100 B, 1 line, 50 tokens {TIMES}" in "".join(d.screen_text)
        assert threading.main_thread() not in engine.threads
        engine.count_tokens = lambda text: 7
        engine.start(d.chat.post_message)  # loaded again
        await d.settle()
        assert f"a.txt 100 B, 1 line, 7 tokens {TIMES}" in "".join(d.screen_text)

    chat(script, engine=engine)


def test_a_question_that_is_too_long_is_not_sent():
    engine = Counting()

    async def script(d):
        big = Attachment("big.txt", "x" * 4000)
        d.chat.entry.attachments.add(big)
        await d.settle()
        engine.go.clear()
        d.chat.entry.prompt.replace_text("read it")
        d.chat.entry.prompt.send()
        await d.pilot.pause()
        assert d.chat.entry.prompt.text == ""
        engine.go.set()
        await d.settle()
        assert engine.questions == []
        assert "exceed the context of 1000" in d.toasts[-1]
        assert d.chat.entry.prompt.text == "read it"
        assert d.chat.entry.attachments.found == [big]
        assert d.chat.talk.turns == {}
        assert threading.main_thread() not in engine.threads
        engine.most = 4000
        await d.press("enter")
        assert len(engine.questions) == 1
        checked = engine.checked
        await d.post(d.text("ok"), d.end())
        await d.command("/new")
        await d.say("short")
        assert engine.checked == checked  # it cannot be too long

    chat(script, engine=engine)


def test_a_preview():
    async def script(d):
        await d.command("/attached")
        assert d.toasts[-1].startswith("Nothing is attached")
        d.chat.entry.attachments.add(Attachment("a.txt", "first\n"))
        d.chat.entry.attachments.add(Attachment("b.txt", "bidi \u202e\x1b[2J\n" + "line\n" * 90_000))
        await d.command("/attached 2")
        text = "".join(d.screen_text)
        assert "▪ b.txt 450.0 KB, 90,001 lines, 225,00" in text
        assert len(d.app.screen.query_one(TextArea).text) < 101_000
        assert "bidi \\u202e\\x1b[2J" in text
        await d.press("x", "escape")
        assert len(d.chat.entry.attachments.found) == 2
        await d.command("/attached 3")
        assert d.toasts[-1] == "There are attachments 1 to 2."
        await d.command("/attached")
        await d.press("ctrl+x")
        assert [a.name for a in d.chat.entry.attachments.found] == ["b.txt"]
        assert "bidi" in str(d.app.query_one(Chip).tooltip)

    chat(script, (120, 40), engine=Counting())


def test_the_packaged_model_counts_and_refuses():
    with Session(store=False) as session:
        context = session.wait_until_loaded().context_tokens
        assert session.count_tokens("What is 27 + 35?") == session.check("What is 27 + 35?")
        lines = "".join(f"line {n} of many\n" for n in range(5000))
        assert session.count_tokens(lines) == len(
            session._thread.loaded.tokenizer.encode(lines, add_special_tokens=False)
        )
        assert session.count_tokens("") == 0
        assert session.count_tokens("x" * 100_000) >= 100_000 / 64
        with pytest.raises(PromptError, match=f"tokens exceed the context of {context}"):
            session.check([{"role": "user", "content": "a " * (context + 1)}])
        long = [{"role": "user", "content": "word " * context}]
        with pytest.raises(PromptError, match=f"exceed the context of {context}"):
            session.check(long)
        assert session.check([{"role": "user", "content": "hi"}]) < 40
    engine, messages = Engine(), []
    assert engine.count_tokens("x") is None
    assert engine.refusal(long) == ""
    engine.start(messages.append)
    until = time.monotonic() + 60
    while engine.count_tokens("x") is None and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.refusal(long).endswith(f" exceed the context of {context}; {SHORTEN}")
    engine.close()


def test_more_than_memory_holds_is_refused():
    config = RingConfig.from_dict(read_json(Path(demo_model_path()) / "config.json"))
    weights = 8_000_000_000
    limit = weights + WORKSPACE_BYTES + cache_bytes(config, 50_000)
    check_prompt(config, weights, 50_000, limit)
    check_prompt(config, weights, 8192, weights)  # loading has found room for so many
    with pytest.raises(
        NoFitError, match=r"^\[memory\] 50,001 tokens need 8\.\d GB with the model, but this machine"
    ) as e:
        check_prompt(config, weights, 50_001, limit)
    assert not_answered(e.value).endswith(f" tokens: {SHORTEN}")
