"""Thought and answer of every form of template at every door, whole and streamed.

docs/thoughts.md has the matrix: `FORMS` are its rows, `DOORS` its columns. Each cell is a model that says the form's text
through the door itself; wherever the text is cut, the doors' own ways of handling it are run without a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import pytest

from ring_mlx import Session
from ring_mlx.checkpoint.loading import load
from ring_mlx.cli import main
from ring_mlx.cli.exit_codes import CUT_OFF
from ring_mlx.cli.printer import Printer
from ring_mlx.engine.branches import Prepared, Prompt
from ring_mlx.engine.events import AnswerText, End, Revised, Sampling, Statistics, ThinkingText, ToolCall
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.request import Request
from ring_mlx.engine.row import Row
from ring_mlx.generation.message import MessageBuilder
from ring_mlx.generation.stream import events_of, thought_closer
from ring_mlx.generation.thinking import Thinking, splitter_after
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.protocol import ApiRequest
from ring_mlx.serve.replies import Reply
from ring_mlx.serve.server import Server
from tests.parrot import ROLE_END, make_parrot, teach
from tests.serving import TOOLS, client_of, send, user
from tests.sessions import DirectSession, options
from tests.tui_pilot import chat
from tui import paths
from tui.answering import Engine
from tui.messages import ModelChoice
from tui.store import Database, chats, turns

TEMPLATE = (
    "{{% for m in messages %}}{{{{ '<role>' + ('HUMAN' if m.role == 'user' else 'ASSISTANT') + '</role>' + m.content }}}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<role>ASSISTANT</role>{}' }}}}{{% endif %}}"
)
SAY = "The `<think>` tag."
CALL = '<tool_call>{"name": "weather", "arguments": {"of": "a <think> b </think>"}}</tool_call>'
CODE = "Not `</think>` yet.\n```\n</think>\n```\n"


class Form(NamedTuple):
    """What ends the prompt, what the model says, thought and answer, and whether a stream has to be corrected."""

    start: str
    text: str
    thought: str
    answer: str
    is_revised: bool = False
    calls: int = 0


OPEN = "<think>\n"
FORMS = {
    "prompt opens": Form(OPEN, f"hm\n</think>\n\n{SAY}", "hm", SAY),
    "model opens": Form("", f"<think>\nhm\n</think>\n\n{SAY}", "hm", SAY),
    "both open": Form(OPEN, f"<think>\nhm\n</think>\n\n{SAY}", "hm", SAY),
    "only closed": Form("", f"hm\n</think>\n\n{SAY}", "hm", SAY),
    "no thought": Form("", SAY, "", SAY, True),
    "prompt closes": Form("<think>\n\n</think>\n\n", f"{SAY} </think>", "", f"{SAY} </think>"),
    "empty thought": Form(OPEN, f"\n</think>\n\n{SAY}", "", SAY),
    "closed thrice": Form("", f"hm</think>a </think> <think>b</think>{SAY}", "hm", f"a </think> <think>b</think>{SAY}"),
    "blank lines": Form("", f"hm.\n\n\n</think> \n\n  {SAY}", "hm.", f"  {SAY}"),
    "CRLF": Form("", f"hm\r\n</think>\r\n\r\n{SAY}\r\nSo.", "hm", f"{SAY}\r\nSo."),
    "code": Form(OPEN, f"{CODE}</think>\n\n{SAY}", CODE.strip(), SAY),
    "only in code": Form(OPEN, f"```\nhm\n</think>\n\n{SAY}", "```\nhm", SAY, True),
    "code left open": Form("", f"```py\nhm\n</think>\n\n{SAY}\n```py\n1\n```", "```py\nhm", f"{SAY}\n```py\n1\n```", True),
    "a call is mentioned": Form("", f"Use <tool_call> {{\n</think>\n\n{SAY}", "Use <tool_call> {", SAY),
    "never closed": Form(OPEN, "hm", "hm", ""),
    "call in a thought": Form(OPEN, f"hm{CALL}\n</think>\n\n{CALL}", f"hm{CALL}", CALL, calls=1),
    "call in an unopened thought": Form("", f"hm{CALL}\n</think>\n\n{CALL}", f"hm{CALL}", CALL, calls=1),
    "call without a thought": Form("", CALL, "", CALL, True, calls=1),
}  # fmt: skip
ON_SCREEN = ("prompt opens", "only closed", "no thought", "only in code", "code left open", "never closed")
LONG = [f" w{n}" for n in range(100)]
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def middle(text):
    return [text[: len(text) // 2], text[len(text) // 2 :]]


def final(events):
    """Thought, answer, calls and whether it was revised, as a reader of a session's events has them."""
    thought, answer, calls, revised = "", "", [], False
    for e in events:
        if isinstance(e, Revised):
            assert not calls, "a call cannot be taken back"
            thought, answer, calls, revised = e.thought, "", [], True
        elif isinstance(e, ThinkingText):
            thought += e.text
        elif isinstance(e, AnswerText):
            answer += e.text
        elif isinstance(e, ToolCall):
            calls.append(e)
    return thought, answer, calls, revised


