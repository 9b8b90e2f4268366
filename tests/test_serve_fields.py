"""No field of a request is ignored in silence: it is honoured, refused, or named in a header."""

from __future__ import annotations

import json

import pytest

from ring_mlx import demo_model_path
from ring_mlx.engine.events import Sampling
from ring_mlx.serve.completions import parse_completion
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.messages.request import parse_messages
from ring_mlx.serve.protocol import parse_chat
from ring_mlx.serve.responses.request import parse_responses
from ring_mlx.serve.responses.stored import Stored
from ring_mlx.serve.server import Server
from tests.scripted import said, script
from tests.serving import CHAT, GOOD, SUMS, TOOLS, send, user

RESPONSES, MESSAGES, COMPLETIONS = "/v1/responses", "/v1/messages", "/v1/completions"
ROUTES = {CHAT: {"messages": user("1?")}, RESPONSES: {"input": "1?"}, MESSAGES: {"messages": user("1?")}}
PARSE = {
    CHAT: parse_chat,
    COMPLETIONS: parse_completion,
    RESPONSES: lambda body, defaults: parse_responses(body, defaults, Stored(1 << 20)),
    MESSAGES: parse_messages,
}
OFF = ({"enable_thinking": False}, 0)


def parsed(route, **change):
    body = ROUTES.get(route, {"prompt": "x"}) | change
    return PARSE[route](body, Sampling())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"reasoning_effort": "none"}, OFF),
        ({"reasoning": {"effort": "none"}}, OFF),
        ({"enable_thinking": False}, OFF),
        ({"thinking": {"type": "disabled", "budget_tokens": 9}, "thinking_budget": 9}, OFF),
        ({"chat_template_kwargs": {"enable_thinking": False, "a": 1}}, ({"enable_thinking": False, "a": 1}, 0)),
        ({"enable_thinking": True, "thinking_budget": 7}, ({"enable_thinking": True}, 7)),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, ({"enable_thinking": True}, 1024)),
        ({"thinking": {"type": "adaptive"}, "enable_thinking": True}, ({"enable_thinking": True}, None)),
        ({"thinking_budget": 5}, ({}, 5)),
    ],
    ids=lambda v: json.dumps(v) if isinstance(v, dict) else "",
)
def test_a_thought_is_wanted_or_not_alike_on_all_routes(route, change, expected):
    request = parsed(route, **change)
    assert (request.template_options, request.thinking_budget) == expected
    assert request.left_out == ()


def test_only_messages_has_no_thought_where_the_client_does_not_say():
    found = {route: (parsed(route).template_options, parsed(route).thinking_budget) for route in ROUTES}
    assert found == {CHAT: ({}, None), RESPONSES: ({}, None), MESSAGES: OFF}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reasoning_effort": "none", "enable_thinking": True}, "enable_thinking and reasoning_effort contradict"),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": True}}, "contradict"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1}, "thinking_budget": 2}, "contradicts thinking_budget 2"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty is 1.1; it contradicts"),
        ({"repeat_last_n": 5, "repetition_context_size": 6}, "contradicts repetition_context_size 6"),
        ({"thinking": {"type": "some"}}, "must be one of enabled"),
        ({"thinking": True}, "must be an object"),
        ({"enable_thinking": "no"}, "must be true or false"),
        ({"reasoning_effort": 3}, "must be a string"),
        ({"stop_token_ids": [1, "2"]}, "must be an array of token ids"),
        ({"stop_token_ids": [True]}, "must be an array of token ids"),
        ({"stop_token_ids": [-1]}, "must be an array of token ids"),
        ({"stop_token_ids": list(range(1001))}, "more than 1000"),
        ({"min_tokens": -1}, "must be a whole number"),
        ({"min_tokens": 10**30}, "must be a whole number"),
        ({"ignore_eos": 1}, "must be true or false"),
        ({"repeat_penalty": 0}, "repeat_penalty 0 is not a number from 0.01"),
        ({"xtc_threshold": 0.7}, "xtc_threshold 0.7 is not"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ROUTES)
def test_what_is_wrong_or_contradicts_is_refused(route, change, words):
    with pytest.raises(ApiError, match=words) as e:
        parsed(route, **change)
    assert e.value.status == 400


@pytest.mark.parametrize("route", [*ROUTES, COMPLETIONS])
def test_sampling_and_ends_are_read_on_all_routes(route):
    request = parsed(route, repeat_penalty=1.2, repeat_last_n=-1, xtc_probability=0.5, xtc_threshold=0.2, min_tokens=3,
                     ignore_eos=True, stop_token_ids=[7, 9])  # fmt: skip
    s = request.sampling
    assert (s.repetition_penalty, s.repetition_context_size) == (1.2, 1 << 24)
    assert (s.xtc_probability, s.xtc_threshold) == (0.5, 0.2)
    assert (request.min_tokens, request.ignore_eos, request.stop_ids) == (3, True, {7, 9})
    assert parsed(route, repeat_last_n=0).sampling.repetition_penalty == 1.0
    nothing = dict.fromkeys(("repeat_penalty", "repeat_last_n", "min_tokens", "ignore_eos", "stop_token_ids", "n"))
    assert parsed(route, **nothing).sampling == Sampling()


