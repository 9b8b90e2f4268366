"""Answers of a form over HTTP, with the official clients: JSON, grammars, patterns and forced calls on each route."""

from __future__ import annotations

import json
from typing import Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, Field

from tests.serving import GREEDY, SUMS, TOOLS, client_of, send, user

SHORT = GREEDY | {"extra_body": {"thinking_budget": 4}}
ASK = user(SUMS[0])
PARAMETERS = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "parameters": PARAMETERS}
ONE, TWO = (
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS, "strict": name == "clock"}}
    for name in ("weather", "clock")
)
BAD = {"type": "object", "properties": {"a": {"type": "array", "contains": {"type": "integer"}}}}


class Cat(BaseModel, extra="forbid"):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel, extra="forbid"):
    kind: Literal["dog"]
    is_good: bool


class Sum(BaseModel, extra="forbid"):
    answer: int = Field(ge=0, le=99)
    pet: Cat | Dog


def test_parse_of_the_chat_route(server):
    client = client_of(server)
    answer = client.chat.completions.parse(messages=ASK, response_format=Sum, **SHORT)
    assert isinstance(answer.choices[0].message.parsed, Sum)
    assert answer.choices[0].message.reasoning_content
    with client.chat.completions.stream(messages=ASK, response_format=Sum, **SHORT) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_parse_of_the_responses_route(server):
    client = client_of(server)
    asked = {"model": "toy", "input": SUMS[0], "temperature": 0, "max_output_tokens": 80}
    asked["extra_body"] = {"thinking_budget": 4}
    answer = client.responses.parse(text_format=Sum, **asked)
    assert isinstance(answer.output_parsed, Sum)
    tool = {"type": "function", "strict": True, **WEATHER}
    for choice in ("required", {"type": "function", "name": "weather"}):
        called = client.responses.create(tools=[tool], tool_choice=choice, parallel_tool_calls=False, **asked)
        (call,) = [item for item in called.output if item.type == "function_call"]
        assert set(json.loads(call.arguments)) == {"unit", "days"}


def test_forced_tools_of_the_messages_route(server):
    client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.server_port}", api_key="any", max_retries=0)
    tool = {"name": "weather", "input_schema": PARAMETERS}
    asked = {"model": "toy", "max_tokens": 80, "messages": ASK, "extra_body": {"temperature": 0}}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
        answer = client.messages.create(tools=[tool], tool_choice=choice, **asked)
        assert answer.stop_reason == "tool_use"
        (block,) = answer.content
        assert block.input["unit"] in ("C", "F")
    form = {"format": {"type": "json_schema", "schema": Sum.model_json_schema()}}
    answer = client.messages.create(output_config=form, **asked)
    Sum.model_validate_json(answer.content[-1].text)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
def test_forced_tools_of_the_chat_route(server, choice):
    answer = client_of(server).chat.completions.create(
        messages=ASK, tools=[ONE, TWO], tool_choice=choice, parallel_tool_calls=False, **SHORT
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name in (("weather", "clock") if choice == "required" else ("clock",))
    assert isinstance(json.loads(call.function.arguments), dict)


def test_other_forms(server):
    client = client_of(server)
    extra = {"thinking_budget": 4}
    for more, allowed in (({"regex": "ja|nein"}, ("ja", "nein")), ({"grammar": 'root ::= "a" | "b"'}, ("a", "b"))):
        answer = client.chat.completions.create(messages=ASK, **GREEDY, extra_body=extra | more)
        assert answer.choices[0].message.content in allowed
        text = client.completions.create(prompt="Say:", model="toy", max_tokens=20, temperature=0, extra_body=more)
        assert text.choices[0].text in allowed
    answer = client.chat.completions.create(
        messages=ASK,
        response_format={"type": "json_object"},
        logit_bias={str(i): 50 for i in ids_of(server, "}")},
        **SHORT,
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_an_object_with_a_schema(server):
    """As llama.cpp, Together and older clients have it."""
    form = {"type": "json_object", "schema": {"type": "object"} | PARAMETERS}
    status, _, answer = send(
        server,
        "POST",
        "/v1/chat/completions",
        {"messages": ASK, "max_tokens": 80, "thinking_budget": 4, "response_format": form},
    )
    assert (status, set(json.loads(answer["choices"][0]["message"]["content"]))) == (200, {"unit", "days"})


def ids_of(server, text):
    return server.engine.loaded.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": BAD}}}, "response_format.json_schema.schema", "schema.properties.a: Unimplemented keys"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema", "JSON Schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": False}}}, "response_format.json_schema.schema", "object"),
        ({"json_schema": {"const": 1e999}}, "json_schema", "not finite"),
        ({"json_schema": {"items": {"type": "integer", "minimum": 10**29, "maximum": 10**30}}}, "json_schema", "json_schema.items.minimum is beyond"),
        ({"json_schema": {"exclusiveMaximum": -1e300}}, "json_schema", "json_schema.exclusiveMaximum is beyond"),
        ({"regex": "("}, "regex", "unclosed"),
        ({"grammar": "nonsense"}, "grammar", "neither GBNF nor Lark"),
        ({"regex": "a", "grammar": 'root ::= "a"'}, "regex", "two forms"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "two forms"),
        ({"regex": 5}, "regex", "string"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": "must"}, "tool_choice", "name a tool"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "name a tool"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice", "gone"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": BAD, "strict": True}}]}, "tools[0].parameters", "tools[0].parameters.properties.a"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_refused(server, body, param, said):
    text = json.dumps({"messages": ASK, "max_tokens": 4} | body).replace("Infinity", "1e999")
    status, _, answer = send(server, "POST", "/v1/chat/completions", text.encode())
    assert status == 400
    assert answer["error"]["param"] == param
    assert said in answer["error"]["message"]


def test_what_is_let_through_is_named(server):
    loose = [{"type": "function", "function": {"name": "x", "parameters": BAD}}]
    schema = {"type": "string", "format": "path", "maxLength": 3}
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}
    for body, name in (({"tools": loose, "tool_choice": "required"}, "tools[0].parameters"), ({"response_format": form}, "response_format.json_schema.schema.format")):  # fmt: skip
        status, headers, _ = send(server, "POST", "/v1/chat/completions", {"messages": ASK, "max_tokens": 40} | body)
        assert (status, headers["X-Ring-Left-Out"]) == (200, name)


def test_tokens_that_may_not_come_are_no_alternatives(server):
    """JSON has no infinity, so most clients cannot read an answer with one."""
    body = {"messages": ASK, "max_tokens": 20, "thinking_budget": 4, "regex": "ab", "logprobs": True, "top_logprobs": 5}
    found = send(server, "POST", "/v1/chat/completions", body)[2]["choices"][0]["logprobs"]["content"]
    assert "".join(t["token"] for t in found).strip() == "ab"
    assert all(top["logprob"] > float("-inf") for t in found for top in t["top_logprobs"])
    assert all(t["token"] in [top["token"] for top in t["top_logprobs"]] for t in found)


def test_an_unfinished_document_says_length(server):
    answer = client_of(server).chat.completions.create(
        messages=ASK, response_format={"type": "json_object"}, **GREEDY | {"max_tokens": 1}
    )
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        client_of(server).chat.completions.parse(messages=ASK, response_format=Sum, **GREEDY | {"max_tokens": 30})


def test_one_of_some_tools(server):
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}}  # fmt: skip
    answer = client_of(server).chat.completions.create(messages=ASK, tools=[ONE, TWO], tool_choice=allowed, **SHORT)
    assert answer.choices[0].message.tool_calls[0].function.name == "clock"