class Harness:
    """One model behind every door, which is taught what to say; what a door gives for a form is asked for once."""

    def __init__(self, folder):
        texts = [half for f in FORMS.values() for half in middle(f.text)]
        texts += [*middle(" so\n</think>\n\n42"), "42", "hm", "</think>", "<think>"]
        self.folder = make_parrot(folder / "model", LONG, spare=sorted({*texts}))
        self.home = folder
        self.model, self.tokenizer = load(self.folder)
        self.said = 0

    def say(self, start, pieces):
        """Set how the prompt ends and what the model says; no two prompts are alike, so that none is known."""
        self.tokenizer.chat_template = TEMPLATE.format(start.replace("\n", "\\n"))
        teach(self.model, self.tokenizer, pieces)
        self.said += 1
        return f"hi {self.said}"

    @cache  # noqa: B019 as long as the module
    def generate(self, form, view):
        """Standard output and error."""
        f = FORMS[form]
        flags = ["--json"] if view == "--json" else ["--verbose", "False", "--thinking", view]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["generate", "--model", str(self.folder), "-p", self.say(f.start, middle(f.text)), *flags])
        assert code == 0
        return out.getvalue(), err.getvalue()

    @cache  # noqa: B019
    def session(self, form):
        """The events."""
        f = FORMS[form]
        question = user(self.say(f.start, middle(f.text)))
        return list(self.open_session.send(question, sampling=Sampling(temp=0), tools=TOOLS if f.calls else None))

    @cache  # noqa: B019
    def serve(self, form):
        """The choice of the whole answer, and the choices of the stream."""
        f = FORMS[form]
        body = {"messages": user(self.say(f.start, middle(f.text))), "temperature": 0, "logprobs": True}
        body |= {"tools": TOOLS} if f.calls else {}
        whole = send(self.server, "POST", "/v1/chat/completions", body)[2]["choices"][0]
        with client_of(self.server) as client:
            pieces = list(client.chat.completions.create(model="toy", stream=True, **body))
        return whole, [p.choices[0] for p in pieces]

    @cache  # noqa: B019
    def plain(self):
        """Of one plain chat that asks all: the turn that is kept, standard output and error of each form."""
        out, err, heard = io.StringIO(), io.StringIO(), {}

        def lines():
            for form, f in FORMS.items():
                yield f"{self.say(f.start, middle(f.text))}\n"
                heard[form] = (out.getvalue(), err.getvalue())
                out.truncate(out.seek(0))
                err.truncate(err.seek(0))
                yield "/new\n"

        asked, left = io.StringIO(), lines()
        asked.readline = lambda *_: next(left, "")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", asked)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                assert main(["chat", "--plain", "--model", str(self.folder), "--temp", "0"]) == 0
        db = Database(paths.data_file("chats.db"))
        kept = [list(turns.load(db, c.id)) for c in chats.listed(db)]
        db.close()
        kept = sorted((int(question.content[3:]), answer) for question, answer in kept)
        return {form: (turn, *heard[form]) for form, (_, turn) in zip(FORMS, kept, strict=True)}

    @cache  # noqa: B019
    def screen(self):
        """Of one chat on the screen: the turn, the text shown and the fold's line of each form."""
        found = {}

        async def ask(driver):
            await driver.command("/set temp 0")
            for form in ON_SCREEN:
                await driver.say(self.say(FORMS[form].start, middle(FORMS[form].text)))
                while driver.chat.answer is not None:
                    await asyncio.sleep(0.02)
                await driver.settle()
                view = driver.chat.answer_view(driver.chat.talk.leaf)
                fold = str(view._fold.render()) if view._fold.display else ""
                found[form] = (driver.chat.talk.leaf, view.body.source, fold)

        engine = Engine(ModelChoice(str(self.folder)))
        try:
            chat(ask, engine=engine)
        finally:
            assert engine.close()
        return found


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    made = Harness(tmp_path_factory.mktemp("thoughts"))
    with pytest.MonkeyPatch.context() as patch:
        for place in ("ring_mlx.cli.from_options", "ring_mlx.engine.loaded"):
            patch.setattr(f"{place}.load", lambda *args, **options: (made.model, made.tokenizer))
        patch.setenv("RING_MLX_HOME", str(made.home))
        made.server = Server(Settings(model=made.folder, name="toy", store=False, read_ahead=False), port=0)
        made.server.start()
        with Session(made.folder, store=False, read_ahead=False) as made.open_session:
            assert made.server.engine.wait_until_loaded(30)
            yield made
        assert made.server.close()


