"""What clients of OpenAI's chat and completion routes may ask, checked and made into a request.

Fields that change the answer and are not supported are refused; unknown fields are ignored, because
clients send many. Beside OpenAI's own there are all of `Sampling`, ``thinking_budget`` and ``chat_template_kwargs``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ring_mlx.engine.events import Sampling
from ring_mlx.engine.request import Request
from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.serve.failures import ApiError, bad, cannot
from ring_mlx.serve.fields import MOST_VALUES, Fields, read_json

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
PARTS = {"text": "text", "refusal": "refusal"}
UNSUPPORTED = (
    *("functions", "function_call", "audio", "web_search_options", "suffix", "best_of", "echo"),
    "adapters",  # mlx_lm.server's
)
# Templates that can leave the thought out do; where one cannot, a budget of 0 closes the thought at once.
NO_THOUGHT = {"enable_thinking": False}
SENT_AS = {"temp": "temperature"}
NUMBERS = [name for name in RANGES if name in Sampling.__dataclass_fields__ and name != "logit_bias"]
MOST_STOPS, MOST_STOP_CHARS, MOST_TOP_LOGPROBS = 16, 1_000, 20
# An agent's long day is 2,000 messages and as many calls, a large set of tools 100; what is far above only costs time.
MOST_MESSAGES, MOST_CALLS, MOST_TOOLS, MOST_BIASES, MOST_OPTIONS = 4_096, 4_096, 1_000, 10_000, 100
TEMPLATE_OWN = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length"),
    *("messages", "padding", "processor_kwargs", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
    *("tokenize", "tokenizer_kwargs", "tools", "truncation"),
}


@dataclass(eq=False)
class ApiRequest(Request):
    """A request as it came from a client.

    Args:
        model: The name that the client gave, or None.
        stream: Whether the answer comes in pieces.
        include_usage: Whether a stream ends with the usage.
        prediction: A text that the client expects much of in the answer; it changes nothing but the time.
        left_out: What the client sent and the answer does not depend on, though it should; the client is told.
        truncates: The oldest turns may be dropped where the conversation exceeds the context.
    """

    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    prediction: str = ""
    left_out: tuple[str, ...] = ()
    truncates: bool = False


def parse_chat(body: Mapping[str, Any], defaults: Sampling) -> ApiRequest:
    """A request to ``/v1/chat/completions``.

    Raises ApiError 400 for a wrong value, 422 for what cannot be done here.
    """
    fields = Fields(body)
    most = fields.within("max_completion_tokens", RANGES["max_tokens"])
    logprobs = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if top and not logprobs:
        fields.refuse("top_logprobs", "needs logprobs to be true")
    check_form(fields.object("response_format"), "response_format")
    request = _common(fields, _messages(fields), defaults)
    return replace(
        request,
        is_text=False,
        max_tokens=request.max_tokens if most is None else most,
        top_logprobs=(top or 0) if logprobs else None,
        tools=_tools(fields),
        template_options=template_options_of(fields),
        prediction=_prediction(fields),
    )


def parse_completion(body: Mapping[str, Any], defaults: Sampling) -> ApiRequest:
    """A request to ``/v1/completions``; errors as `parse_chat`."""
    fields = Fields(body)
    for name in ("tools", "chat_template_kwargs", "prediction"):
        if fields.get(name):
            raise cannot(f"{name} needs the chat template; send it to /v1/chat/completions, or leave it out.", name)
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    elif isinstance(prompt, list) and prompt and all(isinstance(p, (str, list)) for p in prompt):
        raise cannot(f"{len(prompt)} prompts in one request are not supported; send one each.", "prompt")
    ids = isinstance(prompt, list) and all(type(i) is int and i >= 0 for i in prompt)
    if not prompt or not (isinstance(prompt, str) or ids):
        fields.refuse("prompt", "must be text or token ids, and not empty")
    return replace(_common(fields, prompt, defaults), top_logprobs=fields.integer("logprobs", 0, MOST_TOP_LOGPROBS))


def check_count(what: str, count: int, most: int, param: str | None = None) -> None:
    if count > most:
        raise bad(f"{count} {what} are more than {most}; send fewer.", param or what, "invalid_value")


def check_supported(fields: Fields, names: Iterable[str]) -> None:
    """Raises ApiError 422 if the client asks for something of these names."""
    for name in names:
        if fields.get(name):
            raise cannot(f"{name} is not supported; leave it out.", name)


def _common(fields: Fields, prompt: Any, defaults: Sampling) -> ApiRequest:
    check_supported(fields, UNSUPPORTED)
    if fields.integer("n", 1, 128) not in (None, 1):
        raise cannot("n above 1 is not supported; send the request again instead.", "n")
    stream = fields.boolean("stream", False)
    usage = Fields(fields.object("stream_options"), "stream_options.").boolean("include_usage", False)
    return ApiRequest(
        prompt=prompt,
        is_text=True,
        model=fields.text("model"),
        sampling=sampling_of(fields, defaults),
        max_tokens=fields.within("max_tokens", RANGES["max_tokens"]),
        stop=stops_of(fields),
        stream=stream,
        include_usage=usage,
        thinking_budget=fields.within("thinking_budget", RANGES["thinking_budget"]),
    )


def sampling_of(fields: Fields, defaults: Sampling) -> Sampling:
    given = {name: fields.within(SENT_AS.get(name, name), RANGES[name]) for name in NUMBERS}
    given["logit_bias"] = _logit_bias(fields)
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    given = fields.object("logit_bias")
    check_count("logit_bias", len(given), MOST_BIASES)
    inner = Fields(given, "logit_bias.")
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in given):
        fields.refuse("logit_bias", "must have token ids as keys")
    return {int(key): inner.within(key, RANGES["logit_bias"]) or 0.0 for key in given} or None


def stops_of(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    """The texts that end an answer."""
    given = fields.get(name)
    stops = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops) or len(stops) > MOST_STOPS:
        fields.refuse(name, f"must be a text or at most {MOST_STOPS} of them, none empty")
    check_count("characters in a stop", max(map(len, stops), default=0), MOST_STOP_CHARS, name)
    return tuple(stops)


def _messages(fields: Fields) -> list[dict[str, Any]]:
    given = fields.array("messages")
    if not given:
        fields.refuse("messages", "must be an array with at least one message")
    check_count("messages", len(given), MOST_MESSAGES)
    lists = [m.get("tool_calls") for m in given if isinstance(m, dict)]
    check_calls([call for calls in lists if isinstance(calls, list) for call in calls])
    return [_message(m, f"messages[{i}].") for i, m in enumerate(given)]


def check_calls(calls: list[Any], param: str = "messages") -> None:
    """Before any is read: `read_json` bounds the arguments of one call, not those of all."""
    check_count("tool calls", len(calls), MOST_CALLS, param)
    functions = [c.get("function") for c in calls if isinstance(c, dict)]
    texts = [f["arguments"] for f in functions if isinstance(f, dict) and isinstance(f.get("arguments"), str)]
    values = sum(text.count(mark) for text in texts for mark in ",[{")
    check_count("values in arguments of tool calls", values, MOST_VALUES, param)


def _message(given: Any, place: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise bad(f"{place[:-1]} is not an object; give role and content.", place[:-1], "invalid_value")
    fields = Fields(given, place)
    role = fields.text("role")
    if role not in ROLES:
        fields.refuse("role", f"must be one of {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": ROLES[role], "content": text_of(fields, "content", PARTS, "messages")}
    if role == "assistant":
        if thought := fields.text("reasoning_content"):
            message["reasoning_content"] = thought
        if calls := fields.array("tool_calls"):
            message["tool_calls"] = [_call(c, f"{place}tool_calls[{i}].") for i, c in enumerate(calls)]
    elif given.get("content") is None:
        fields.refuse("content", "must be text")
    for name in ("name", "tool_call_id"):
        if value := fields.text(name):
            message[name] = value
    return message


def text_of(fields: Fields, name: str, keys: Mapping[str, str], param: str) -> str:
    """A text, or the texts of parts; ``keys`` has the types of parts that are read, and where their text is."""
    content = fields.get(name)
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        fields.refuse(name, "must be text or an array of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in keys:
            raise cannot(f"{fields.place}{name} has a part of type {kind[:40]!r}; only text is read.", param)
        text = part.get(keys[kind]) if isinstance(kind, str) else None
        if not isinstance(text, str):
            fields.refuse(name, "must be text or an array of text parts")
        texts.append(text)
    return "".join(texts)


def _prediction(fields: Fields) -> str:
    given = fields.object("prediction")
    if not given:
        return ""
    inner = Fields(given, "prediction.")
    if given.get("type") != "content":
        inner.refuse("type", "must be content")
    if given.get("content") is None:
        inner.refuse("content", "must be text or an array of text parts")
    return text_of(inner, "content", {"text": "text"}, "prediction")


def _call(given: Any, place: str) -> dict[str, Any]:
    function = Fields(Fields(given if isinstance(given, dict) else {}, place).object("function"), f"{place}function.")
    name, arguments = function.text("name"), function.get("arguments")
    if not name:
        function.refuse("name", "must be the name of a function")
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments_of(arguments)}}
    if isinstance(given.get("id"), str):
        call["id"] = given["id"]
    return call


def arguments_of(given: Any) -> dict[str, Any] | str:
    """An object, or else the text, since a client cannot repair what a model wrote earlier."""
    if isinstance(given, dict):
        return given
    text = "{}" if given in (None, "") else given if isinstance(given, str) else json.dumps(given)
    try:
        found = read_json(text.encode())
    except (ValueError, ApiError):
        found = None
    return found if isinstance(found, dict) else text


def _tools(fields: Fields) -> list[dict[str, Any]]:
    tools = fields.array("tools")
    check_count("tools", len(tools), MOST_TOOLS)
    for i, tool in enumerate(tools):
        kind = tool.get("type", "function") if isinstance(tool, dict) else None
        function = tool.get("function") if isinstance(tool, dict) else None
        if kind != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad(f"tools[{i}] is not a function with a name; describe it as one.", f"tools[{i}]", "invalid_value")
    return tools if wants_tools(fields.get("tool_choice")) else []


def wants_tools(choice: object) -> bool:
    """Whether the model is told of the tools. Raises ApiError 422 if it must call one."""
    if choice not in (None, "auto", "none"):
        raise cannot("tool_choice may be 'auto' or 'none'; the model cannot be made to call a tool.", "tool_choice")
    return choice != "none"


def check_form(form: Mapping[str, Any], param: str) -> None:
    """The form that an answer must have, on all routes. Raises ApiError 422 if it is not text."""
    if (kind := form.get("type")) not in (None, "text"):
        raise cannot(f"{param} {str(kind)[:40]!r} is not supported; ask for JSON in words.", param)


def template_options_of(fields: Fields) -> dict[str, Any]:
    options = fields.object("chat_template_kwargs")
    check_count("chat_template_kwargs", len(options), MOST_OPTIONS)
    for name, value in options.items():
        if name in TEMPLATE_OWN or not (value is None or isinstance(value, (bool, int, float, str))):
            fields.refuse("chat_template_kwargs", "may hold the template's own plain options, such as enable_thinking")
    return options
