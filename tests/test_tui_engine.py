"""The engine's thread with a made-up source and with a real session; the batch; the command line; who may import what."""

from __future__ import annotations

import ast
import gc
import io
import queue
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

import ring_mlx
import tui
from ring_mlx import End, RingError, Session, Thinking, load
from ring_mlx.cli import build_parser
from ring_mlx.engine.branches import Renderer
from ring_mlx.model.memory import budget_bytes
from tests.tui_pilot import SIZES, pause
from tests.tui_pilot import chat as pilot
from tui import chat, commands
from tui.answering import SHORTEN, Engine, StoppedError, Updates
from tui.app import RingChat
from tui.config import Config
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Ended, Failed, Figures, Loaded, Loading, ModelChoice, Piece, Question, Reading, Sampling
from tui.plain import Plain
from tui.screens.chat import ChatScreen
from tui.store import Call


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))


def test_a_batch_gathers_text_and_counts_the_whole_thought():
    now = [10.0]
    batch = Updates(7, clock=lambda: now[0])
    assert batch.is_due()
    batch.add("a", "", True, Figures(generated_tokens=1))
    batch.take()
    for n, (at, thinking, answer) in enumerate([(10.01, "b", ""), (10.04, "c", ""), (11.5, "", "d")]):
        assert batch.is_due() == (n == 3)
        now[0] = at
        batch.add(thinking, answer, bool(thinking), Figures(generated_tokens=n + 2))
    piece = batch.take()
    assert (piece.number, piece.thinking_text, piece.answer_text, piece.figures.thinking_tokens) == (7, "bc", "d", 3)
    assert piece.figures.thinking_s == pytest.approx(0.04)
    assert piece.figures.generated_tokens == 4
    assert batch.take().answer_text == ""


class Source:
    """A source that does what the test says."""

    def __init__(self, name, answer):
        self.name, self._answer, self.is_closed, self.stops = name, answer, False, 0

    def answer(self, question, stopped, post):
        return self._answer(question, stopped, post)

    def stop(self):
        self.stops += 1

    def close(self):
        self.is_closed = True


class Running:
    """An engine whose messages the test reads."""

    def __init__(self, choice=None, load=None):
        self.posted, self.number = queue.Queue(), 0
        self.engine = Engine(choice, load)

    def __enter__(self):
        self.engine.start(self.posted.put)
        return self

    def __exit__(self, *_):
        assert self.engine.close(timeout_s=60)

    def next(self):
        return self.posted.get(timeout=60)

    def until(self, *kinds):
        found = [self.next()]
        while not isinstance(found[-1], kinds):
            found.append(self.next())
        return found

    def ask(self, *messages, continues=False, **sampling):
        self.number += 1
        named = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(messages)]
        self.engine.ask(Question(self.number, named, Sampling(**{"max_tokens": 5, **sampling}), continues))

    def read(self):
        return self.until(Ended, Failed)


def loader(answer, made):
    def load(choice, post):
        if choice.path == "bad":
            raise RingError("no such folder")
        made.append(Source(choice.path, answer))
        post(Loaded(str(choice.path), 10))
        return made[-1]

    return load


def endless(question, stopped, post):
    while not stopped.wait(0.001):
        post(Piece(question.number, "", "x", Figures()))
    return Ended(question.number, "stopped")


def test_the_engine_stops_between_tokens_and_ends():
    made = []
    with Running(load=loader(endless, made)) as r:
        r.ask("hi")
        r.until(Piece)
        r.engine.stop()
        assert r.read()[-1] == Ended(1, "stopped")
    assert made[0].is_closed
    assert made[0].stops
    assert not r.engine._thread.is_alive()


def test_a_question_stopped_while_it_waits_is_never_read():
    def read(question, stopped, post):
        raise StoppedError

    gate = threading.Event()

    def load(choice, post):
        gate.wait(60)
        return Source("", read)

    with Running(load=load) as r:
        r.ask("hi")
        r.engine.stop()
        gate.set()
        assert r.next() == Ended(1, "stopped")
        r.ask("again")
        assert r.next() == Ended(2, "stopped")


def test_what_stays_is_left_out_of_garbage_collection_while_there_is_a_model():
    gc.unfreeze()  # what others have left out
    left = []

    def load(choice, post):
        cycle = Source("", None)
        cycle.itself = cycle
        left.append(weakref.ref(cycle))
        return loader(endless, [])(choice, post)

    with Running(load=load) as r:
        r.ask("hi")
        r.until(Piece)
        assert gc.get_freeze_count()
        assert left[0]() is None
        r.engine.stop()
    assert not gc.get_freeze_count()


