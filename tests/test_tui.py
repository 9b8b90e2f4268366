"""The chat with an engine that says what the test wants, at a small and a large terminal; then the engine itself."""

from __future__ import annotations

import ast
import asyncio
import io
import queue
import subprocess
import sys
import threading
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from textual import events
from textual.widgets import Collapsible, Markdown
from textual.widgets._toast import Toast

import ring_mlx
import tui
from ring_mlx import RingError
from tui import command
from tui.app import RingChat
from tui.batch import Batch
from tui.engine import Engine, Settings
from tui.messages import Ended, Failed, Figures, Loaded, Piece, Reading
from tui.prompt import Prompt
from tui.status import StatusLine, figures_text
from tui.turns import AssistantTurn, Turns, UserTurn

SIZES = [(80, 24), (120, 40)]
FIGURES = Figures(500.0, 99.0, 0.12, 24, 1.5)
KEYS = {" ": "space", "*": "asterisk"}


class FakeEngine:
    """Records what it is asked; the test posts what it answers."""

    def __init__(self, loads=True):
        self.asked, self.stops, self.loads, self.number = [], 0, loads, None

    def start(self, post):
        if self.loads:
            post(Loaded("fake", 4096))

    def ask(self, number, conversation):
        self.number = number
        self.asked.append([m["content"] for m in conversation])

    def stop(self):
        self.stops += 1


def chat(script, size=SIZES[0], engine=None):
    """Run a script of (app, engine, pilot) in a terminal of the given size; returns the app."""
    engine = engine or FakeEngine()
    app = RingChat(engine)

    async def drive():
        async with app.run_test(size=size, notifications=True) as pilot:
            await pilot.pause()
            await script(app, engine, pilot)

    asyncio.run(drive())
    return app


async def say(pilot, text):
    await pilot.press(*(KEYS.get(c, c) for c in text), "enter")
    await pilot.pause()


async def post(app, pilot, *messages):
    for m in messages:
        app.post_message(m)
    await pilot.pause(0.1)


def thought(engine, text, tokens, seconds):
    return Piece(engine.number, text, "", tokens, seconds, FIGURES)


def answer(engine, text):
    return Piece(engine.number, "", text, 0, 0.0, FIGURES)


def status(app):
    return app.query_one(StatusLine).render().plain


def shown(markdown):
    """What a Markdown widget shows, block by block."""
    return [(type(b).__name__, str(getattr(b, "content", ""))) for b in markdown.query("MarkdownBlock")]


@pytest.mark.parametrize("size", SIZES)
def test_a_question_and_its_answer(size):
    async def script(app, engine, pilot):
        await say(pilot, "hi there")
        assert engine.asked == [["hi there"]]
        await post(app, pilot, Reading(engine.number, 1000, 2000))
        assert "reading 1,000 of 2,000 tokens" in status(app)
        await post(app, pilot, thought(engine, "hm", 20, 0.84))
        fold = app.query_one(Collapsible)
        assert fold.collapsed
        assert fold.title == "thinking 0.8 s, 20 tokens"
        await post(app, pilot, thought(engine, "m.", 34, 1.21), answer(engine, "\n\nIt is "))
        assert fold.title == "thought 1.2 s, 34 tokens"
        assert shown(app.query_one(Markdown)) == [("MarkdownParagraph", "It is")]
        await post(app, pilot, answer(engine, "**4**."), Ended(engine.number, "stop"))
        assert shown(app.query_one(Markdown)) == [("MarkdownParagraph", "It is 4.")]
        assert app.query_one(AssistantTurn).thought == "hmm."
        assert len(status(app)) <= size[0] - 2
        for part in ("fake", "read 500", "write 99 tok/s", "first 0.12 s", "24/", "1.5", "GB"):
            assert part in status(app)
        await say(pilot, "more")
        assert engine.asked[1] == ["hi there", "It is **4**.", "more"]

    chat(script, size)


