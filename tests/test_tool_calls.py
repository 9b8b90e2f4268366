"""Tool calls in what a model says: slips that are understood, values that stay exact, and text that stays text."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ring_mlx.engine.events import AnswerText, Revised, ThinkingText, ToolCall
from ring_mlx.generation.message import MessageBuilder
from ring_mlx.generation.stream import GenerationEvent
from ring_mlx.generation.thinking import ThoughtSplitter
from ring_mlx.generation.tool_calls import CALL_END, CALL_START, MAX_LEVELS, ToolCallSplitter
from tests.fuzz.profile import fuzz


def split(text, *cuts):
    """Texts and calls, each call as the name and what JSON its arguments are; texts without a call between are one."""
    splitter, ends = ToolCallSplitter(), [*cuts, len(text)]
    pieces = [p for a, b in zip([0, *ends], ends, strict=False) for p in splitter.feed(text[a:b])] + splitter.flush()
    assert "".join(p.raw if isinstance(p, ToolCall) else p for p in pieces) == text, "nothing is lost or doubled"
    found = []
    for p in pieces:
        if isinstance(p, ToolCall):
            written = json.dumps(p.arguments, ensure_ascii=False, sort_keys=True, allow_nan=False)
            assert (p.name + written).encode()
            found.append((p.name, written))
        elif found and isinstance(found[-1], str):
            found[-1] += p
        else:
            found.append(p)
    return found


def block(body):
    return f"{CALL_START}\n{body}\n{CALL_END}"


def call(value):
    return block(f'{{"name": "f", "arguments": {{"a": {value}}}}}')


INNER = '{"name": "f", "arguments": {"a": 1}}'
CALL = block(INNER)
ONE = ("f", '{"a": 1}')
UNDERSTOOD = {
    "as it should be": (CALL, [ONE]),
    "no arguments": (block('{"name": "f"}'), [("f", "{}")]),
    "null": (block('{"name": "f", "arguments": null}'), [("f", "{}")]),
    "empty text": (block('{"name": "f", "arguments": ""}'), [("f", "{}")]),
    "null in text": (block('{"name": "f", "arguments": "null"}'), [("f", "{}")]),
    "parameters": (block('{"name": "f", "parameters": {"a": 1}}'), [ONE]),
    "null and parameters": (block('{"arguments": null, "parameters": {"a": 1}, "name": "f"}'), [ONE]),
    "in text": (block(r'{"name": "f", "arguments": "{\"a\": 1}"}'), [ONE]),
    "in text with slips": (block(r'{"name": "f", "arguments": "{\"a\": \"x\ny\\d\",}"}'), [("f", r'{"a": "x\ny\\d"}')]),
    "tabs and line breaks": (call('"x\ty\n\r\nz"'), [("f", r'{"a": "x\ty\n\r\nz"}')]),
    "trailing commas": (block('{"name": "f", "arguments": {"a": [1, "," , ] ,\n},}'), [("f", '{"a": [1, ","]}')]),
    "a list": (block(f"[{INNER},{INNER}]"), [ONE, ONE]),
    "a list of one with a comma": (block(f"[{INNER},]"), [ONE]),
    "escapes that JSON lacks": (call(r'"\d+\.\w\x41 \u12 C:\users \\d \" \n\/"'), [("f", json.dumps({"a": '\\d+\\.\\w\\x41 \\u12 C:\\users \\d " \n/'}))]),
    "an apostrophe": (call(r'"it\'s \\\'\\"'), [("f", json.dumps({"a": "it's \\'\\"}))]),
    "commas and brackets in text": (call(r'"{,} [1,] \d"'), [("f", json.dumps({"a": "{,} [1,] \\d"}))]),
    "tags in text": (call(f'"{CALL_END} {CALL_START} {CALL_END}"'), [("f", json.dumps({"a": f"{CALL_END} {CALL_START} {CALL_END}"}))]),
    "a call in a call": (call(json.dumps(CALL)), [("f", json.dumps({"a": CALL}))]),
    "no end tag": (CALL[:-12], [ONE]),
    "no end tag, line breaks": (CALL[:-12] + "\n \n", [ONE]),
    "half an end tag": (CALL[:-4], [ONE]),
    "the start of another": (CALL[:-12] + "\n<tool", [ONE, "<tool"]),
    "no end tag before the next": (CALL[:-12] + CALL, [ONE, ONE]),
    "within text": (f"ok {CALL} bye", ["ok ", ONE, " bye"]),
    "after a mention": (f"Put it in `<tool_call>`: {CALL}", ["Put it in `<tool_call>`: ", ONE]),
    "after one that lacks a bracket": (block('{"name": "f"') + CALL, [block('{"name": "f"'), ONE]),
    "after one with a quote too many": (call('"5" tall"') + CALL, [call('"5" tall"'), ONE]),
    "half a pair": (call(r'"\ud83d \ude00\ud83d"'), [("f", '{"a": "\ufffd \ufffd\ufffd"}')]),
    "half a pair in names": (block(r'{"name": "\ud83d", "arguments": {"\ude00": 1}}'), [("\ufffd", '{"\ufffd": 1}')]),
    "half a pair in text in text": (block(r'{"name": "f", "arguments": "{\"a\": \"\\ud83d\"}"}'), [("f", '{"a": "\ufffd"}')]),
    "a pair": (call(r'"\ud83d\ude00"'), [("f", '{"a": "\U0001f600"}')]),
    "numbers": (call("[1, 1.0, 1e5, -0.5, 123456789012345678901234567890]"), [("f", '{"a": [1, 1.0, 100000.0, -0.5, 123456789012345678901234567890]}')]),
}  # fmt: skip
TEXTS = [
    *map(call, ("NaN", "-Infinity", "Infinity", "1e999", "9" * 5000, "True", "'x'", "[,]", "{,}", "[1,,]", "1 // one", '"x')),
    *map(block, ("not json", "", "{}", "[]", '["f"]', f"[{INNER}, 1]", '{"arguments": {}}', '{"name": "", "arguments": {}}')),
    *map(block, ('{"name": 1}', '{"name": " "}', '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "x"}', '{name: "f"}', '{"name": "f"},')),
    block('{"name": "f"} {"name": "f"}'), block('{"name": "f"}}'), block('{"name": "f"'), block(r'{"name": "f", "arguments": "\"{}\""}'),
    call("[" * MAX_LEVELS + "]" * MAX_LEVELS), call("[" * 100_000 + "]" * 100_000), call('"' + '\\"' * 20_000),
    CALL[:-15], CALL[:30], "a < b <tool", CALL_START, CALL_START * 3, CALL_END, f"{CALL[:-13]} and so on", "<tool_call >{}",
    CALL_START + ' { "</tool_call><tool_call>{" ' * 500,
]  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_call_is_understood_wherever_it_is_cut(name):
    text, found = UNDERSTOOD[name]
    assert split(text) == split(text, *range(len(text))) == found
    for cut in range(len(text)):
        assert split(text, cut) == found


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: t[:60])
def test_what_is_no_call_stays_text(text):
    assert split(text) == split(text, *range(len(text))) == [text]


def test_a_tag_that_is_only_mentioned_holds_nothing_back():
    splitter = ToolCallSplitter()
    assert "".join(splitter.feed("Write `<tool_call>` before")) == "Write `<tool_call>` before"
    assert splitter.feed("<tool_call> {") == splitter.feed('"a": 1') == []
    assert "".join(splitter.feed("} so")) == '<tool_call> {"a": 1} so'


# At random

LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [CALL_END, CALL_START, '"', "\\", ",}", "\\d"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | LETTERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(LETTERS, VALUES, max_size=3)
CUTS = st.lists(st.integers(0, 400), max_size=6).map(sorted)
WRITTEN = st.booleans().flatmap(
    lambda b: ARGUMENTS.map(lambda a: block(json.dumps({"name": "f", "arguments": a}, ensure_ascii=b)))
)
RAW = [CALL[:-12], CALL[:-1], call("1,"), call('"\\d\n"'), call('"x'), call("NaN"), call('"\ud83d"'), "```json\n", "\n```\n", "<tool", "{", '"', "\\"]  # fmt: skip
PIECES = (
    WRITTEN | LETTERS | st.sampled_from(RAW) | st.sampled_from([CALL_START, CALL_END, "[", "]", "}", ",", "`", " "])
)


@fuzz(examples=100)
@given(arguments=ARGUMENTS, ascii=st.booleans(), as_text=st.booleans(), cuts=CUTS)
def test_arguments_are_exactly_those_that_were_written(arguments, ascii, as_text, cuts):
    given = json.dumps(arguments, ensure_ascii=ascii) if as_text else arguments
    text = "Well: " + block(json.dumps({"name": "f", "arguments": given}, ensure_ascii=ascii))
    wanted = json.dumps(arguments, ensure_ascii=False, sort_keys=True)
    assert split(text, *(c for c in cuts if c < len(text))) == ["Well: ", ("f", wanted)]


@fuzz(examples=100)
@given(arguments=ARGUMENTS, cuts=CUTS)
def test_values_next_to_a_slip_are_exactly_those_that_were_written(arguments, cuts):
    text = block(f'{{"slip": ["\\d\t",], "name": "f", "arguments": {json.dumps(arguments)}}}')
    wanted = json.dumps(arguments, ensure_ascii=False, sort_keys=True)
    assert split(text, *(c for c in cuts if c < len(text))) == [("f", wanted)]


@fuzz(examples=150)
@given(pieces=st.lists(PIECES, max_size=8), cuts=CUTS)
@example(pieces=[CALL_START, "{", '"', CALL_END, CALL, '"'], cuts=[3])
def test_a_mixture_is_split_alike_wherever_it_is_cut(pieces, cuts):
    text = "".join(pieces)
    assert split(text, *(c for c in cuts if c < len(text))) == split(text)


FIELDS = [f.name for f in fields(GenerationEvent)]
TAGS = ["<think>", "</think>", "\n</think>\n\n", "```py\n", "\n```\n", "`</think>`", "`", " so ", "<"]
MIXTURES = st.lists(
    st.sampled_from([*TAGS, *RAW, CALL, call(json.dumps(f"</think>{CALL}"))]) | WRITTEN, min_size=1, max_size=8
)
STARTS = st.sampled_from(["open", "likely", "unlikely", "closed"])


def spoken(text, cuts, start, has_tools):
    """The message of a model that says a text, and all that its events told, in order."""
    splitter, builder, told = ThoughtSplitter(start), MessageBuilder(has_tools=has_tools), ["", ""]
    edges = sorted({0, *(c for c in cuts if c < len(text)), len(text)})
    given = []
    for n, (a, b) in enumerate(pairwise(edges), start=1):
        last = b == len(text)
        parts = (splitter.feed_last if last else splitter.feed)(text[a:b])
        found = {"thinking_text": parts[0], "answer_text": parts[1], "revised": splitter.revised}
        counts = {"thinking_tokens": splitter.thinking_tokens, "finish_reason": "stop" if last else None}
        counts["is_certain"] = splitter.is_certain
        for event in builder.add(GenerationEvent(**(dict.fromkeys(FIELDS, 0) | {"token": n} | found | counts))):
            match event:
                case Revised(thought):
                    told = [thought, ""]
                    assert not any(isinstance(g, ToolCall) for g in given), "a call has been given that was a thought"
                case ThinkingText(said):
                    told[0] += said
                case AnswerText(said) | ToolCall(raw=said):
                    told[1] += said
            given.append(event)
    return builder.message(), told


@fuzz(examples=100)
@given(pieces=MIXTURES, cuts=CUTS, start=STARTS, has_tools=st.booleans())
@example(pieces=[CALL, "\n</think>\n\n", " so "], cuts=[90], start="unlikely", has_tools=True)
@example(pieces=[call(json.dumps(f"</think>{CALL}"))], cuts=[], start="likely", has_tools=True)
def test_thought_answer_and_calls_are_all_that_was_said_wherever_it_is_cut(pieces, cuts, start, has_tools):
    text = "".join(pieces)
    message, told = spoken(text, cuts, start, has_tools)
    assert message == spoken(text, [], start, has_tools)[0] == spoken(text, range(len(text)), start, has_tools)[0]
    thought, answer = ("".join(t.split()) for t in told)  # spaces around a thought belong to nobody
    assert "".join(text.split()) in {a + thought + b + answer for a in ("", "<think>") for b in ("", "</think>")}
    assert not message.get("tool_calls") or (has_tools and CALL_START in answer)
