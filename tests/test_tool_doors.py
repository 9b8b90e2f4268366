"""Tool calls through `generate`, `Session`, ``chat --plain`` and ``serve``: a model that says a fixed text, cut anywhere."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import pytest

from ring_mlx import AnswerText, End, Revised, Sampling, Session, ThinkingText, ToolCall, load, whole_text
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.cli import main
from ring_mlx.cli.exit_codes import CUT_OFF
from ring_mlx.errors import TokenizerError
from ring_mlx.generation.message import MessageBuilder
from ring_mlx.generation.stream import events_of
from ring_mlx.generation.templates import render_text
from ring_mlx.generation.thinking import splitter_after
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.protocol import parse_chat
from ring_mlx.serve.server import Server
from tests.parrot import ROLE_END, cut, make_parrot
from tests.serving import CHAT, TOOLS, client_of, send, user

INNER = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
BLOCKS = (
    '<tool_call>\n{"name": "find", "arguments": {"pattern": "\\ud83d </tool_call>",}}\n</tool_call>',
    '\n<tool_call>{"name": "rm", "arguments": {"n": NaN}}</tool_call>\n',
    '<tool_call>[{"name": "now", "arguments": null}, {"name": "now"}]',
)
THOUGHT, ANSWER = f"I might {INNER} it.", "Look: " + "".join(BLOCKS)
SAID = f"{THOUGHT}\n</think>\n\n{ANSWER}"
TEXT = "Look: " + BLOCKS[1]
CALLS = [("find", {"pattern": "\ufffd </tool_call>"}), ("now", {}), ("now", {})]
OPTIONS = {"sampling": Sampling(temp=0), "max_tokens": 200}
BODY = {"messages": user("hi"), "max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    return make_parrot(tmp_path_factory.mktemp("parrot") / "model", cut(SAID, 5))


@pytest.fixture(scope="module")
def session(parrot):
    with Session(parrot, store=False, read_ahead=True) as made:
        yield made


@pytest.fixture(scope="module")
def server(parrot):
    made = Server(Settings(model=parrot, name="toy", store=False, read_ahead=False), port=0)
    made.start()
    assert made.engine.wait_until_loaded(30)
    yield made
    assert made.close()


def heard(reply):
    """Thought, answer, calls and message."""
    events = list(reply)
    text = lambda kind: "".join(e.text for e in events if isinstance(e, kind))
    calls = [e for e in events if isinstance(e, ToolCall)]
    (end,) = (e for e in events if isinstance(e, End))
    assert end.message["content"].endswith(text(AnswerText))
    assert whole_text(end.message) == end.message
    return text(ThinkingText).strip("\n"), text(AnswerText), calls, end.message


def test_a_session_gives_calls_where_it_gave_tools(session):
    talk = user("hi")
    for _ in range(2):  # and its own message does not stop it
        thought, answer, calls, message = heard(session.send(talk, tools=TOOLS, **OPTIONS))
        assert (thought, answer, [(c.name, c.arguments) for c in calls]) == (THOUGHT, TEXT, CALLS)
        assert [c.raw for c in calls] == [BLOCKS[0], BLOCKS[2], ""]
        assert [c["function"]["name"] for c in message["tool_calls"]] == [name for name, _ in CALLS]
        talk += [message, {"role": "tool", "content": "\ude00 found"}]


def test_a_session_without_tools_gives_text(session):
    talk = user("hi")
    for tools in (None, []):
        thought, answer, calls, message = heard(session.send(talk, tools=tools, **OPTIONS))
        assert (thought, answer, calls) == (THOUGHT, ANSWER, [])
        assert "tool_calls" not in message
        talk += [message, *user("and?")]


def test_generate_prints_what_was_said(parrot, capsys):
    command = ["generate", "--model", str(parrot), "--max-tokens", "200", "--chat-template-config"]
    assert main([*command, json.dumps({"tools": TOOLS}), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["thinking"], found["answer"]) == (SAID, THOUGHT, ANSWER)


def test_the_plain_chat_has_no_tools_and_shows_text(parrot, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\ud83d\nagain\n"))
    assert main(["chat", "--plain", "--model", str(parrot)]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n" * 2


def test_the_server_gives_calls_where_the_request_gave_tools(server):
    status, _, body = send(server, "POST", CHAT, BODY | {"tools": TOOLS})
    message = body["choices"][0]["message"]
    assert (status, body["choices"][0]["finish_reason"]) == (200, "tool_calls")
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, TEXT)
    assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"]] == CALLS
    with client_of(server) as client:
        deltas = [
            p.choices[0].delta for p in client.chat.completions.create(model="toy", **BODY, tools=TOOLS, stream=True)
        ]
    streamed = [c for d in deltas for c in d.tool_calls or []]
    assert [c.function.model_dump() for c in streamed] == [c["function"] for c in message["tool_calls"]]
    assert ("".join(d.content or "" for d in deltas), [c.index for c in streamed]) == (TEXT, [0, 1, 2])
    assert len({*(c["id"] for c in message["tool_calls"]), *(c.id for c in streamed)}) == 2 * len(CALLS)
    replies = [{"role": "tool", "tool_call_id": c["id"], "content": "\ud83d"} for c in message["tool_calls"]]
    again = send(server, "POST", CHAT, BODY | {"messages": [*user("hi"), message, *replies], "tools": TOOLS})
    assert again[2]["choices"][0]["message"]["content"] == TEXT


def test_the_server_gives_text_where_no_tool_may_be_called(server):
    for change in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = send(server, "POST", CHAT, BODY | change)[2]["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
        assert choice["finish_reason"] == "stop"
        with client_of(server) as client:
            pieces = list(client.chat.completions.create(model="toy", **BODY, **change, stream=True))
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == ANSWER


FORMS = {
    "prompt opens it": ("<think>\n", SAID),
    "model opens it": ("", f"<think>\n{SAID}"),
    "model only closes it": ("", SAID),
    "no thought": ("<think>\n\n</think>\n\n", ANSWER),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["<role>ASSISTANT</role>", "<|im_start|>assistant\n"])
def test_every_form_of_a_thought_leaves_the_same_calls(form, family, parrot):
    """In tokens of its own before and after each of some places, and letter by letter; no call is ever taken back."""
    tokenizer, (start, said) = load_tokenizer(parrot), FORMS[form]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    cuts = [encode(said[:k]) + encode(said[k:]) for k in range(0, len(said), 17)]
    for ids in [*cuts, [i for letter in said for i in encode(letter)]]:
        for tools in (True, False):
            splitter, builder, calls = splitter_after(family + start), MessageBuilder(has_tools=tools), []
            steps = ((i, None) for i in [*ids, ROLE_END])
            for e in events_of(steps, tokenizer, splitter, len(ids) + 2, prompt_tokens=1, cached_tokens=0):
                told = list(builder.add(e))
                assert not calls or not any(isinstance(t, Revised) for t in told)
                calls += [t for t in told if isinstance(t, ToolCall)]
            message = builder.message()
            assert message.get("reasoning_content", "") == ("" if form == "no thought" else THOUGHT)
            assert message["content"] == (TEXT if tools else ANSWER)
            assert [(c.name, c.arguments) for c in calls] == (CALLS if tools else [])


# What came back

ODD = ["", None, "{", '{"a": NaN}', "[1]", "null", 5, [1], '{"a": ' + "9" * 70 + "}", '{"a":' + "[" * 80 + "]" * 80 + "}", "</think>", {"a": 1}]  # fmt: skip
STRICT = """{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% for c in m.tool_calls or [] %}|{{ c.function.name }}
{%- for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"""


def came_back(*arguments):
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": a}} for a in arguments]
    return [*user("hi"), {"role": "assistant", "content": "So.", "tool_calls": calls}, {"role": "tool", "tool_call_id": "c", "content": "r"}]  # fmt: skip


def test_no_arguments_that_come_back_stop_a_conversation(server, session):
    for odd in ODD:
        assert send(server, "POST", CHAT, BODY | {"messages": came_back(odd), "max_tokens": 1})[0] == 200, odd
        assert list(session.send(came_back(odd), max_tokens=1))[-1].reason == "length"
    assert parse_chat({"messages": came_back('{"a": NaN}')}, Sampling()).prompt == came_back('{"a": NaN}')
    assert parse_chat({"messages": came_back('{"a": 1}', [1])}, Sampling()).prompt == came_back({"a": 1}, "[1]")


def test_a_template_that_needs_objects_gets_other_arguments_as_text(parrot):
    tokenizer = load(parrot)[1]
    tokenizer._tokenizer.chat_template = STRICT
    assert (
        render_text(tokenizer, came_back({"a": 1}, '{"b": 2}', None)) == "<user>hi<assistant>So.|f a=1|f b=2|f<tool>r"
    )
    text = '<user>hi<assistant>So.\n<tool_call>\n{"name": "f", "arguments": {"a": NaN]}\n</tool_call>|f a=1<tool>r'
    assert render_text(tokenizer, came_back('{"a": NaN]', {"a": 1})) == text
    talk = came_back({"a": 1})
    for content in (None, [{"type": "text", "text": "S"}, {"type": "text", "text": "o."}]):
        talk[1]["content"] = content
        said = "" if not content else "So."
        assert render_text(tokenizer, talk) == f"<user>hi<assistant>{said}|f a=1<tool>r"
    del talk[1]["content"]
    assert render_text(tokenizer, talk) == "<user>hi<assistant>|f a=1<tool>r"
    for wrong in (5, [5], [{"function": 5}], [{"function": {"name": []}}]):
        with contextlib.suppress(TokenizerError):
            render_text(tokenizer, [*came_back("{"), {"role": "user", "content": "x", "tool_calls": wrong}])


# Halves of surrogate pairs


def test_halves_of_pairs_become_one_letter():
    assert whole_text("a\ud83d") == whole_text("a\ude00") == "a\ufffd"
    assert whole_text("\ude00\ud83d\ud83d\ude00") == "\ufffd\ufffd\U0001f600"
    assert whole_text({"\ud83d": ["\udcff", 1, None, {"a": "\ud83d"}]}) == {
        "\ufffd": ["\ufffd", 1, None, {"a": "\ufffd"}]
    }


def test_a_session_reads_halves_of_pairs(session):
    half = "a\ud83d"
    calls = [{"type": "function", "function": {"name": half, "arguments": {half: half}}}]
    talk = [{"role": "system", "content": half}, *user(half), {"role": "assistant", "content": half, "reasoning_content": half, "tool_calls": calls}]  # fmt: skip
    tools = [{"type": "function", "function": {"name": half, "parameters": {half: [half]}}}]
    assert heard(session.send([*talk, {"role": "tool", "content": half}], tools=tools, **OPTIONS))[1] == TEXT
    assert heard(session.send([*user("x"), {"role": "assistant", "content": half}], continue_last=True, **OPTIONS))
    assert list(session.send(half, **OPTIONS))[-1].message["content"] == ANSWER


def test_the_server_reads_halves_of_pairs(server):
    arguments = json.dumps({"a": "\ud83d"})
    call = {"id": "\ud83d", "type": "function", "function": {"name": "f\ud83d", "arguments": arguments}}
    talk = [*user("\ud83d"), {"role": "assistant", "content": "\ude00", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "\ud83d", "content": "\ud83d"}]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "description": "\ud83d", "\ud83d": 1}}]
    assert send(server, "POST", CHAT, BODY | {"messages": talk, "tools": tools, "stop": "\ud83d"})[0] == 200
    assert send(server, "POST", "/v1/completions", {"prompt": "\ud83d", "max_tokens": 2})[0] == 200
    for wrong in (
        {"model": "\ud83d"},
        {"\ud83d": 1, "tool_choice": "\ud83d"},
        {"chat_template_kwargs": {"\ud83d": ["\ud83d"]}},
    ):
        status, _, body = send(server, "POST", CHAT, BODY | wrong)
        assert (400 <= status < 500, json.dumps(body).count("ud83d")) == (True, 0)


def test_commands_read_halves_of_pairs(parrot, capsys):
    half = "a\udcff"  # what an argument that is not UTF-8 becomes
    command = ["generate", "--model", str(parrot), "--verbose", "False", "--max-tokens", "3", "--prompt", half]
    assert main([*command, "--system-prompt", half, "--prefill-response", half]) == CUT_OFF
    assert main([*command, "--ignore-chat-template"]) == CUT_OFF
    assert all(line.startswith("ring-mlx: [generate] the answer ") for line in capsys.readouterr().err.splitlines())