def message_of(f):
    """The message that a form should make, as text where no tools were given."""
    answer = "" if f.calls else f.answer
    return {"role": "assistant", "content": answer} | ({"reasoning_content": f.thought} if f.thought else {})


@EVERY_FORM
@pytest.mark.parametrize("door", ["generate", "Session", "chat --plain", "serve"])
def test_whole(harness, form, door):
    f = FORMS[form]
    if door == "generate":
        out, err = harness.generate(form, "--json")
        found = json.loads(out)
        assert (found["thinking"], found["answer"], found["text"]) == (f.thought, f.answer, f.text)
        assert (found["thinking_tokens"] > 0) == (bool(f.thought) or form == "empty thought")
        assert ("the answer is empty: all 3 tokens were thought; ask again" in err) == (not f.answer)
    elif door == "Session":
        *_, statistics, end = harness.session(form)
        message = dict(end.message)
        assert len(message.pop("tool_calls", [])) == f.calls
        assert message == message_of(f)
        assert (statistics.thinking_tokens > 0) == (bool(f.thought) or form == "empty thought")
    elif door == "serve":
        message = dict(harness.serve(form)[0]["message"])
        calls = [json.loads(c["function"]["arguments"]) for c in message.pop("tool_calls", [])]
        assert calls == [{"of": "a <think> b </think>"}] * f.calls
        assert message == message_of(f) | ({"content": None} if f.calls else {})
        reason = "tool_calls" if f.calls else "stop" if f.answer else "length"
        assert harness.serve(form)[0]["finish_reason"] == reason
    else:
        kept = harness.plain()[form][0]
        assert (kept.thinking.strip(), kept.content) == (f.thought, f.answer)
        assert (kept.record.thinking_tokens > 0) == (bool(f.thought) or form == "empty thought")


