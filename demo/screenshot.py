"""``python -m demo.screenshot FILE.svg [--scene chats] [--theme textual-light] [--size 80x24]``: the running chat as a picture.

The packaged model answers, greedily; nothing of the user's is read or written.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from textual.pilot import Pilot

from tui.answering import Engine
from tui.app import RingChat
from tui.config import Config, Preset
from tui.keeper import Keeper
from tui.messages import Sampling
from tui.paths import HOME

QUESTIONS = ("What is 4756 + 3879?", "Which is larger, 512 or 498?")
LIMIT_S = 120
Scene = Callable[[RingChat, Pilot[None]], Awaitable[None]]


async def ask(app: RingChat, pilot: Pilot[None], question: str) -> None:
    """Ask a question as a person would, and wait for the answer's end."""
    app.chat.entry.prompt.replace_text(question)
    await pilot.press("enter")
    await until(pilot, lambda: app.chat.answer is None)


async def until(pilot: Pilot[None], is_so: Callable[[], bool]) -> None:
    """Wait, but not for ever."""
    started = time.monotonic()
    while not is_so() and time.monotonic() - started < LIMIT_S:
        await pilot.pause(0.1)


async def conversation(app: RingChat, pilot: Pilot[None]) -> None:
    """Two questions, the last thought open, the last answer one of two."""
    for question in QUESTIONS:
        await ask(app, pilot, question)
    await pilot.press("alt+up", "r")
    await until(pilot, lambda: app.chat.answer is None)
    await pilot.press("alt+up", "t")


async def search(app: RingChat, pilot: Pilot[None]) -> None:
    """A search over a few chats."""
    for question in (*QUESTIONS, "Which is larger, 81 or 18?"):
        await ask(app, pilot, question)
        await pilot.press("ctrl+n")
    await pilot.press("ctrl+o", *"larg")


async def settings(app: RingChat, pilot: Pilot[None]) -> None:
    """The panel of settings."""
    await pilot.press("ctrl+s")


async def models(app: RingChat, pilot: Pilot[None]) -> None:
    """The choice of models."""
    await pilot.press("ctrl+l")


async def keys(app: RingChat, pilot: Pilot[None]) -> None:
    """Commands and keys."""
    await pilot.press("f1")


async def commands(app: RingChat, pilot: Pilot[None]) -> None:
    """A slash command being completed, with a file attached."""
    await ask(app, pilot, QUESTIONS[0])
    app.chat.entry.attach(__file__)
    await pilot.press("slash", "e")


SCENES: dict[str, Scene] = {
    "chat": conversation,
    "chats": search,
    "settings": settings,
    "models": models,
    "help": keys,
    "commands": commands,
}


async def picture(engine: Engine, path: Path, scene: str, theme: str, size: tuple[int, int]) -> None:
    """Play a scene and write what the screen then shows."""
    config = Config(theme=theme, sampling=Sampling(temp=0.0), presets={"exact": Preset(Sampling(temp=0.0))})
    keeper = Keeper(None, print)
    app = RingChat(engine, keeper, config)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: app.chat.status.state == "ready")
        await SCENES[scene](app, pilot)
        await pilot.pause(0.6)
        path.write_text(app.export_screenshot(title="ring-mlx chat"), encoding="utf-8")
    keeper.close()


def main() -> None:
    """Read the options and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--scene", choices=SCENES, default="chat")
    parser.add_argument("--theme", default="textual-dark")
    parser.add_argument("--size", default="100x30", help="columns x rows (100x30)")
    args = parser.parse_args()
    columns, rows = args.size.split("x")
    engine = Engine()
    with tempfile.TemporaryDirectory() as home:
        os.environ[HOME] = home
        asyncio.run(picture(engine, args.file, args.scene, args.theme, (int(columns), int(rows))))
        engine.close()


if __name__ == "__main__":
    main()