@pytest.mark.parametrize("size", SIZES)
def test_everything_has_its_place(size):
    async def script(app, engine, pilot):
        await say(pilot, "hi")
        await post(app, pilot, answer(engine, "line\n\n" * 60), Ended(engine.number, "stop"))
        turns, prompt, line = (app.query_one(kind).region for kind in (Turns, Prompt, StatusLine))
        assert turns.bottom == prompt.y
        assert prompt.bottom == line.y == size[1] - 2
        assert turns.width == prompt.width == size[0]
        assert turns.height == size[1] - 5

    chat(script, size)


def test_the_end_stays_in_view_until_the_user_scrolls():
    async def script(app, engine, pilot):
        turns = app.query_one(Turns)
        await say(pilot, "hi")
        await post(app, pilot, answer(engine, "line\n\n" * 40))
        assert turns.is_vertical_scroll_end
        await pilot.press("pageup")
        await post(app, pilot, answer(engine, "line\n\n" * 40))
        assert not turns.is_vertical_scroll_end
        await post(app, pilot, Ended(engine.number, "stop"))
        await say(pilot, "more")
        await post(app, pilot, answer(engine, "line\n\n" * 40))
        assert turns.is_vertical_scroll_end

    chat(script)


def test_the_thought_opens_and_grows():
    async def script(app, engine, pilot):
        await say(pilot, "hi")
        await post(app, pilot, thought(engine, "first [b]", 2, 0.1))
        await pilot.click("CollapsibleTitle")
        await post(app, pilot, thought(engine, " second", 3, 0.2))
        view = app.query_one("Collapsible Contents Static")
        assert view.region.height == 1
        assert str(view.render()) == "first [b] second"

    chat(script)


def test_without_a_thought_there_is_no_fold():
    async def script(app, engine, pilot):
        await say(pilot, "hi")
        await post(app, pilot, answer(engine, "hello"), Ended(engine.number, "stop"))
        assert not app.query_one(Collapsible).display

    chat(script)


@pytest.mark.parametrize("size", SIZES)
def test_escape_stops_and_keeps(size):
    async def script(app, engine, pilot):
        await say(pilot, "hi")
        await post(app, pilot, answer(engine, "half an ans"))
        await pilot.press("escape")
        assert engine.stops == 1
        await post(app, pilot, Ended(engine.number, "stopped"))
        assert shown(app.query_one(Markdown)) == [("MarkdownParagraph", "half an ans")]
        assert str(app.query_one(".note").render()) == "stopped"
        await say(pilot, "on")
        assert engine.asked[-1] == ["hi", "half an ans", "on"]

    chat(script, size)


def test_a_question_stopped_before_any_text_returns_to_the_prompt():
    async def script(app, engine, pilot):
        await say(pilot, "hi")
        await post(app, pilot, Ended(engine.number, "stopped"))
        assert app.query_one(Prompt).text == "hi"
        assert not app.query(UserTurn)
        assert app.conversation == []

    chat(script)


def test_many_small_pieces_show_what_one_large_one_shows():
    text = "# Sum\n\nIt *is*:\n\n1. one\n2. `two`\n\n```python\nx = 1\n\ny = 2\n```\n\n> so\n\n" * 3 + "- end"

    async def script(app, engine, pilot):
        await say(pilot, "hi")
        await post(app, pilot, *(answer(engine, c) for c in text), Ended(engine.number, "stop"))
        streamed = app.query_one(Markdown)
        whole = Markdown(text)
        await app.query_one(Turns).mount(whole)
        await pilot.pause()
        assert streamed.source == text
        assert shown(streamed) == shown(whole)

    chat(script)


def test_control_characters_do_not_reach_the_terminal():
    nasty = "a\x1b[2Jb\x9b2Jc\x07d\r\n\n```\n\x1b]0;title\x07\n```\n"

    async def script(app, engine, pilot):
        app.post_message(Prompt.Sent(nasty))
        await pilot.pause()
        await post(app, pilot, thought(engine, nasty, 3, 0.1), answer(engine, nasty), Ended(engine.number, "stop"))
        app.query_one(Collapsible).collapsed = False
        await pilot.pause(0.1)
        text = "".join(segment.text for line in app.screen._compositor.render_strips() for segment in line)
        assert text.count("[2J") == 3
        assert text.isprintable()
        assert app.conversation[-1]["content"] == nasty

    chat(script, SIZES[1])


