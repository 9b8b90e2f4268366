"""The chat with an engine that says what the test wants, for the tests of tui."""

from __future__ import annotations

import asyncio

from textual import _wait
from textual._context import visible_screen_stack

from tui import clipboard
from tui.app import RingChat
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Ended, Figures, Loaded, Piece
from tui.store import Chat, chats, turns


async def pause(seconds):
    """Sleep, then go on until nothing is ready to run: on a loaded machine a sleep alone lets little run."""
    await asyncio.sleep(seconds)
    idle = 0
    while idle < 2:
        await asyncio.sleep(0)
        idle = 0 if asyncio.get_running_loop()._ready else idle + 1


# A pilot waits so long after each key, and again while the process is busy.
_wait.SLEEP_GRANULARITY, _wait.SLEEP_IDLE, _wait.sleep = 0.008, 0.001, pause


def strips(app):
    """The rows of the screen; where it is not painted yet, the screens behind a dialog are drawn too."""
    visible_screen_stack.set(app._background_screens)
    return app.screen._compositor.render_strips()


clipboard.TOOLS = ()  # a test does not fill the clipboard of who runs it
SIZES = [(80, 24), (120, 40)]
FIGURES = Figures(
    prompt_tokens=20,
    reused_tokens=8,
    generated_tokens=4,
    prompt_tps=500.0,
    generation_tps=99.0,
    time_to_first_token_s=0.12,
    peak_memory_bytes=1_500_000_000,
    seed=7,
)
KEYS = {" ": "space", "*": "asterisk", "/": "slash", "@": "at", ".": "full_stop", "-": "minus"}


class FakeEngine:
    """Records what it is asked; the test posts what it answers."""

    def __init__(self, loads=True):
        self.questions, self.stops, self.loads, self.choices, self.post = [], 0, loads, [], None

    def start(self, post):
        self.post = post
        if self.loads:
            post(Loaded("fake", 4096, "4-bit", 16_000_000_000))

    def ask(self, question):
        self.questions.append(question)

    def stop(self):
        self.stops += 1

    def switch(self, choice):
        self.choices.append(choice)

    def close(self, timeout_s=5.0):
        return True

    @property
    def number(self):
        return self.questions[-1].number

    @property
    def asked(self):
        """The contents of each question's messages."""
        return [[m["content"] for m in q.messages] for q in self.questions]


class Driver:
    """What a test does with a running chat."""

    def __init__(self, app, engine, pilot):
        self.app, self.engine, self.pilot, self.chat = app, engine, pilot, app.chat

    async def press(self, *keys):
        await self.pilot.press(*keys)
        await self.settle()

    async def settle(self):
        await self.pilot.pause()
        await self.pilot.pause(0)  # the screen may wait for the thread that parses Markdown; until its next message
        if self.app.workers:
            await self.app.workers.wait_for_complete()
            await self.pilot.pause()

    async def type(self, text):
        """Type as a person does, which takes its time."""
        await self.press(*(KEYS.get(c, c) for c in text))

    async def say(self, text):
        """Send a line."""
        self.chat.entry.prompt.replace_text(self.chat.entry.prompt.text + text)
        await self.press("enter")

    async def command(self, text):
        """Give a slash command."""
        self.chat.entry.prompt.replace_text(text)
        await self.pilot.pause()
        self.chat.entry.prompt.send()
        await self.settle()

    async def post(self, *messages):
        for m in messages:
            self.chat.post_message(m)
        await pause(0.04)
        await self.settle()

    def thought(self, text, tokens, seconds):
        figures = Figures(**{**vars(FIGURES), "thinking_tokens": tokens, "thinking_s": seconds})
        return Piece(self.engine.number, text, "", figures)

    def text(self, text):
        return Piece(self.engine.number, "", text, FIGURES)

    def end(self, reason="stop"):
        return Ended(self.engine.number, reason)

    async def exchange(self, question, *answer):
        """A question and its whole answer."""
        self.chat.entry.prompt.replace_text(question)
        await self.press("enter")
        await self.post(*(self.text(a) for a in answer), self.end())

    @property
    def said(self):
        """The texts of the branch in view."""
        return [t.content for t in self.chat.talk.path()]

    @property
    def status(self):
        return self.chat.status.render().plain

    @property
    def screen_text(self):
        """The rows of the screen as plain text."""
        rows = strips(self.app)
        return ["".join(segment.text for segment in row).rstrip() for row in rows]

    @property
    def toasts(self):
        return [n.message for n in self.app._notifications]


def chat(script, size=SIZES[0], engine=None, path=None, **options):
    """Run a script of a Driver in a terminal of the given size; returns the app."""
    engine = engine or FakeEngine()
    notes = []
    keeper = Keeper(path, notes.append)
    app = RingChat(engine, keeper, notes=notes, **options)
    keeper.tell_with(app.tell)

    async def drive():
        async with app.run_test(size=size, notifications=True) as pilot:
            driver = Driver(app, engine, pilot)
            await driver.settle()
            await script(driver)

    asyncio.run(drive())
    app.all_saved = keeper.close()
    return app


def kept(d, title, age):
    """A chat in the store, so many days old."""
    talk = Conversation(Chat(title, changed=1e9 - age * 86400))
    talk.add("user", f"ask {title}")
    talk.add("assistant", "said")
    d.chat.keeper.db.write(chats.saving(talk.chat), *(turns.saving(talk.chat.id, t) for t in talk.turns.values()))
    return talk.chat.id