def test_switching_frees_the_old_model_and_a_bad_choice_brings_it_back():
    made = []
    with Running(ModelChoice("one"), loader(endless, made)) as r:
        assert r.next().name == "one"
        r.ask("hi")
        r.engine.switch(ModelChoice("two"))
        assert r.until(Loaded)[-1].name == "two"
        assert made[0].is_closed
        r.engine.switch(ModelChoice("bad"))
        assert r.next() == Failed("[ring] no such folder")
        assert r.next().name == "two"
        assert made[1].is_closed
        assert not made[2].is_closed


def test_rules_for_thoughts_hold_for_the_next_model_too():
    chosen, rules = [], Thinking("open", 9)

    def load(choice, post):
        chosen.append((choice.path, choice.thinking))
        return loader(endless, [])(choice, post)

    with Running(ModelChoice("one", thinking=rules), load) as r:
        r.until(Loaded)
        r.engine.switch(ModelChoice("two"))
        r.until(Loaded)
    assert chosen == [("one", rules), ("two", rules)]


def test_without_a_model_questions_fail_and_a_choice_mends_it():
    with Running(ModelChoice("bad"), loader(endless, [])) as r:
        assert r.next() == Failed("[ring] no such folder")
        r.ask("hi")
        assert r.next() == Failed("[model] no model is loaded; choose one with /model.", 1)
        r.engine.switch(ModelChoice("good"))
        assert r.next().name == "good"


def test_the_engine_outlives_an_error_that_nobody_foresaw():
    with Running(load=loader(lambda *_: 1 / 0, [])) as r:
        r.until(Loaded)
        r.ask("hi")
        assert r.next().text == "[engine] ZeroDivisionError: division by zero; please report this."
        r.ask("hi")
        assert r.next().number == 2


def test_close_says_that_a_load_is_still_running():
    gate, loading = threading.Event(), threading.Event()

    def load(choice, post):
        loading.set()
        gate.wait(60)
        return Source("", endless)

    engine = Engine(load=load)
    engine.start(lambda message: None)
    assert loading.wait(60)
    assert not engine.close(timeout_s=0.01)
    gate.set()
    assert engine.close(timeout_s=60)


def test_a_session_answers_and_reuses_what_it_has_read(chat_folder):
    with Running(ModelChoice(str(chat_folder))) as r:
        assert isinstance(r.next(), Loading)
        (loaded,) = r.until(Loaded)[-1:]
        assert (loaded.name, loaded.context) == ("ring-random", 2048)
        assert loaded.memory_limit_bytes == budget_bytes() > 0
        r.ask("hi " * 50, temp=0.0)
        found = r.read()
        assert isinstance(found[0], Reading)
        assert any(isinstance(m, Piece) for m in found)
        assert found[-1].reason in ("stop", "length")
        assert {m.number for m in found} == {1}
        first = found[-1].figures
        assert first.generated_tokens <= 5
        assert first.seed is not None
        r.ask("hi " * 50, temp=0.0)
        again = r.read()[-1].figures
        assert again.reused_tokens > first.reused_tokens
        assert again.prompt_tokens == first.prompt_tokens
        r.ask("hi", "half an answer", continues=True)
        assert r.read()[-1].reason in ("stop", "length")
        r.ask("word " * 3000)
        (failed,) = [m for m in r.read() if isinstance(m, Failed)]
        assert failed.text.endswith(f" exceed the context of 2048; {SHORTEN}")
        r.ask("hi", max_tokens=1500)
        r.until(Piece)
        r.engine.stop()
        assert r.read()[-1].reason in ("stopped", "stop")


def test_experts_on_demand_give_the_same_answer_also_after_a_switch(chat_folder, monkeypatch):
    class Made(Session):
        info = None

        def __init__(self, *args, **options):
            Made.info = options["expert_cache_bytes"]
            super().__init__(*args, **options)

    def answer(r):
        r.until(Loaded)
        r.ask("hi", temp=0.0, max_tokens=12)
        return "".join(m.thinking_text + m.answer_text for m in r.read() if isinstance(m, Piece))

    monkeypatch.setattr("tui.answering.Session", Made)
    with Running(ModelChoice(str(chat_folder))) as r:
        whole = answer(r)
        assert Made.info is None
    with Running(ModelChoice(str(chat_folder), expert_cache_bytes=200_000)) as r:
        assert answer(r) == whole != ""
        r.engine.switch(ModelChoice(str(chat_folder)))
        assert answer(r) == whole
        assert Made.info == 200_000
        r.engine.switch(ModelChoice(str(chat_folder), expert_cache_bytes=1))
        (failed,) = r.until(Failed)[-1:]
        assert failed.text.startswith("[option] --expert-cache-bytes 1 is too little")


