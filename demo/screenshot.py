"""``python -m demo.screenshot FILE.svg [--scene chats] [--theme textual-light] [--size 80x24]``: the chat as a picture.

``--all`` takes FILE for a folder and writes every scene at three sizes in two themes. Nothing of the user's is read or
written. In the scene "chat" the packaged model answers, greedily; in the others answers and models are made up, on a
machine that gives 24 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from huggingface_hub import constants
from textual.pilot import Pilot

from ring_mlx.bench.shapes import FLASH, MINI
from ring_mlx.model import memory
from tui.answering import Engine
from tui.app import RingChat
from tui.config import Config, Preset
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Answering, Ended, Figures, Loaded, ModelChoice, Piece, Post, Question, Sampling
from tui.paths import HOME
from tui.store import Chat, Record, chats, turns

QUESTIONS = ("What is 4756 + 3879?", "Which is larger, 512 or 498?")
LIMIT_S = 120
SIZES, NARROW = ("80x24", "120x40", "200x60"), "40x12"
THEMES = {"dark": "textual-dark", "light": "textual-light"}
MODEL, TOY = "Ring-mini-linear-2.0-4bit", "toy"
THOUGHT = (
    "The user wants the state after n tokens. Each token multiplies the old state by the decay and adds an outer product.\n"
    "So the first token's share shrinks by the decay once for every token that comes after it.\n"
    "That is a geometric series; its sum is bounded if the decay is below one.\n"
)
MATH = r"""The state of a head is updated by $S_t = \lambda S_{t-1} + k_t v_t^T$, so that

\[ S_n = \sum_{t=1}^{n} \lambda^{n-t} k_t v_t^T \qquad \lVert S_n \rVert \le \frac{1}{1-\lambda} \max_t \lVert k_t v_t^T \rVert \]

For \(\lambda = \tfrac{1}{2}\) the sum is \(\boxed{2}\).

| head | decay | half-life |
|---:|---:|---:|
| 1 | 0.87 | 5 tokens |
| 16 | 0.996 | 173 tokens |