def test_enter_sends_and_other_keys_start_a_line():
    async def script(app, engine, pilot):
        await pilot.press("a", "ctrl+j", "b", "shift+enter", "c")
        assert app.query_one(Prompt).size.height == 3
        await pilot.press("enter")
        await pilot.pause()
        assert engine.asked == [["a\nb\nc"]]
        assert app.query_one(Prompt).text == ""

    chat(script)


def test_a_burst_of_keys_is_taken_in_order():
    async def script(app, engine, pilot):
        for c in "hi\rmore\nlines\r":
            app.post_message(events.Key({"\r": "enter", "\n": "ctrl+j"}.get(c, c), c))
        await pilot.pause(0.1)
        assert engine.asked == [["hi"]]
        assert app.query_one(Prompt).text == "more\nlines"

    chat(script)


def test_a_paste_is_cleaned_and_keeps_its_lines():
    async def script(app, engine, pilot):
        app.post_message(events.Paste("a\x1b[2Jb\rc\r\nd\te"))
        await pilot.pause()
        assert app.query_one(Prompt).text == "a\ufffd[2Jb\nc\nd\te"
        assert engine.asked == []

    chat(script)


def test_nothing_is_sent_while_an_answer_runs_or_without_text():
    async def script(app, engine, pilot):
        await say(pilot, " ")
        assert engine.asked == []
        await say(pilot, "one")
        await say(pilot, "two")
        assert engine.asked == [["one"]]
        assert app.query_one(Prompt).text == "two"

    chat(script)


@pytest.mark.parametrize("size", SIZES)
def test_a_new_conversation_is_empty(size):
    async def script(app, engine, pilot):
        await say(pilot, "hi")
        await post(app, pilot, answer(engine, "hello"), Ended(engine.number, "stop"))
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert not app.query("UserTurn, AssistantTurn")
        assert app.query_one("#greeting").display
        await say(pilot, "again")
        assert engine.asked[-1] == ["again"]

    chat(script, size)


def test_an_abandoned_answer_does_not_reach_the_next_conversation():
    async def script(app, engine, pilot):
        await say(pilot, "old")
        await post(app, pilot, answer(engine, "old answer"))
        late = [answer(engine, " goes on"), Ended(engine.number, "stopped"), Failed("[x] late", engine.number)]
        await pilot.press("ctrl+n")
        assert engine.stops == 1
        await post(app, pilot, *late)
        await say(pilot, "new")
        await post(app, pilot, *late)
        assert app.query_one(AssistantTurn).is_blank
        await post(app, pilot, answer(engine, "fresh"), Ended(engine.number, "stop"))
        assert [m["content"] for m in app.conversation] == ["new", "fresh"]

    chat(script)


@pytest.mark.parametrize("size", SIZES)
def test_a_failure_is_notified_and_the_question_returns_to_the_prompt(size):
    async def script(app, engine, pilot):
        await say(pilot, "hi")
        await post(app, pilot, Failed("[prompt] too long [really]", engine.number))
        assert "[prompt] too long [really]" in str(app.query_one(Toast).render())
        assert app.query_one(Toast).region.bottom <= app.query_one(Prompt).region.y
        assert app.query_one(Prompt).text == "hi"
        await pilot.press("enter")
        await pilot.pause()
        assert engine.asked == [["hi"], ["hi"]]

    chat(script, size)


def test_a_failure_halfway_keeps_what_was_written():
    async def script(app, engine, pilot):
        await say(pilot, "hi")
        await post(app, pilot, answer(engine, "half"), Failed("[engine] no", engine.number))
        assert [m["content"] for m in app.conversation] == ["hi", "half"]

    chat(script)


