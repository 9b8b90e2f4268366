"""``python -m benchmarks.chat_load``: the chat under load, measured without a model.

Opening and scrolling a chat of 2,000 turns, searching 10,000 chats, and the time from a key to its letter on the
screen while 300 tokens a second of Markdown stream in. Times are wall clock; the terminal is Textual's own, headless.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import textual
from textual import events
from textual.strip import Strip

from benchmarks.common import arguments, report, slow_end
from tui.app import RingChat
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Ended, Figures, Loaded, Piece, Post, Question
from tui.store import Chat, Database, chats, search, turns
from tui.updates import UPDATE_EVERY_S

TURNS, CHATS, TPS, STREAM_S, SIZE = 2000, 10_000, 300, 10.0, (120, 40)
TOKEN_TEXT = "The **ring** model, "
PARAGRAPH = "Some *text* with `code` and a [link](x).\n\n- one\n- two\n\n```python\nx = 1\n```\n"


class NoEngine:
    """Loads at once and says nothing."""

    def start(self, post: Post) -> None:
        """Say that a model is there, and leave what stays out of garbage collection, as the engine does."""
        gc.freeze()
        post(Loaded("none", 131_072))

    def ask(self, question: Question) -> None:
        """Nothing; the benchmark posts the answer."""

    def stop(self) -> None:
        """Nothing."""

    def switch(self, choice: object) -> None:
        """Nothing."""

    def close(self, timeout_s: float = 5.0) -> bool:
        """Nothing."""
        return True


def fill(db: Database) -> str:
    """A store of many small chats and a long one, whose id is returned."""
    words = ["linear", "attention", "ring", "model", "state", "decay", "cache", "token", "prefill", "gate", "expert"]
    words += ["router", "memory", "speed"]
    for start in range(0, CHATS, 1000):
        statements = []
        for n in range(start, start + 1000):
            talk = Conversation(Chat(f"chat {n} about {words[n % len(words)]}"))
            talk.add("user", f"What is {words[n % 14]} number {n}?")
            talk.add("assistant", " ".join(words[(n * k) % 14] for k in range(1, 60)) + f" word{n % 97}")
            statements += [chats.saving(talk.chat), *(turns.saving(talk.chat.id, t) for t in talk.turns.values())]
        db.write(*statements)
    long = Conversation(Chat("long"))
    for n in range(TURNS):
        long.add("assistant" if n % 2 else "user", f"{PARAGRAPH if n % 2 else 'Tell me more'} {n}")
    db.write(chats.saving(long.chat), *(turns.saving(long.chat.id, t) for t in long.turns.values()))
    return long.chat.id


def told(name: str, times_s: list[float]) -> dict[str, Any]:
    """A row of milliseconds."""
    return {"what": f"{name:44}"} | {f"{part} ms": t for part, t in slow_end(times_s, 1e3).items()}


def search_many(db: Database) -> Iterator[dict[str, Any]]:
    """Searches as they are typed."""
    times = []
    for typed in ("r", "ri", "rin", "ring", "ring mod", "word96", "number 9999", "attention decay", "nothing here"):
        for _ in range(5):
            started = time.perf_counter()
            search.find(db, typed)
            times.append(time.perf_counter() - started)
    yield told(f"search of {CHATS:,} chats", times)
    started = time.perf_counter()
    chats.listed(db)
    yield told("list of chats", [time.perf_counter() - started])


async def open_and_scroll(keeper: Keeper, long_id: str) -> list[dict[str, Any]]:
    """From the id of a chat to its last turn on the screen, then screen by screen upwards."""
    app = RingChat(NoEngine(), keeper)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.pause()
        started = time.perf_counter()
        talk = keeper.open(long_id)
        assert talk is not None
        await app.chat.open_chat(talk)
        await on_screen(app, f"{TURNS - 1}")
        opened = told(f"opening a chat of {TURNS:,} turns", [time.perf_counter() - started])
        times = []
        for _ in range(60):
            before = time.perf_counter()
            app.chat.turns.page(-1)
            await frame(app)
            times.append(time.perf_counter() - before)
            await pilot.pause(0.05)
        return [opened, told("one screen up, to the next frame", times)]


async def type_while_streaming(keeper: Keeper) -> dict[str, Any]:
    """Keys at 7 a second into the prompt while an answer streams."""
    app = RingChat(NoEngine(), keeper)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.pause()
        app.chat.entry.prompt.text = "go on"
        await pilot.press("enter")
        await pilot.pause()
        painted = Painted(app)
        streaming = asyncio.create_task(stream(app))
        times = []
        while not streaming.done():
            wanted = len(app.chat.entry.prompt.text) + 1
            started = time.perf_counter()
            app.post_message(events.Key("x", "x"))
            await painted.wait(wanted)
            times.append(time.perf_counter() - started)
            await asyncio.sleep(0.14)
        tokens = await streaming
        return told(f"key to screen at {tokens / STREAM_S:.0f} tokens a second", times)


class Painted:
    """Knows how many letters of the prompt the terminal has been given."""

    def __init__(self, app: RingChat) -> None:
        self._prompt, self._display, self._render_line = (
            app.chat.entry.prompt,
            app._display,
            app.chat.entry.prompt.render_line,
        )
        self._drawn = self._wanted = 0
        self._has = asyncio.Event()
        vars(self._prompt)["render_line"], vars(app)["_display"] = self._draw, self._show

    def _draw(self, y: int) -> Strip:
        self._drawn = len(self._prompt.text)
        return self._render_line(y)

    def _show(self, *update: Any) -> None:
        self._display(*update)
        if self._drawn >= self._wanted:
            self._has.set()

    async def wait(self, letters: int) -> None:
        """Until so many are on the screen."""
        self._wanted = letters
        self._has.clear()
        await self._has.wait()


async def stream(app: RingChat) -> int:
    """Post an answer as the engine's batches would; returns how many tokens."""
    started, tokens = time.perf_counter(), 0
    while (now := time.perf_counter() - started) < STREAM_S:
        new = int(now * TPS) - tokens
        text = "".join("\n\n" if (tokens + i) % 50 == 49 else TOKEN_TEXT[: 4 + i % 14] for i in range(new))
        tokens += new
        app.chat.post_message(Piece(app.chat.number, "", text, Figures(generated_tokens=tokens)))
        await asyncio.sleep(UPDATE_EVERY_S)
    app.chat.post_message(Ended(app.chat.number, "stop"))
    return tokens


async def frame(app: RingChat) -> None:
    """Wait for the next refresh."""
    done = asyncio.Event()
    app.chat.call_after_refresh(done.set)
    await done.wait()


async def on_screen(app: RingChat, text: str) -> None:
    """Wait until a text is on the screen."""
    while not any(text in "".join(s.text for s in row) for row in app.screen._compositor.render_strips()):
        await asyncio.sleep(0.005)


def rows(folder: str) -> Iterator[dict[str, Any]]:
    """What is measured, one after the other."""
    keeper = Keeper(Path(folder) / "chats.db", print)
    long_id = fill(keeper.db)
    yield from search_many(keeper.db)
    yield from asyncio.run(open_and_scroll(keeper, long_id))
    yield asyncio.run(type_while_streaming(keeper))
    keeper.close()


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(args, rows(folder), f"textual {textual.__version__}", f"{SIZE[0]} x {SIZE[1]}")


if __name__ == "__main__":
    main()