```python
state = decay * state + k[:, None] * v[None, :]
```
"""
CHATS = (
    (
        "Why the sky is blue",
        "Why is the sky blue?",
        "Sunlight is **scattered** by molecules; blue light more than red.",
        4,
    ),
    ("Decay of linear attention", "Explain the decay of Ring's heads.", "Each head has a decay of its own.", 90),
    ("Merge intervals in Python", "Merge overlapping intervals.", "```python\ndef merge(intervals): ...\n```", 1500),
    ("A train from Ulm", "How fast is the train?", "It runs at 90 km/h.", 9000),
)
MODELS = (
    ("models/ring-mini-q4", MINI, 4, 9.2),
    ("models/mlx-community/Ring-flash-linear-2.0-4bit", FLASH, 4, 58.6),
    (".lmstudio/models/inclusionAI/Ring-mini-linear-2.0-6bit", MINI, 6, 13.3),
    (".lmstudio/models/inclusionAI/Ring-mini-linear-2.0", MINI, 16, 32.8),
)
FIGURES = Figures(
    prompt_tokens=31,
    reused_tokens=8,
    generated_tokens=412,
    thinking_tokens=230,
    thinking_s=2.4,
    prompt_tps=1240.0,
    generation_tps=96.0,
    time_to_first_token_s=0.21,
    peak_memory_bytes=9_600_000_000,
    seed=7,
)
Scene = Callable[[RingChat, Pilot[None]], Awaitable[None]]


class Scripted:
    """Answers nothing; scenes post what it says."""

    def __init__(self, model: Loaded) -> None:
        self._model, self.number = model, 0

    def start(self, post: Post) -> None:
        post(self._model)

    def ask(self, question: Question) -> None:
        self.number = question.number

    def stop(self) -> None:
        """Nothing runs."""

    def switch(self, choice: ModelChoice) -> None:
        """There is one model."""

    def close(self, timeout_s: float = 5.0) -> bool:
        return True


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


async def said(app: RingChat, pilot: Pilot[None], question: str, thought: str, answer: str, is_over: bool) -> None:
    """A question with a made-up answer, so far or to its end."""
    app.chat.entry.prompt.replace_text(question)
    await pilot.press("enter")
    await pilot.pause(0.2)
    engine = app.chat.engine
    assert isinstance(engine, Scripted)
    app.chat.post_message(Piece(engine.number, thought, "", FIGURES))
    if answer:
        app.chat.post_message(Piece(engine.number, "", answer, FIGURES))
    if is_over:
        app.chat.post_message(Ended(engine.number, "stop", FIGURES))
    await pilot.pause(1.0)


def keep_chats(app: RingChat) -> None:
    """Have a few chats in the store, some minutes old."""
    for title, question, answer, minutes in CHATS:
        talk = Conversation(Chat(title, changed=time.time() - 60 * minutes, pinned=minutes == 90))
        talk.add("user", question)
        talk.add("assistant", answer).record = Record(model=MODEL)
        changes = [turns.saving(talk.chat.id, turn) for turn in talk.turns.values()]
        app.keeper.db.write(chats.saving(talk.chat), *changes)


def keep_models(home: Path) -> None:
    """Have folders that look like checkpoints; their weights are holes."""
    for name, shape, bits, size_gb in MODELS:
        folder = home / name
        folder.mkdir(parents=True, exist_ok=True)
        form = {"dtype": "bfloat16"} if bits == 16 else {"quantization": {"bits": bits, "group_size": 64}}
        (folder / "config.json").write_text(json.dumps({**shape, **form}), encoding="utf-8")
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(int(size_gb * 1e9))


async def conversation(app: RingChat, pilot: Pilot[None]) -> None:
    """Two questions, the last thought open, the last answer one of two."""
    for question in QUESTIONS:
        await ask(app, pilot, question)
    await pilot.press("alt+up", "r")
    await until(pilot, lambda: app.chat.answer is None)
    await pilot.press("alt+up", "t")


async def first(app: RingChat, pilot: Pilot[None]) -> None:
    """An empty chat."""
    keep_chats(app)
    await pilot.press("ctrl+n")


async def stream(app: RingChat, pilot: Pilot[None]) -> None:
    """A thought being written, with a message that waits."""
    await said(app, pilot, "What is the state after n tokens?", THOUGHT * 2, "", False)
    app.chat.entry.prompt.replace_text("And for a decay of one half?")
    await pilot.press("enter")


async def math(app: RingChat, pilot: Pilot[None]) -> None:
    """An answer with formulas, a table and code."""
    await said(app, pilot, "What is the state after n tokens?", THOUGHT, MATH, True)


async def listed(app: RingChat, pilot: Pilot[None]) -> None:
    """The list of chats with its preview."""
    keep_chats(app)
    await pilot.press("ctrl+o", "down")


async def search(app: RingChat, pilot: Pilot[None]) -> None:
    """A search over all chats."""
    keep_chats(app)
    await pilot.press("ctrl+o", *"decay")


async def find(app: RingChat, pilot: Pilot[None]) -> None:
    """A search within a chat."""
    await said(app, pilot, "What is the state after n tokens?", THOUGHT, MATH, True)
    await pilot.press("ctrl+f", *"decay")


async def settings(app: RingChat, pilot: Pilot[None]) -> None:
    """The panel of settings."""
    await pilot.press("ctrl+s")


async def models(app: RingChat, pilot: Pilot[None]) -> None:
    """The choice of models."""
    await pilot.press("ctrl+l", "down")


async def keys(app: RingChat, pilot: Pilot[None]) -> None:
    """Commands and keys."""
    await pilot.press("f1")


async def commands(app: RingChat, pilot: Pilot[None]) -> None:
    """The list of commands."""
    await said(app, pilot, CHATS[0][1], "", CHATS[0][2], True)
    await pilot.press("slash", "e")


async def attached(app: RingChat, pilot: Pilot[None]) -> None:
    """Files beside a question."""
    await said(app, pilot, CHATS[0][1], "", CHATS[0][2], True)
    for name in ("screenshot.py", "README.md", "config.json"):
        app.chat.entry.attach(str(Path(__file__).parent / name))
    app.chat.entry.prompt.replace_text("What do these files do?")


SCENES: dict[str, Scene] = {
    "first": first,
    "stream": stream,
    "math": math,
    "chats": listed,
    "search": search,
    "find": find,
    "models": models,
    "settings": settings,
    "commands": commands,
    "attached": attached,
    "chat": conversation,
    "help": keys,
}


def engine_of(scene: str) -> Answering:
    """The packaged model for what it can answer; the others need more than it knows."""
    if scene == "chat":
        return Engine()
    is_toy = scene == "first"
    return Scripted(Loaded(TOY if is_toy else MODEL, 4096 if is_toy else 131072, "4-bit", 24_000_000_000))


async def picture(paths: dict[str, Path], scene: str, size: tuple[int, int]) -> None:
    """Play a scene and write what the screen then shows, in each theme to its path."""
    engine = engine_of(scene)
    config = Config(theme=next(iter(paths)), sampling=Sampling(temp=0.0), presets={"exact": Preset(Sampling(temp=0.0))})
    keeper = Keeper(None, print)
    app = RingChat(engine, keeper, config)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: app.chat.status.state == "ready")
        await SCENES[scene](app, pilot)
        for theme, path in paths.items():
            app.theme = theme
            await pilot.pause(0.6)
            path.write_text(app.export_screenshot(title="ring-mlx chat"), encoding="utf-8")
    engine.close()
    keeper.close()


def take(paths: dict[str, Path], scene: str, size: str) -> None:
    """`picture` of a size such as "80x24"."""
    columns, rows = map(int, size.split("x"))
    asyncio.run(picture(paths, scene, (columns, rows)))


def take_all(folder: Path) -> None:
    """Every scene at three sizes in two themes, and the first screen in a narrow terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    for scene, size in [
        *((scene, size) for scene in SCENES for size in SIZES),
        ("first", NARROW),
        ("commands", NARROW),
    ]:
        take({full: folder / f"{scene}-{size}-{name}.svg" for name, full in THEMES.items()}, scene, size)


def main() -> None:
    """Read the options and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--all", action="store_true", help="every scene, size and theme, into a folder")
    parser.add_argument("--scene", choices=SCENES, default="chat")
    parser.add_argument("--theme", default="textual-dark")
    parser.add_argument("--size", default="100x30", help="columns x rows (100x30)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ[HOME] = os.environ["HOME"] = home
        constants.HF_HUB_CACHE = home
        memory.budget_bytes = lambda: 24_000_000_000
        keep_models(Path(home))
        if args.all:
            take_all(args.file)
        else:
            take({args.theme: args.file}, args.scene, args.size)


if __name__ == "__main__":
    main()