def test_more_tokens_at_least_than_at_most_are_refused():
    for route, most in ((CHAT, "max_completion_tokens"), (COMPLETIONS, "max_tokens"), (RESPONSES, "max_output_tokens")):
        with pytest.raises(ApiError, match="must not be above the most tokens, 2"):
            parsed(route, min_tokens=3, **{most: 2})
    with pytest.raises(ApiError, match="max_tokens is 3; it contradicts max_completion_tokens"):
        parsed(CHAT, max_tokens=3, max_completion_tokens=2)
    assert parsed(CHAT, max_tokens=2, max_completion_tokens=2).max_tokens == 2


@pytest.mark.parametrize(
    ("route", "change", "names"),
    [
        (CHAT, {"reasoning_effort": "low", "odd": 0, "typical_p": 0.5}, ("odd", "typical_p", "reasoning_effort")),
        (CHAT, {"store": True, "verbosity": "low", "modalities": ["audio"]}, ("store", "verbosity", "modalities")),
        (CHAT, {"store": False, "verbosity": "medium", "modalities": ["text"], "user": "me", "metadata": {}}, ()),
        (CHAT, {"messages": [*user("a"), {"role": "assistant", "content": "b", "refusal": None, "annotations": []}]}, ()),
        (CHAT, {"messages": [{"role": "user", "content": "b", "cache_control": {"type": "x"}}]}, ("messages.cache_control",)),
        (CHAT, {"stream_options": {"include_usage": True, "odd": 1}}, ("stream_options.odd",)),
        (CHAT, {"thinking": {"type": "enabled", "odd": 1}, "reasoning": {"exclude": True}}, ("thinking.odd", "reasoning.exclude")),
        (CHAT, {"add_generation_prompt": False}, ("add_generation_prompt",)),
        (COMPLETIONS, {"odd": [], "enable_thinking": False}, ("odd", "enable_thinking")),
        (RESPONSES, {"reasoning": {"effort": "high", "summary": "auto"}, "odd": 1}, ("odd", "reasoning.effort")),
        (RESPONSES, {"parallel_tool_calls": False, "stop": "x"}, ()),
        (RESPONSES, {"text": {"verbosity": "medium", "odd": 1}}, ("text.odd",)),
        (MESSAGES, {"output_config": {"effort": "high", "odd": 1}}, ("output_config.odd", "output_config.effort")),
        (MESSAGES, {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "service_tier": "auto"}, ()),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_named(route, change, names):
    assert parsed(route, **change).left_out == names


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_thought_of_an_earlier_answer_is_read(name):
    talk = [*user("1?"), {"role": "assistant", "content": "2", name: "hm"}, *user("3?")]
    assert parsed(CHAT, messages=talk).prompt[1] == {"role": "assistant", "content": "2", "reasoning_content": "hm"}
    talk[1] |= {"reasoning": "hm", "reasoning_content": "other"}
    with pytest.raises(ApiError, match=r"messages\[1\].reasoning .* contradicts reasoning_content"):
        parsed(CHAT, messages=talk)


START, CALLED = (
    {"role": "assistant", "content": "It"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
        ({"continue_final_message": False}, False),
        ({"add_generation_prompt": True}, False),
        ({"messages": user("1?")}, False),
        ({"messages": [*user("1?"), CALLED]}, False),
        ({"messages": [*user("1?"), {"role": "assistant", "content": ""}], "continue_final_message": None}, False),
    ],
)
def test_an_answer_that_is_begun_is_gone_on_with(change, expected):
    change = {"messages": [*user("1?"), START]} | change
    assert parsed(CHAT, **change).continue_last is expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": user("1?"), "continue_final_message": True}, "needs a last message of the assistant's"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "contradicts add_generation_prompt"),
        ({"continue_final_message": "yes"}, "must be true or false"),
    ],
)
def test_what_cannot_be_gone_on_with(change, words):
    with pytest.raises(ApiError, match=words):
        parsed(CHAT, **{"messages": [*user("1?"), START]} | change)


# With a model


def content(server, **change):
    status, _, answer = send(server, "POST", CHAT, {"temperature": 0, "max_tokens": 60} | change)
    assert status == 200, answer
    return answer["choices"][0], answer["usage"]["completion_tokens"]


