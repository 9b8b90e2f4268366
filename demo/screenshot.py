"""``python -m demo.screenshot FILE.svg [light]``: the chat with the packaged model, asked two questions, as a picture."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from tui.app import RingChat
from tui.engine import Engine, Settings
from tui.status import StatusLine

QUESTIONS = ("What is 4756 + 3879?", "Which is larger, 512 or 498?")
SIZE, LIMIT_S = (100, 30), 120


async def picture(engine: Engine, path: Path, is_light: bool) -> None:
    """Ask the questions as a person would, open the last thought, and write what the screen shows."""
    app = RingChat(engine)
    async with app.run_test(size=SIZE) as pilot:
        if is_light:
            app.action_switch_theme()
        started = time.monotonic()
        while app.query_one(StatusLine).state != "ready":
            await pilot.pause(0.1)
        for n, question in enumerate(QUESTIONS, 1):
            app.query_one("#prompt").text = question
            await pilot.press("enter")
            while len(app.conversation) < 2 * n and time.monotonic() - started < LIMIT_S:
                await pilot.pause(0.1)
        app.query("Collapsible").last().collapsed = False
        await pilot.pause(0.5)
        path.write_text(app.export_screenshot(title="ring-mlx chat"), encoding="utf-8")


if __name__ == "__main__":
    the_engine = Engine(Settings(temp=0.0))
    asyncio.run(picture(the_engine, Path(sys.argv[1]), "light" in sys.argv[2:]))
    the_engine.close()