def test_without_a_model_nothing_can_be_sent():
    async def script(app, engine, pilot):
        assert "loading the model" in status(app)
        await say(pilot, "early")
        await post(app, pilot, Failed("[hub] no such folder"))
        assert "no model" in status(app)
        assert app.query_one(Prompt).disabled
        assert app.query_one(Prompt).text == "early"

    chat(script, engine=FakeEngine(loads=False))


@pytest.mark.parametrize("size", SIZES)
def test_quit_while_an_answer_runs(size):
    async def script(app, engine, pilot):
        await say(pilot, "hi")
        await post(app, pilot, answer(engine, "half"))
        await pilot.press("ctrl+q")
        await pilot.pause()
        assert not app.is_running

    engine = FakeEngine()
    assert chat(script, size, engine).return_code == 0
    assert engine.stops == 1


def test_themes_switch():
    async def script(app, engine, pilot):
        assert app.current_theme.dark
        await pilot.press("ctrl+t")
        assert not app.current_theme.dark
        await pilot.press("ctrl+t")
        assert app.current_theme.dark

    chat(script)


@pytest.mark.parametrize(("wide", "columns"), [(True, 86), (False, 63)])
def test_large_figures_fit(wide, columns):
    f = Figures(9999.0, 999.0, 9.99, 131_072, 99.99)
    assert len(figures_text(f, 131_072, wide)) <= columns
    assert "131" in figures_text(f, 131_072, wide)


def event(thinking="", text="", n=1):
    figures = {"prompt_tps": 5.0, "generation_tps": 9.0, "time_to_first_token_s": 0.1, "peak_memory": 1.0}
    counts = {"cached_tokens": 3, "prompt_tokens": 7, "generation_tokens": n}
    return SimpleNamespace(
        thinking=bool(thinking), thinking_text=thinking, answer_text=text, finish_reason=None, **figures, **counts
    )


def test_a_batch_gathers_text_and_counts_the_whole_thought():
    now = [10.0]
    batch = Batch(7, clock=lambda: now[0])
    assert batch.is_due()
    batch.add(event("a"))
    batch.take()
    for n, (at, e) in enumerate([(10.01, event("b")), (10.04, event("c", n=2)), (11.5, event(text="d", n=3))]):
        assert batch.is_due() == (n == 3)
        now[0] = at
        batch.add(e)
    piece = batch.take()
    assert (piece.number, piece.thinking_text, piece.answer_text, piece.thinking_tokens) == (7, "bc", "d", 3)
    assert piece.thinking_s == pytest.approx(0.04)
    assert piece.figures.context_tokens == 13


class Session:
    """A real engine whose messages the test reads."""

    def __init__(self, **settings):
        self.posted, self.number = queue.Queue(), 0
        self.engine = Engine(Settings(**settings))

    def __enter__(self):
        self.engine.start(self.posted.put)
        self.loaded = self.posted.get(timeout=60)
        return self

    def __exit__(self, *_):
        assert self.engine.close(timeout_s=60)

    def ask(self, text):
        self.number += 1
        self.engine.ask(self.number, [{"role": "user", "content": text}])

    def read(self):
        found = [self.posted.get(timeout=60)]
        while not isinstance(found[-1], Ended | Failed):
            found.append(self.posted.get(timeout=60))
        return found


def test_the_engine_answers(chat_folder):
    with Session(model=str(chat_folder), max_tokens=5, temp=0.0, system_prompt="Be brief.") as s:
        assert (s.loaded.name, s.loaded.context) == ("ring-random", 2048)
        s.ask("hi")
        found = s.read()
        assert isinstance(found[0], Reading)
        assert any(isinstance(m, Piece) for m in found)
        assert found[-1].reason in ("stop", "length")
        assert {m.number for m in found} == {1}