def test_the_same_seed_gives_the_same_answer(chat_folder):
    def answer(r, seed):
        r.ask("hi", temp=1.0, max_tokens=12, seed=seed)
        found = r.read()
        text = "".join(m.thinking_text + m.answer_text for m in found if isinstance(m, Piece))
        return text, found[-1].figures.seed

    with Running(ModelChoice(str(chat_folder))) as r:
        r.until(Loaded)
        (first, seed), (other, _) = answer(r, None), answer(r, None)
        assert answer(r, seed) == (first, seed)
        assert other != first


def vanish(folder):
    """Remove a model; its files are emptied first, so that nothing can be read through a handle still open."""
    for file in folder.iterdir():
        file.write_bytes(b"")
    shutil.rmtree(folder)


def test_a_folder_that_vanishes_after_loading_costs_nothing(chat_folder, tmp_path):
    folder = shutil.copytree(chat_folder, tmp_path / "ring")
    with Running(ModelChoice(str(folder))) as r:
        r.until(Loaded)
        vanish(folder)
        r.ask("hi", temp=0.0)
        here = r.read()
    with Running(ModelChoice(str(chat_folder))) as r:
        r.until(Loaded)
        r.ask("hi", temp=0.0)
        there = r.read()
    texts = [[m.thinking_text + m.answer_text for m in found if isinstance(m, Piece)] for found in (here, there)]
    assert "".join(texts[0]) == "".join(texts[1]) != ""
    assert here[-1].reason == there[-1].reason


def test_a_folder_that_vanishes_before_a_switch_is_named_and_the_chat_goes_on(chat_folder, tmp_path):
    mine, other = (shutil.copytree(chat_folder, tmp_path / name) for name in ("mine", "other"))
    vanish(other)
    engine = Engine(ModelChoice(str(mine)))

    async def until(d, true):
        for _ in range(600):
            if true():
                return
            await pause(0.05)
        raise AssertionError(d.screen_text)

    async def script(d):
        await until(d, lambda: d.chat.model.context)
        await d.say("one")
        await until(d, lambda: d.chat.answer is None)
        before = d.said
        await d.command(f"/model {other}")
        await until(d, lambda: d.toasts)
        assert f"[hub] no such folder '{other}'" in d.toasts[0]
        await until(d, lambda: d.chat.model.name == "mine")
        assert d.said == before
        await d.say("two")
        await until(d, lambda: len(d.said) == 4 and d.chat.answer is None)
        vanish(mine)
        await d.command(f"/model {other}")
        await until(d, lambda: "no model" in d.status)
        assert f"[hub] no such folder '{mine}'" in d.toasts[-1]
        assert d.said[:2] == before
        assert len(d.said) == 4
        await d.command(f"/model {chat_folder}")
        await until(d, lambda: d.chat.model.name == chat_folder.name)

    pilot(script, SIZES[1], engine=engine, config=Config(sampling=Sampling(max_tokens=5)))
    assert engine.close(60)


def test_a_stored_tool_call_goes_back_in_the_templates_form(chat_folder):
    talk = Conversation()
    talk.add("user", "add one")
    talk.add("assistant", "I call.").calls = (Call("add", {"a": 1}),)
    talk.add("user", "and?")
    text = Renderer(load(chat_folder)[1], None, None, False).text(talk.messages())
    assert 'I call.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text


def test_a_session_reports_what_cannot_be_loaded():
    with Running(ModelChoice("./nowhere")) as r:
        (failed,) = r.until(Failed)[-1:]
        assert failed.number is None
        assert failed.text.startswith("[hub] no such folder")


EXIT = """
import queue
from tui.answering import Engine
from tui.messages import {until}, Question, Sampling
posted, engine = queue.Queue(), Engine()
engine.start(posted.put)
engine.ask(Question(1, [dict(role="user", content="What is 3 + 4?")], Sampling(max_tokens={tokens})))
while not isinstance(posted.get(timeout=60), {until}):
    pass
assert engine.close(60)
"""


@pytest.mark.parametrize(("until", "tokens"), [("Loaded", 5), ("Piece", 5000), ("Ended", 5)])
def test_the_process_exits_cleanly(until, tokens):
    code = EXIT.format(until=until, tokens=tokens)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def parse(*argv):
    return build_parser().parse_args(["chat", *argv])


def test_the_command_needs_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    args = parse()
    with pytest.raises(RingError, match=r"^\[option\] chat needs a terminal; use ring-mlx chat --plain or"):
        args.run(args)