@EVERY_FORM
@pytest.mark.parametrize("door", ["show", "hide", "fold", "Session", "chat --plain", "serve"])
def test_streamed(harness, form, door):
    f = FORMS[form]
    if door in ("show", "hide", "fold"):
        out, err = harness.generate(form, door)
        head, _, rest = out.partition("\n") if door == "fold" and out.startswith("[thought ") else ("", "", out)
        assert rest == f"{f.text}\n" if door == "show" else rest.strip() == f.answer.strip()
        assert (head != "") == (door == "fold" and (bool(f.thought) or form == "empty thought"))
        assert ("the answer is empty: all 3 tokens were thought; ask again" in err) == (not f.answer)
    elif door == "Session":
        thought, answer, calls, revised = final(harness.session(form))
        assert (thought.strip(), answer, revised) == (f.thought, message_of(f)["content"], f.is_revised)
        assert [c.arguments for c in calls] == [{"of": "a <think> b </think>"}] * f.calls
    elif door == "serve":
        whole, choices = harness.serve(form)
        deltas, last = [c.delta for c in choices], choices[-1]
        assert "".join(d.content or "" for d in deltas) == message_of(f)["content"]
        assert (last.finish_reason, len([c for d in deltas for c in d.tool_calls or []])) == (
            whole["finish_reason"],
            f.calls,
        )
        assert hasattr(last, "message") == f.is_revised
        told = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas).strip()
        message = getattr(last, "message", {"reasoning_content": told, "content": message_of(f)["content"]})
        assert (message.get("reasoning_content", ""), message["content"] or "") == (f.thought, message_of(f)["content"])
        assert f.text.endswith("".join(t.token for c in choices if c.logprobs for t in c.logprobs.content))
    else:
        _, out, err = harness.plain()[form]
        assert out.strip() == f.answer.strip()
        assert ("[chat] the answer is empty: all 3 tokens were thought" in err) == (not f.answer)


@pytest.mark.parametrize("form", ON_SCREEN)
def test_on_the_screen(harness, form):
    """The turn that is kept, the text that is shown, and the line that stands for the thought."""
    f, (kept, source, fold) = FORMS[form], harness.screen()[form]
    assert (kept.thinking.strip(), kept.content) == (f.thought, f.answer)
    assert source == f.answer
    assert (" token" in fold) == bool(f.thought)


def test_the_matrix_in_docs_is_this_one():
    """Its rows are the forms; a streamed cell says where a stream has to be corrected."""
    lines = (Path(__file__).parents[1] / "docs" / "thoughts.md").read_text().partition("## Matrix")[2].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == list(FORMS)
    for name, _, _, *cells in rows:
        whole, streamed = cells[::2], cells[1::2]
        assert {*whole} == {"right"}, name
        hidden = streamed.pop(0)  # `hide` and `fold` print only what is certain
        assert (hidden, {*streamed}) == ("right", {"corrected" if FORMS[name].is_revised else "right"}), name


