"""Answers of a form: JSON by a schema, grammars, patterns and calls, in every way of generating."""

from __future__ import annotations

import json

import jsonschema_rs
import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_mlx.cli import main
from ring_mlx.engine.events import AnswerText, End, Sampling, Statistics, ThinkingText, ToolCall
from ring_mlx.engine.request import Request
from ring_mlx.engine.row import Row
from ring_mlx.errors import GrammarError
from ring_mlx.generation.constraint import Constraint
from ring_mlx.generation.forms import CallForm, Form, TextForm
from ring_mlx.generation.grammars import Grammars
from tests.fuzz.profile import fuzz
from tests.serving import SUMS, answer_of
from tests.sessions import DirectSession, options

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = CallForm("weather", json.dumps(CITY), True, "tools[0]")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
SEEDED = Sampling(temp=1, seed=7)


def schema_form(schema):
    return Form(TextForm("schema", json.dumps(schema), "schema"))


def regex(pattern):
    return Form(TextForm("regex", pattern, "regex"))


def asked(form, text="Why?", **more):
    messages = more.pop("messages", [{"role": "user", "content": text}])
    settings = {"sampling": SEEDED, "max_tokens": 300, "thinking_budget": 3}
    return Request(messages, form=form, **(settings | more))


def told(session, request):
    """Thought, text, calls, reason and statistics of an answer."""
    events = []
    session.answer(request, events.append)
    texts = ["".join(e.text for e in events if isinstance(e, kind)) for kind in (ThinkingText, AnswerText)]
    calls = [(e.name, e.arguments) for e in events if isinstance(e, ToolCall)]
    (end,), (statistics,) = ([e for e in events if isinstance(e, kind)] for kind in (End, Statistics))
    return *texts, calls, end.reason, statistics


@pytest.fixture(scope="module")
def session(chat):
    return DirectSession(*chat, options(speculate="off"))


@pytest.fixture(scope="module")
def grammars(chat, vocabulary):
    return Grammars(chat[1], vocabulary)


def accepts(grammars, form, text, is_thinking=False):
    matcher = grammars.compiled(form, is_thinking).matcher.deep_copy()
    tokens = grammars.tokens.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=4)
LEAVES = st.one_of(
    st.integers(-50, 50).map(lambda low: ({"type": "integer", "minimum": low, "maximum": low + 20}, low + 3)),
    st.text(max_size=3).map(lambda text: ({"type": "string", "maxLength": 3}, text)),
    st.booleans().map(lambda value: ({"type": "boolean"}, value)),
    st.lists(st.text(max_size=5), min_size=1, max_size=3, unique=True).map(lambda all_: ({"enum": all_}, all_[-1])),
    st.just(({"type": "null"}, None)),
)


@st.composite
def objects(draw, inner):
    parts = draw(st.dictionaries(NAMES, inner, min_size=1, max_size=3))
    optional = draw(st.sets(st.sampled_from(sorted(parts))))
    schema = {
        "type": "object",
        "properties": {name: part for name, (part, _) in parts.items()},
        "required": [name for name in parts if name not in optional],
        "additionalProperties": False,
    }
    left_out = draw(st.sets(st.sampled_from(sorted(optional)))) if optional else set()
    return schema, {name: value for name, (_, value) in parts.items() if name not in left_out}


def arrays(inner):
    return st.tuples(inner, st.integers(0, 2)).map(
        lambda drawn: ({"type": "array", "items": drawn[0][0], "maxItems": 2}, [drawn[0][1]] * drawn[1])
    )


PAIRS = st.recursive(LEAVES, lambda inner: objects(inner) | arrays(inner), max_leaves=5)


@fuzz(15)
@given(pair=PAIRS, seed=st.integers(0, 1000))
def test_every_answer_is_an_instance_and_instances_can_be_answers(session, grammars, pair, seed):
    schema, instance = pair
    form = schema_form(schema)
    _, text, _, reason, _ = told(session, asked(form, sampling=Sampling(temp=1, seed=seed)))
    assert reason == "stop"
    jsonschema_rs.validate(schema, json.loads(text))
    assert accepts(grammars, form, json.dumps(instance, ensure_ascii=False))