def test_a_begun_answer_is_continued_in_words(server):
    thought = content(server, messages=user(SUMS[0]))[0]["message"]["reasoning_content"]
    talk = [*user(SUMS[0]), {"role": "assistant", "content": "The sum is", "reasoning": thought}]
    choice, _ = content(server, messages=talk)
    assert choice["message"] == {"role": "assistant", "content": " 62."}


def test_a_begun_response_is_continued_where_the_client_says_so(server):
    thought = content(server, messages=user(SUMS[0]))[0]["message"]["reasoning_content"]
    begun = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": thought}]},
             {"role": "assistant", "content": "The sum is"}]  # fmt: skip
    body = {
        "input": [*user(SUMS[0]), *begun],
        "temperature": 0,
        "max_output_tokens": 60,
        "continue_final_message": True,
    }
    status, headers, answer = send(server, "POST", RESPONSES, body)
    assert (status, "X-Ring-Left-Out" in headers) == (200, False)
    assert [item["content"][0]["text"] for item in answer["output"]] == [" 62."]
    kept = json.loads(server.stored.get(answer["id"]).messages)
    assert kept[1:] == [{"role": "assistant", "content": "The sum is 62.", "reasoning_content": thought}]
    assert not parsed(RESPONSES, input=body["input"]).continue_last
    for wrong in ({"input": "1?"}, {"input": [], "instructions": "x"}):
        with pytest.raises(ApiError, match="needs a last message of the assistant's"):
            parsed(RESPONSES, **wrong, continue_final_message=True)


def test_a_thought_that_is_not_wanted_does_not_come(server):
    for change in ({"reasoning_effort": "none"}, {"enable_thinking": False}, {"thinking": {"type": "disabled"}}):
        choice, _ = content(server, messages=user(SUMS[0]), **change)
        assert "reasoning_content" not in choice["message"], change


def test_which_tokens_end_an_answer_and_when(server, toy):
    whole, count = content(server, messages=user(SUMS[0]))
    assert count < 60
    last = toy[1].encode(".", add_special_tokens=False)[0]
    cut, _ = content(server, messages=user(SUMS[0]), stop_token_ids=[last])
    assert whole["message"]["content"] == cut["message"]["content"] + "."
    assert cut["finish_reason"] == "stop"
    assert content(server, messages=user(SUMS[0]), ignore_eos=True)[1] == 60
    assert content(server, messages=user(SUMS[0]), min_tokens=count + 5)[1] >= count + 5
    assert content(server, messages=user(SUMS[0]), min_tokens=count - 1)[0] == whole
    text = {"prompt": "<role>HUMAN</role>Hi", "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    assert send(server, "POST", COMPLETIONS, text)[2]["usage"]["completion_tokens"] == 20
    status, _, answer = send(server, "POST", CHAT, GOOD | {"stop_token_ids": [10**9]})
    assert (status, answer["error"]["code"]) == (400, "invalid_value")


TWO = said("I look.", ("weather", '{"of": "Oslo"}'), ("weather", '{"of": "Bern"}'))
LIST = 'hm\n</think>\n\n<tool_call>[{"name": "weather"}, {"name": "weather"}]</tool_call>'
SCHEMA = {"type": "object", "properties": {}}


@pytest.mark.parametrize("text", [TWO, LIST])
def test_one_call_at_most(server, monkeypatch, text):
    """The answer ends with its first call; the wish is the same on three routes."""
    script(monkeypatch, lambda request: text)
    asked = {
        CHAT: {"tools": TOOLS, "parallel_tool_calls": False},
        RESPONSES: {"tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}], "parallel_tool_calls": False},
        MESSAGES: {
            "tools": [{"name": "weather", "input_schema": SCHEMA}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
    }  # fmt: skip
    for route, change in asked.items():
        status, headers, answer = send(server, "POST", route, ROUTES[route] | change)
        assert (status, json.dumps(answer).count('"name": "weather"') - (route == RESPONSES)) == (200, 1), answer
        assert "X-Ring-Left-Out" not in headers
        more = {"parallel_tool_calls": True} if route != MESSAGES else {"tool_choice": {"type": "auto"}}
        answer = send(server, "POST", route, ROUTES[route] | change | more)[2]
        assert json.dumps(answer).count('"name": "weather"') - (route == RESPONSES) == 2


def test_strict_refuses_what_is_not_honoured():
    server = Server(Settings(demo_model_path(), "toy", store=False), port=0, strict=True)
    server.start()
    try:
        assert server.engine.wait_until_loaded(30)
        for route, body in ROUTES.items():
            status, _, answer = send(server, "POST", route, body | {"max_output_tokens": 1, "odd": 1, "user": None})
            assert (status, "odd" in answer["error"]["message"]) == (400, True), answer
        status, _, answer = send(server, "POST", CHAT, GOOD | {"odd": 1})
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "unsupported_parameter", "odd")
        assert send(server, "POST", CHAT, GOOD | {"user": "me", "stop": None})[0] == 200
    finally:
        assert server.close()
