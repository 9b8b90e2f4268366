"""Thought and answer of every form of template at every door, with the model's text cut at every place.

docs/thoughts.md has the matrix: `FORMS` are its rows, the tests its columns.
"""

from __future__ import annotations

import io
import json
import sys

import pytest

from ring_mlx import Session, stream_generate
from ring_mlx.cli import main
from ring_mlx.cli.generate_command import Printer
from ring_mlx.generation import encode_prompt
from ring_mlx.loading import load
from ring_mlx.session_events import AnswerText, End, Request, Revised, Sampling, Statistics, ThinkingText, ToolCall
from ring_mlx.session_worker import Worker
from ring_mlx.thinking import Thinking
from tests.parrot import make_parrot, teach
from tests.serving import TOOLS, client_of, user
from tests.sessions import options

TEMPLATE = (
    "{{% for m in messages %}}{{{{ '<role>' + ('HUMAN' if m.role == 'user' else 'ASSISTANT') + '</role>' + m.content }}}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<role>ASSISTANT</role>{}' }}}}{{% endif %}}"
)
SAY = "The `<think>` tag."
CALL = '<tool_call>{"name": "weather", "arguments": {"of": "a <think> b"}}</tool_call>'
CODE = "Not `</think>` yet.\n```\n</think>\n```\n"
# What ends the prompt, what the model says, the thought, the answer, and whether a stream has to be corrected.
FORMS = {
    "prompt opens": ("<think>\\n", f"hm\n</think>\n\n{SAY}", "hm", SAY, False),
    "model opens": ("", f"<think>\nhm\n</think>\n\n{SAY}", "hm", SAY, False),
    "only closed": ("", f"hm\n</think>\n\n{SAY}", "hm", SAY, False),
    "blank lines": ("", f"hm.\n\n\n</think> \n\n  {SAY}", "hm.", f"  {SAY}", False),
    "no thought": ("", SAY, "", SAY, True),
    "prompt closes": ("<think>\\n\\n</think>\\n\\n", f"{SAY} </think>", "", f"{SAY} </think>", False),
    "code": ("<think>\\n", f"{CODE}</think>\n\n{SAY}", CODE.strip(), SAY, False),
    "only in code": ("<think>\\n", f"```\nhm\n</think>\n\n{SAY}", "```\nhm", SAY, True),
    "never closed": ("<think>\\n", "hm", "hm", "", False),
}
CALLS = {
    "prompt opens": ("<think>\\n", f"hm{CALL}\n</think>\n\n{CALL}", f"hm{CALL}"),
    "only closed": ("", f"hm{CALL}\n</think>\n\n{CALL}", f"hm{CALL}"),
    "no thought": ("", CALL, ""),
}
LONG = [f" w{n}" for n in range(100)]
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def halves(text):
    """The text in one token and in two, cut at every place, or at 12 places of a long one."""
    return [[text], middle(text), *([text[:k], text[k:]] for k in range(1, len(text), max(1, len(text) // 12)))]


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    texts = [f[1] for f in (*FORMS.values(), *CALLS.values())]
    texts += [" so\n</think>\n\n42", "42"]
    spare = {half for text in texts for pieces in halves(text) for half in pieces}
    folder = make_parrot(tmp_path_factory.mktemp("thoughts") / "model", LONG, spare=sorted({*spare, "hm", "</think>"}))
    return folder, *load(folder)


@pytest.fixture
def say(parrot, monkeypatch):
    """Sets the template and what the model says; every later load of the checkpoint gives that model."""
    folder, model, tokenizer = parrot
    for place in ("ring_mlx.loading", "ring_mlx.session_worker", "ring_mlx.serve.parts"):
        monkeypatch.setattr(f"{place}.load", lambda *args, **options: (model, tokenizer))

    def choose(start, pieces):
        tokenizer.chat_template = TEMPLATE.format(start)
        teach(model, tokenizer, pieces)
        return folder, model, tokenizer

    return choose


def middle(text):
    return [text[: len(text) // 2], text[len(text) // 2 :]]


def asked(worker, **request):
    """Thought, answer and calls as a reader of the events has them, whether they were revised, and the end."""
    events, revised = [], False
    worker.answer(Request(user("hi"), Sampling(temp=0), **request), events.append)
    thought, answer, calls = "", "", []
    for e in events:
        if isinstance(e, Revised):
            thought, answer, calls, revised = e.thought, "", [], True
        elif isinstance(e, ThinkingText):
            thought += e.text
        elif isinstance(e, AnswerText):
            answer += e.text
        elif isinstance(e, ToolCall):
            calls.append(e)
    end = next(e for e in events if isinstance(e, End))
    statistics = next(e for e in events if isinstance(e, Statistics))
    return thought, answer, calls, revised, end, statistics


@EVERY_FORM
def test_generation_and_sessions_wherever_tokens_are_cut(say, form):
    start, text, thought, answer, is_revised = FORMS[form]
    for pieces in halves(text):
        _, model, tokenizer = say(start, pieces)
        prompt = "<role>HUMAN</role>hi<role>ASSISTANT</role>" + start.replace("\\n", "\n")
        found = list(stream_generate(model, tokenizer, encode_prompt(tokenizer, prompt)))
        printer = Printer("show", quiet=True)
        for event in found:
            printer.show(event)
        assert (printer.thought.strip(), printer.answer.strip(), printer.text) == (thought, answer.strip(), text)
        assert (printer.thinking_tokens > 0) == bool(thought)
        assert any(e.revised for e in found) <= is_revised
        told, said, _, revised, end, statistics = asked(Worker(model, tokenizer, "x", options()))
        assert (told.strip(), said, revised) == (thought, answer, any(e.revised for e in found))
        assert end.message == {"role": "assistant", "content": answer} | (
            {"reasoning_content": told.strip("\n")} if thought else {}
        )
        assert statistics.thinking_tokens == printer.thinking_tokens


@pytest.mark.parametrize("form", CALLS)
def test_calls_in_a_thought_are_thought(say, form):
    start, text, thought = CALLS[form]
    for pieces in halves(text):
        _, model, tokenizer = say(start, pieces)
        told, said, calls, _, end, _ = asked(Worker(model, tokenizer, "x", options()), tools=TOOLS)
        assert (told.strip(), said.strip(), len(end.message["tool_calls"])) == (thought, "", 1)
        assert [dict(c.arguments) for c in calls] == [{"of": "a <think> b"}]


@EVERY_FORM
@pytest.mark.parametrize("view", ["--json", "hide", "fold", "show"])
def test_generate(say, capsys, form, view):
    start, text, thought, answer, _ = FORMS[form]
    folder, *_ = say(start, middle(text))
    flags = ["--json"] if view == "--json" else ["--verbose", "False", "--thinking", view]
    assert main(["generate", "--model", str(folder), "--prompt", "hi", *flags]) == 0
    out, err = capsys.readouterr()
    if view == "--json":
        found = json.loads(out)
        assert (found["thinking"], found["answer"], found["text"]) == (thought, answer, text)
        assert (found["thinking_tokens"] > 0) == bool(thought)
    elif view == "show":
        assert out == f"{text}\n"
    else:
        head, _, rest = out.partition("\n") if view == "fold" and thought else ("", "", out)
        assert rest.strip() == answer.strip()
        assert head.startswith("[thought ") == (view == "fold" and bool(thought))
    assert ("the answer is empty: all 3 tokens were thought; ask again" in err) == (form == "never closed")


@EVERY_FORM
def test_session(say, form):
    start, text, thought, answer, _ = FORMS[form]
    folder, *_ = say(start, middle(text))
    with Session(folder, store=False) as session:
        end = list(session.send(user("hi"), sampling=Sampling(temp=0)))[-1]
    assert (end.message.get("reasoning_content", ""), end.message["content"]) == (thought, answer)


@EVERY_FORM
def test_chat(say, form, tmp_path, monkeypatch, capsys):
    from tui import paths
    from tui.store import Database, chats, turns

    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    start, text, thought, answer, _ = FORMS[form]
    folder, *_ = say(start, middle(text))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert main(["chat", "--plain", "--model", str(folder), "--temp", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == answer.strip()
    assert ("[chat] the answer is empty: all 3 tokens were thought" in err) == (form == "never closed")
    db = Database(paths.data_file("chats.db"))
    (found,) = chats.listed(db)
    kept = list(turns.load(db, found.id))[1]
    db.close()
    assert (kept.thinking.strip(), kept.content) == (thought, answer)
    assert (kept.record.thinking_tokens > 0) == bool(thought)


def test_serve(say, serve):
    """Whole and streamed; the forms share a server."""
    server = serve(model="parrot", name="toy")
    client = client_of(server)
    for form, (start, text, thought, answer, is_revised) in FORMS.items():
        say(start, middle(text))
        request = {"model": "toy", "messages": user("hi"), "temperature": 0, "logprobs": True}
        choice = client.chat.completions.create(**request).choices[0]
        assert (getattr(choice.message, "reasoning_content", ""), choice.message.content) == (thought, answer), form
        assert choice.finish_reason == ("length" if form == "never closed" else "stop")
        told = "".join(t.token for t in choice.logprobs.content)
        assert told == (text if form in ("no thought", "prompt closes") else told)
        assert text.endswith(told)
        pieces = list(client.chat.completions.create(stream=True, **request))
        deltas = [p.choices[0].delta for p in pieces]
        assert "".join(d.content or "" for d in deltas) == answer
        last = pieces[-1].choices[0]
        assert last.finish_reason == choice.finish_reason
        assert hasattr(last, "message") == is_revised
        if is_revised:
            assert (last.message.get("reasoning_content", ""), last.message["content"]) == (thought, answer)
        else:
            assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas).strip("\n") == thought


def test_a_thought_that_never_closes_leaves_room(say, serve, capsys):
    """By default, off with 0, and after a budget of one's own, in a thought that the prompt opens or does not."""
    server = serve(model="parrot", name="toy")
    client = client_of(server)
    for start in ("<think>\\n", ""):
        folder, model, tokenizer = say(start, LONG)
        prompt = "<role>HUMAN</role>hi<role>ASSISTANT</role>" + start.replace("\\n", "\n")
        ids = encode_prompt(tokenizer, prompt)
        closing = len(tokenizer.encode("\n</think>\n\n", add_special_tokens=False))
        after = closing - len(tokenizer.encode("\n</think>", add_special_tokens=False))
        found = list(stream_generate(model, tokenizer, ids, max_tokens=64))
        assert found[-1].thinking_tokens == 48 - after
        assert "".join(e.thinking_text for e in found) == "".join(LONG[: 48 - closing]) + "\n"
        assert "".join(e.answer_text for e in found).strip().startswith("w0 w1")
        off = list(stream_generate(model, tokenizer, ids, max_tokens=64, thinking=Thinking(answer_room=0)))
        assert off[-1].thinking_tokens == (64 if start else 0)
        _, said, *_, statistics = asked(Worker(model, tokenizer, "x", options()), max_tokens=64)
        assert (statistics.thinking_tokens, said[:6]) == (48 - after, " w0 w1")
        own = asked(Worker(model, tokenizer, "x", options()), max_tokens=64, thinking_budget=5)[-1]
        assert own.thinking_tokens == 5 + closing - after
        none = asked(Worker(model, tokenizer, "x", options(thinking=Thinking(answer_room=0))), max_tokens=64)[-1]
        assert none.thinking_tokens == off[-1].thinking_tokens
        request = {"model": "toy", "messages": user("hi"), "temperature": 0, "max_tokens": 64}
        answer = client.chat.completions.create(**request)
        assert answer.usage.completion_tokens_details.reasoning_tokens == 48 - after
        assert answer.choices[0].message.content.startswith(" w0 w1")
        at_once = client.chat.completions.create(extra_body={"thinking_budget": 0}, **request)
        assert at_once.usage.completion_tokens_details.reasoning_tokens == closing - after
    folder, *_ = say("<think>\\n", LONG)
    args = ["generate", "--model", str(folder), "-p", "hi", "-m", "64", "--answer-room", "0", "--thinking", "hide"]
    assert main([*args, "--verbose", "False"]) == 0
    out, err = capsys.readouterr()
    assert (out, "all 64 tokens were thought; raise --max-tokens." in err) == ("\n", True)


@pytest.mark.parametrize(
    ("start", "thought", "answer"), [("open", "hm", SAY), ("closed", "", f"hm\n</think>\n\n{SAY}")]
)
def test_how_answers_start_can_be_said(say, serve, capsys, start, thought, answer):
    folder, *_ = say("", middle(FORMS["only closed"][1]))
    assert main(["generate", "--model", str(folder), "-p", "hi", "--json", "--thinking-start", start]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["thinking"], found["answer"]) == (thought, answer)
    with Session(folder, store=False, thinking_start=start) as session:
        message = list(session.send(user("hi"), sampling=Sampling(temp=0)))[-1].message
    assert (message.get("reasoning_content", ""), message["content"]) == (thought, answer)
    server = serve(model="parrot", name="toy", thinking=Thinking(start))
    message = (
        client_of(server).chat.completions.create(model="toy", messages=user("hi"), temperature=0).choices[0].message
    )
    assert (getattr(message, "reasoning_content", ""), message.content) == (thought, answer)


@pytest.mark.parametrize("view", ["hide", "fold"])
def test_an_unlikely_thought_that_was_one(say, capsys, view):
    """Where no family is known, text is shown as the answer; a line says what it was, and the rest is right."""
    folder, *_ = say("", ["hm", "</think>", "42"])
    args = ["generate", "--model", str(folder), "-p", "hi", "--ignore-chat-template"]
    assert main([*args, "--verbose", "False", "--thinking", view]) == 0
    assert (
        capsys.readouterr().out.replace("0.0 s", "T").replace("0.1 s", "T") == "hm\n[thought T, 2 tokens, above]\n42\n"
    )
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["thinking"], found["answer"], found["thinking_tokens"]) == ("hm", "42", 2)


def test_a_message_that_is_continued(say):
    """An answer that was cut off within a thought without tags: the text before belongs to it."""
    _, model, tokenizer = say("", middle(" so\n</think>\n\n42"))
    talk = [*user("hi"), {"role": "assistant", "content": "Hm,"}]
    events = []
    Worker(model, tokenizer, "x", options()).answer(Request(talk, Sampling(temp=0), continue_last=True), events.append)
    assert Revised("Hm, so\n") in events
    assert events[-1].message == {"role": "assistant", "content": "42", "reasoning_content": "Hm, so"}