@pytest.mark.parametrize(
    ("schema", "path", "why"),
    [
        ({"properties": {"a": {"items": {"not": {"type": "string"}}}}}, ".properties.a.items", "not"),
        (
            {"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"q": {"contains": {}}}}}},
            ".$defs.x.properties.q",
            "con",
        ),
        ({"properties": {"a": {"$ref": "http://x/y"}}}, ".properties.a", "http://x/y"),
        ({"properties": {"a": {"$ref": "#/$defs/gone"}}}, ".properties.a", "gone"),
        ({"anyOf": [{"type": "null"}, {"pattern": "(?=x)", "type": "string"}]}, ".anyOf[1]", "look-around"),
        ({"required": ["a"], "properties": {"a": False}, "type": "object"}, "", "unsatisfiable"),
        ({"$ref": "#"}, "", "nothing can meet it"),
        ({"enum": []}, "", "empty"),
        ({"properties": {"a": {"not": {"const": -(1 << 70)}}}}, ".properties.a", "not"),
        ({"type": "strin"}, "", "strin"),
        ({"enum": ["x" * 300_000]}, "", "more than"),
        ({"properties": dict.fromkeys(map(str, range(16_000)), True), "type": "object"}, "", "16000 properties"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_with_its_path(grammars, schema, path, why):
    with pytest.raises(GrammarError) as e:
        grammars.compiled(schema_form(schema), True)
    assert f"schema{path}" in str(e.value)
    assert why in str(e.value)
    assert e.value.param == "schema"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a"),
        ("regex", "(" * 9000 + ")" * 9000),
        ("regex", "(?=a)"),
        ("grammar", "no grammar"),
        ("grammar", 'start: "a" b'),
        ("grammar", "root ::= root"),
    ],
)
def test_a_pattern_or_grammar_that_cannot_be_read_is_refused(grammars, kind, text):
    with pytest.raises(GrammarError, match=f"{kind}") as e:
        grammars.compiled(Form(TextForm(kind, text, kind)), False)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (regex("^[0-9]{2}$"), "12", " 12"),
        (Form(TextForm("grammar", 'root ::= "ja" | "né" n\nn ::= [0-9]+', "g")), "né5", "né"),
        (Form(TextForm("grammar", 'start: "a" NUMBER\nNUMBER: /[0-9]+/', "g")), "a5", "b5"),
        (schema_form({"type": "object", "x-guidance": {"whitespace_flexible": True}}), '{"a": [1, {}]}', '{ "a": 1}'),
        (schema_form({}), "\n[1, null]", "\n\n1"),
        (schema_form({"maxLength": 2.0, "type": "string"}), '"é1"', '"é12"'),
        (schema_form({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}), '{"a": 1}', '{"b": 1}'),
        (schema_form({"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/n"}}]}}}), "[[], null, [[null]]]", "[1]"),
        (Form(None, (WEATHER,), True), '<tool_call>\n{"name": "weather", "arguments": {"city": "A", "days": 1}}\n</tool_call>', "Hi"),
        (Form(None, (WEATHER,)), "Hi, a < b", '<tool_call>\n{"name": "x", "arguments": {}}\n</tool_call>'),
        (Form(TextForm("regex", "yes", "r"), (WEATHER,)), "yes", "no"),
    ],
)  # fmt: skip
def test_what_a_form_allows(grammars, form, right, wrong):
    assert accepts(grammars, form, right)
    assert not accepts(grammars, form, wrong)
    assert accepts(grammars, form, f"\n\n{right}", is_thinking=True)