@EVERY_FORM
def test_every_cut(harness, form):
    """The text in tokens of its own before and after each place, and letter by letter."""
    f = FORMS[form]
    prompt = "<role>HUMAN</role>hi<role>ASSISTANT</role>" + f.start
    encode = lambda text: harness.tokenizer.encode(text, add_special_tokens=False)
    cuts = [encode(f.text[:k]) + encode(f.text[k:]) for k in range(1, len(f.text), 1 + len(f.text) // 24)]
    for ids in [*cuts, [i for letter in f.text for i in encode(letter)]]:
        ids = [*ids, ROLE_END]
        splitter = splitter_after(prompt, "auto", harness.tokenizer.has_thinking)
        printer, builder, told = Printer("show", quiet=True), MessageBuilder(has_tools=bool(f.calls)), []
        steps = ((i, mx.zeros(0)) for i in ids)
        for e in events_of(steps, harness.tokenizer, splitter, len(ids) + 1, prompt_tokens=1, cached_tokens=0):
            printer.show(e)
            told += builder.add(e)
        assert (printer.thought.strip(), printer.answer.strip(), printer.text) == (f.thought, f.answer.strip(), f.text)
        thought, answer, calls, _ = final(told)
        assert (thought.strip(), answer, len(calls)) == (f.thought, message_of(f)["content"], f.calls)
        assert {k: v for k, v in builder.message().items() if k != "tool_calls"} == message_of(f)
        said = served(harness, f, Prompt(prompt, [5], None), ids)
        assert {k: v or "" for k, v in said.items() if k != "tool_calls"} == message_of(f)


def row_of(harness, request, prompt, limit, thinking=Thinking()):  # noqa: B008 a value
    """A server's row that has read its prompt."""
    loaded = LoadedModel(harness.model, harness.tokenizer, Settings(harness.folder, "toy", thinking=thinking))
    return Row(request, Prepared(prompt, None, limit), loaded)


def served(harness, f, prompt, ids):
    """The message that the server makes of tokens; its stream's content is the same."""
    request = ApiRequest(user("hi"), tools=TOOLS if f.calls else [])
    row, reply, pieces = row_of(harness, request, prompt, len(ids) + 1), Reply(request, "toy"), []
    ends = [row.take(i, mx.zeros(0)) for i in ids]
    assert [end is not None for end in ends] == [i == ROLE_END for i in ids]
    while not request.events.empty():
        pieces += reply.add(request.events.get())
    message = reply.whole(ends[-1])["choices"][0]["message"]
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == (message["content"] or "")
    return message


def endless(harness, start, pieces, limit=64, **options):
    """Tokens of the thought, and the answer, of a model that says pieces again and again, without a model."""
    tokenizer, given = harness.tokenizer, {"budget": None, "thinking": Thinking()} | options
    splitter = splitter_after(f"<role>ASSISTANT</role>{start}", "auto", tokenizer.has_thinking)
    forced = thought_closer(tokenizer, splitter, limit=limit, **given) or (lambda: None)
    said = cycle([i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)])
    ids = ((next(said) if (i := forced()) is None else i, mx.zeros(0)) for _ in range(limit))
    *_, last = found = list(events_of(ids, tokenizer, splitter, limit, prompt_tokens=1, cached_tokens=0))
    return last.thinking_tokens, (last.revised or ["", "".join(e.answer_text for e in found)])[1]


ENDLESS = {"the prompt opens": (OPEN, LONG), "the model opens": ("", ["<think>", *LONG]), "nobody opens": ("", LONG)}


@pytest.mark.parametrize("form", ENDLESS)
def test_a_thought_that_never_closes_leaves_room(harness, form):
    """By default, as much as is asked for, or none with 0: then a thought that nobody opened is told as an answer."""
    start, pieces = ENDLESS[form]
    encode = lambda text: len(harness.tokenizer.encode(text, add_special_tokens=False))
    closing = encode("\n</think>\n\n")
    after = closing - encode("\n</think>")
    tokens, answer = endless(harness, start, pieces)
    assert tokens == 48 - after
    assert answer.strip()
    assert not answer.startswith(" w0")
    assert endless(harness, start, pieces, thinking=Thinking(answer_room=20))[0] == 44 - after
    assert endless(harness, start, pieces, thinking=Thinking(answer_room=0))[0] == (0 if form == "nobody opens" else 64)
    assert endless(harness, start, pieces, budget=5)[0] == 5 + closing - after
    assert endless(harness, start, pieces, budget=0, limit=9)[0] <= 1 + closing
    talk = user(harness.say(start, pieces))
    events = list(harness.open_session.send(talk, sampling=Sampling(temp=0), max_tokens=64))
    assert next(e for e in events if isinstance(e, Statistics)).thinking_tokens == 48 - after
    body = {"messages": talk, "temperature": 0, "max_tokens": 64}
    found = send(harness.server, "POST", "/v1/chat/completions", body)[2]
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 48 - after
    assert found["choices"][0]["message"]["content"].startswith("".join(pieces[:9]))
    body |= {"messages": user(harness.say(start, pieces)), "thinking_budget": 2, "max_tokens": 20}
    found = send(harness.server, "POST", "/v1/chat/completions", body)[2]
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2 + closing - after


@pytest.mark.parametrize(("flags", "is_empty"), [(["--answer-room", "0"], True), ([], False)])
def test_generate_leaves_room(harness, flags, is_empty, capsys):
    args = ["generate", "--model", str(harness.folder), "-p", harness.say(OPEN, LONG), "-m", "64", "--thinking", "hide"]
    assert main([*args, "--verbose", "False", *flags]) == CUT_OFF
    out, err = capsys.readouterr()
    assert (out == "\n", "all 64 tokens were thought; raise --max-tokens, or" in err) == (is_empty, is_empty)


def test_a_budget_closes_the_thought_of_a_text_that_is_continued(harness):
    """Completions give the thought as text; a budget that is asked for holds there too, and none is by default."""
    prompt = f"<role>HUMAN</role>{harness.say(OPEN, LONG)}<role>ASSISTANT</role>{OPEN}"
    request = {"prompt": prompt, "temperature": 0, "max_tokens": 64}
    text = send(harness.server, "POST", "/v1/completions", request)[2]["choices"][0]["text"]
    assert text == "".join(LONG[:64])
    text = send(harness.server, "POST", "/v1/completions", request | {"thinking_budget": 3})[2]["choices"][0]["text"]
    assert text.startswith(" w0 w1 w2\n</think>\n\n w0 w1")


@pytest.mark.parametrize(
    ("start", "thought", "answer"), [("open", "hm", SAY), ("closed", "", f"hm\n</think>\n\n{SAY}")]
)
def test_how_answers_start_can_be_said(harness, start, thought, answer, monkeypatch, tmp_path):
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    question = harness.say("", middle(FORMS["only closed"].text))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        given = ["--model", str(harness.folder), "--thinking-start", start]
        assert main(["generate", *given, "-p", question, "--json"]) == 0
        found = json.loads(out.getvalue())
        assert (found["thinking"], found["answer"]) == (thought, answer)
        out.truncate(out.seek(0))
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n"))
        assert main(["chat", "--plain", *given, "--temp", "0"]) == 0
    assert out.getvalue() == f"{answer}\n"
    worker = DirectSession(harness.model, harness.tokenizer, options(thinking=Thinking(start)))
    events = []
    worker.answer(Request(user(question), Sampling(temp=0)), events.append)
    message = next(e for e in events if isinstance(e, End)).message
    assert (message.get("reasoning_content", ""), message["content"]) == (thought, answer)
    request = ApiRequest(user("hi"))
    row = row_of(harness, request, Prompt("<role>ASSISTANT</role>", [5], None), 99, Thinking(start))
    row.take(harness.tokenizer.encode("hm", add_special_tokens=False)[0], mx.zeros(0))
    assert request.events.get_nowait() == (ThinkingText if thought else AnswerText)("h")


@pytest.mark.parametrize("view", ["hide", "fold"])
def test_an_unlikely_thought_that_was_one(harness, capsys, view):
    """Where no family is known, text is shown as the answer; a line says what it was, and the rest is right."""
    harness.say("", ["hm", "</think>", "42"])
    args = ["generate", "--model", str(harness.folder), "-p", "hi", "--ignore-chat-template"]
    assert main([*args, "--verbose", "False", "--thinking", view]) == 0
    assert (
        capsys.readouterr().out.replace("0.0 s", "T").replace("0.1 s", "T") == "hm\n[thought T, 2 tokens, above]\n42\n"
    )
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["thinking"], found["answer"], found["thinking_tokens"]) == ("hm", "42", 2)


def test_a_message_that_is_continued(harness):
    """An answer that was cut off within a thought without tags: the text before belongs to it."""
    harness.say("", middle(" so\n</think>\n\n42"))
    talk = [*user("hi"), {"role": "assistant", "content": "Hm,"}]
    events = list(harness.open_session.send(talk, sampling=Sampling(temp=0), continue_last=True))
    assert Revised("Hm, so\n") in events
    assert events[-1].message == {"role": "assistant", "content": "42", "reasoning_content": "Hm, so"}