def test_the_engine_stops_between_tokens(monkeypatch):
    def endless(messages, progress):
        progress(0, 7)
        yield from (event(text="x", n=n) for n in range(1, 1_000_000))

    posted, engine = queue.Queue(), Engine(Settings())
    monkeypatch.setattr(engine, "_load", lambda: endless)
    engine.ask(1, [])
    engine.start(posted.put)
    while not isinstance(posted.get(timeout=60), Piece):
        pass
    engine.stop()
    while isinstance(found := posted.get(timeout=60), Piece):
        pass
    assert found == Ended(1, "stopped")
    assert engine.close(timeout_s=60)
    engine._thread.join(timeout=0.3)
    assert engine._thread.is_alive()  # at rest, for the reason that the engine's docstring gives


def test_the_engine_stops_while_it_reads_and_goes_on(chat_folder):
    with Session(model=str(chat_folder), max_tokens=5) as s:
        s.ask("hi")
        s.engine.stop()
        found = s.read()
        assert found[-1] == Ended(1, "stopped")
        assert not any(isinstance(m, Piece) for m in found)
        s.ask("word " * 3000)
        (failed,) = s.read()
        assert failed.number == 2
        assert "exceed the context of 2048" in failed.text
        s.ask("hi")
        assert s.read()[-1].reason in ("stop", "length")


def test_the_engine_reports_what_cannot_be_loaded():
    with Session(model="./nowhere") as s:
        assert isinstance(s.loaded, Failed)
        assert s.loaded.number is None
        assert s.loaded.text.startswith("[hub] no such folder")


def test_the_engine_outlives_an_error_that_nobody_foresaw(monkeypatch, chat_folder):
    with Session(model=str(chat_folder), max_tokens=2) as s:
        monkeypatch.setattr(s.engine, "_write", lambda *_: 1 / 0)
        s.ask("hi")
        (failed,) = s.read()
        assert failed.text == "[engine] ZeroDivisionError: division by zero; please report this."
        monkeypatch.undo()
        s.ask("hi")
        assert isinstance(s.read()[-1], Ended)


EXIT = """
import queue
from tui.engine import Engine, Settings
from tui.messages import {until}
posted, engine = queue.Queue(), Engine(Settings(max_tokens={tokens}))
engine.start(posted.put)
engine.ask(1, [dict(role="user", content="hi")])
while not isinstance(posted.get(timeout=60), {until}):
    pass
assert engine.close(60)
"""


@pytest.mark.parametrize(("until", "tokens"), [("Loaded", 5), ("Piece", 5000), ("Ended", 5)])
def test_the_process_exits_cleanly(until, tokens):
    code = EXIT.format(until=until, tokens=tokens)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_close_says_that_a_load_is_still_running(monkeypatch):
    engine, gate, loaded = Engine(Settings()), threading.Event(), threading.Event()
    monkeypatch.setattr(engine, "_load", lambda: (loaded.set(), gate.wait(60)))
    engine.start(lambda message: None)
    assert loaded.wait(60)
    assert not engine.close(timeout_s=0.01)
    gate.set()
    assert engine.close(timeout_s=60)


def parse(*argv):
    parser = ArgumentParser(exit_on_error=False)
    command.add(parser.add_subparsers())
    return parser.parse_args(["chat", *argv])


def test_the_command_needs_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    args = parse()
    assert (args.max_tokens, args.temp, args.top_p) == (2048, 0.6, 1.0)
    with pytest.raises(RingError, match=r"^\[option\] chat needs a terminal; use ring-mlx generate$"):
        args.run(args)


@pytest.mark.parametrize("option", ["--max-tokens=0", "--temp=-1", "--top-p=1.5", "--top-p=nan", "--thinking-budget=x"])
def test_the_command_refuses_bad_numbers(option, capsys):
    with pytest.raises(SystemExit):
        parse(option)
    assert option.split("=")[0] in capsys.readouterr().err


def test_only_public_names_of_ring_mlx_and_never_mlx():
    paths = sorted(Path(tui.__file__).parent.rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module == "ring_mlx":
                assert set(names) <= set(ring_mlx.__all__), path
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else names
                assert not [m for m in modules if m.split(".")[0] in ("ring_mlx", "mlx", "mlx_lm", "metal_kernels")], (
                    path
                )