def test_options_come_before_the_configuration():
    config = chat.with_options(Config(model="m", system_prompt="s"), parse("--temp=0", "--seed=3", "--model=x"))
    assert (config.sampling.temp, config.sampling.seed, config.sampling.top_p) == (0.0, 3, None)
    assert (config.model, config.system_prompt) == ("x", "s")
    assert parse().expert_cache_bytes is None
    assert parse("--expert-cache-bytes", "1.5GB").expert_cache_bytes == 1_500_000_000


class Silent:
    """A session that hears what it is made with and asked, and answers nothing."""

    heard: ClassVar[list[dict[str, object]]] = []
    counters = ring_mlx.Counters()

    def __init__(self, model, on_loading, **options):
        self.heard.append({"model": model, **options})

    def wait_until_loaded(self):
        return SimpleNamespace(
            quantization="none", context_tokens=10, memory_limit_bytes=0, sampling=ring_mlx.Sampling()
        )

    def send(self, messages, **options):
        self.heard.append(options)
        return iter([End("stop")])

    def stop(self):
        pass

    close = stop


def test_options_reach_the_session(monkeypatch):
    class Chosen(Exception):
        pass

    def engine(choice):
        raise Chosen(choice)

    monkeypatch.setattr("tui.chat.Engine", engine)
    monkeypatch.setattr("tui.answering.Session", Silent)
    monkeypatch.setattr(Silent, "heard", [])
    args = parse("--plain", "--adapter-path=a", "--prefill-step-size=7", "--xtc-probability=0.5", "--xtc-threshold=0")
    with pytest.raises(Chosen) as caught:
        chat.run(args)
    sampling = chat.with_options(Config(), args).sampling
    with Running(caught.value.args[0]) as r:
        r.until(Loaded)
        r.engine.ask(Question(1, [{"role": "user", "content": "hi"}], sampling))
        r.until(Ended)
        r.engine.ask(Question(2, [{"role": "user", "content": "hi"}], Sampling()))
        r.until(Ended)
        r.engine.switch(ModelChoice("other"))
        r.until(Loaded)
    made, asked, plain, switched = Silent.heard
    assert (made["model"], made["adapter_path"], made["prefill_step_tokens"]) == (None, "a", 7)
    assert (asked["sampling"].xtc_probability, asked["sampling"].xtc_threshold) == (0.5, 0.0)
    assert plain["sampling"] == ring_mlx.Sampling()
    assert (switched["model"], switched["adapter_path"], switched["prefill_step_tokens"]) == ("other", None, 7)


@pytest.mark.parametrize(
    "option",
    ["--max-tokens=0", "--temp=-1", "--top-p=1.5", "--top-p=nan", "--thinking-budget=x", "--expert-cache-bytes=lots"],
)
def test_the_command_refuses_bad_numbers(option, capsys):
    with pytest.raises(SystemExit):
        parse(option)
    assert option.split("=")[0] in capsys.readouterr().err


def test_every_command_can_be_carried_out_and_none_is_missing_from_the_table():
    app = RingChat(Engine(), Keeper(None, print))
    for c in commands.COMMANDS:
        assert callable(app.chat.method_of(c)), c.name
        assert c.help
    for kind, wanted in ((ChatScreen, commands.COMMANDS), (Plain, [c for c in commands.COMMANDS if c.plain])):
        assert {m.removeprefix("do_") for m in dir(kind) if m.startswith("do_")} == {c.name for c in wanted}
    keys = [k for c in commands.COMMANDS for k in c.key.split(",") if k]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("text", "name", "argument"),
    [
        ("/new", "new", ""),
        ("/go 12", "go", "12"),
        ("/exp md x y.md", "export", "md x y.md"),
        ("/th", None, ""),
        ("/", None, ""),
    ],
)
def test_commands_are_split(text, name, argument):
    found = commands.split(text)
    assert (found and (found[0].name, found[1])) == (name and (name, argument))


def test_only_public_names_of_ring_mlx_and_never_mlx():
    paths = sorted(Path(tui.__file__).parent.rglob("*.py"))
    assert len(paths) > 40
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module == "ring_mlx":
                assert set(names) <= set(ring_mlx.__all__), path
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else names
                roots = {m.split(".")[0] for m in modules if m}
                assert not roots & {"ring_mlx", "mlx", "mlx_lm", "metal_kernels"}, path


def test_the_store_and_the_conversation_know_no_screen():
    for path in [*Path(tui.__file__).parent.glob("store/*.py"), Path(tui.__file__).parent / "conversation.py"]:
        assert "textual" not in path.read_text(encoding="utf-8"), path