def test_formats_that_are_not_known_are_named(grammars):
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "path"}, "format": {"const": "path"}}}
    assert grammars.compiled(schema_form(schema), False).left_out == ("schema.properties.a.format",)
    loose = CallForm("x", '{"properties": {"a": {"not": {}}}}', False, "tools[1]")
    assert grammars.compiled(Form(None, (WEATHER, loose), True), False).left_out == ("tools[1]",)


def test_a_mask_begins_after_the_thought(session):
    free, held = (
        told(session, asked(form, sampling=Sampling(temp=0), max_tokens=40, thinking_budget=9))
        for form in (None, regex("[0-9]{3}"))
    )
    assert held[0] == free[0] != ""
    assert held[1].isdigit()
    assert len(held[1]) == 3


def test_a_thought_that_would_end_the_answer_goes_on(session, chat):
    wish = {min(chat[1].eos_token_ids): 100.0}
    request = asked(regex("ab"), sampling=Sampling(temp=0, logit_bias=wish), thinking_budget=6)
    thought, text, _, reason, statistics = told(session, request)
    assert (text, reason) == ("ab", "stop")
    assert thought
    assert statistics.thinking_tokens > 6


def test_a_cut_answer_says_so(session):
    assert told(session, asked(schema_form({"type": "string", "minLength": 50}), max_tokens=12))[3] == "length"
    assert told(session, asked(schema_form(CITY), max_tokens=1))[1::2] == ("", "length")


def test_a_stop_text_within_the_form_ends_it(session):
    _, text, _, reason, _ = told(session, asked(schema_form(CITY), stop=('", "days',)))
    assert text.startswith('{"city": "')
    assert '"days' not in text
    assert reason == "stop"


def test_calls_that_must_come(session):
    form = Form(None, (WEATHER,), True, is_single=True)
    _, text, [(name, arguments)], reason, _ = told(session, asked(form, tools=TOOLS))
    assert (text, name, reason) == ("", "weather", "stop")
    jsonschema_rs.validate(CITY, dict(arguments))


def test_a_call_that_may_come_is_held_to_its_schema(session, monkeypatch):
    begin = Row.__init__

    def begun(row, *args):
        begin(row, *args)
        ids = iter(row._tokenizer.encode("hm\n</think>\n\nWait. <tool_call>", add_special_tokens=False))
        row.next_forced = lambda: next(ids, None)

    monkeypatch.setattr(Row, "__init__", begun)
    _, text, calls, _, _ = told(session, asked(Form(None, (WEATHER,)), tools=TOOLS, max_tokens=100))
    assert text.startswith("Wait. ")
    jsonschema_rs.validate(CITY, dict(calls[0][1]))


def test_a_begun_answer_is_gone_on_with(session):
    begun = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": '</think>\n\n{"city": "Os'}]
    _, text, *_ = told(session, asked(schema_form(CITY), messages=begun, continue_last=True))
    jsonschema_rs.validate(CITY, json.loads('{"city": "Os' + text))
    begun[1]["content"] = "</think>\n\nHello"
    with pytest.raises(GrammarError, match="no beginning"):
        told(session, asked(schema_form(CITY), messages=begun, continue_last=True))


FORMS = (schema_form(CITY), regex("(ab|ba){3}"), Form(None, (WEATHER,), True, is_single=True), None)


@pytest.mark.parametrize("sampling", [Sampling(temp=0), Sampling(temp=1, seed=3, repetition_penalty=1.2)])
def test_drafts_change_nothing(chat, sampling):
    plain, drafting = (DirectSession(*chat, options(speculate=n)) for n in ("off", 7))
    accepted = 0
    for form in FORMS[:3]:
        texts = [told(s, asked(form, sampling=sampling, tools=TOOLS, max_tokens=60)) for s in (plain, drafting)]
        assert texts[0][:4] == texts[1][:4]
        accepted += texts[1][4].accepted_tokens
    assert accepted > 20


