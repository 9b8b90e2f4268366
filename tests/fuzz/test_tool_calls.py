"""Tool calls in what a model says: any text, in any pieces, gives text and calls that can be written."""

from __future__ import annotations

import json

from hypothesis import example, given
from hypothesis import strategies as st

from ring_mlx.session_events import ToolCall
from ring_mlx.tool_calls import CALL_END, CALL_START, ToolCallSplitter
from tests.fuzz.profile import fuzz

LETTERS = st.text(st.characters(exclude_categories=[]), max_size=8)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**4000, -(10**30)])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | LETTERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.fixed_dictionaries({}, optional={"name": LETTERS | VALUES, "arguments": VALUES | VALUES.map(json.dumps)})
RAW = ["9" * 5000, "[" * 2000, '{"a":' * 2000, "NaN", "1e999", '"\\ud83d"', '"\\ude00\\ud83d"', "{", "\\", "\x00", ""]
BODIES = (
    CALLS.map(json.dumps)
    | CALLS.map(lambda c: json.dumps(c, ensure_ascii=False))
    | VALUES.map(json.dumps)
    | st.sampled_from(RAW)
    | st.sampled_from(RAW).map(lambda raw: f'{{"name": "f", "arguments": {{"a": {raw}}}}}')
)
PIECES = BODIES | BODIES.map(lambda b: f"{CALL_START}{b}{CALL_END}") | LETTERS | st.sampled_from(["<tool", CALL_START])


def nested(levels):
    return CALL_START + '{"name": "f", "arguments": {"a": ' + "[" * levels + "]" * levels + "}}" + CALL_END


@fuzz(examples=400)
@given(pieces=st.lists(PIECES, max_size=6), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=5))
@example(pieces=[CALL_START + '{"name": "f", "arguments": {"a": "\\ud83d"}}' + CALL_END], cuts=[1])
@example(pieces=[nested(900)], cuts=[7])
@example(pieces=[nested(1_000_000)], cuts=[100_000])
def test_any_text_in_any_pieces(pieces, cuts):
    text, found, splitter, at = "".join(pieces), [], ToolCallSplitter(), 0
    while at < len(text):
        size = cuts[at % len(cuts)]
        found += splitter.feed(text[at : at + size])
        at += size
    found.append(splitter.flush())
    for call in (f for f in found if isinstance(f, ToolCall)):
        json.dumps([call.name, dict(call.arguments)], ensure_ascii=False, indent=1).encode()
    if not any(isinstance(f, ToolCall) for f in found):
        assert "".join(found) == text, "what is no call stays as it was said"