def test_forced_tokens_are_read_together(chat):
    session = DirectSession(*chat, options(speculate=7))
    form = schema_form({"type": "object", "properties": {"a long name": {"const": "and a long value"}}, "required": ["a long name"], "additionalProperties": False})  # fmt: skip
    statistics = told(session, asked(form, thinking_budget=0))[4]
    assert statistics.accepted_tokens == statistics.drafted_tokens > 10


def test_rows_of_other_forms_do_not_meet(engine, chat):
    requests = [(f, q) for f in FORMS for q in ("Why?", "Who goes there?")]

    def text_of(request):
        return [str(e) for e in answer_of(request) if isinstance(e, (AnswerText, ThinkingText, ToolCall, End))]

    def send(to, form, text):
        to.submit(request := asked(form, text, max_tokens=60))
        return request

    alone, together = engine(max_batch=1), engine(max_batch=8)
    expected = [text_of(send(alone, *r)) for r in requests]
    assert [text_of(r) for r in [send(together, *r) for r in requests]] == expected


def test_what_goes_wrong_in_one_answer_ends_only_that_one(engine, monkeypatch):
    def failing(self, tokens):
        if self.spoiled:
            self._failure = "too many expressions"
        taking(self, tokens)

    taking = Constraint.take
    monkeypatch.setattr(Constraint, "spoiled", False, raising=False)
    monkeypatch.setattr(Constraint, "take", failing)
    made = engine(max_batch=2)
    good, wrong = (asked(schema_form(CITY), max_tokens=60) for _ in range(2))
    wrong.prepared = made.loaded.prepare(wrong)
    wrong.prepared.constraint.spoiled = True
    made.submit(good)
    made.submit(wrong)
    assert isinstance(answer_of(wrong)[-1], GrammarError)
    assert answer_of(good)[-1].reason == "stop"


def test_masks_are_those_of_bits(grammars):
    constraint = Constraint(grammars, regex("[ab]c"), False)
    logits = mx.random.normal((1, grammars.rows))
    kept = mx.isfinite(constraint.masked(logits))[0].tolist()
    allowed = {t for t, is_kept in enumerate(kept) if is_kept}
    assert {grammars.bytes_of(t) for t in allowed} <= {b"a", b"b", b"ac", b"bc"}
    constraint.take([min(t for t in allowed if grammars.bytes_of(t) == b"a")])
    assert [grammars.bytes_of(t) for t in constraint.forced()] == [b"c"]
    assert constraint.allowed(constraint.forced() * 2) == 1


def generated(capsys, *flags):
    """Exit code, answer and errors of ``ring-mlx generate`` with the toy."""
    code = main(["generate", "-p", SUMS[0], "--no-store", "--temp", "0", "--json", "--quiet", *flags])
    out, errors = capsys.readouterr()
    return code, json.loads(out)["answer"] if out else "", errors


def test_forms_of_generate(capsys, tmp_path):
    file = tmp_path / "city.json"
    file.write_text(json.dumps(CITY))
    for schema in (str(file), json.dumps(CITY)):
        code, text, _ = generated(capsys, "--json-schema", schema, "--thinking-budget", "5")
        assert code == 0
        jsonschema_rs.validate(CITY, json.loads(text))
    assert generated(capsys, "--regex", "[0-9]{2} pears")[1][2:] == " pears"
    assert generated(capsys, "--grammar", 'root ::= "ja" | "nein"', "--speculate", "off")[1] in ("ja", "nein")
    text = generated(capsys, "--regex", "ab+c", "--prefill-response", "</think>ab", "--max-tokens", "50")[1]
    assert set(text) <= {"b", "c"}


@pytest.mark.parametrize(
    "flags",
    [("--json-schema", "gone.json"), ("--json-schema", "{]"), ("--json-schema", '{"not": {}}'), ("--regex", "("), ("--grammar", "gone")],
)  # fmt: skip
def test_a_form_that_cannot_be_is_one_line(capsys, flags):
    code, text, errors = generated(capsys, *flags)
    assert (code, text) == (2, "")
    assert flags[0] in errors
    assert "Traceback" not in errors
