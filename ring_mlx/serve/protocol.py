"""What clients of OpenAI's chat and completion routes may ask, checked and made into a request.

Fields without which the answer would be of another kind are refused; what else is not honoured, unknown fields too, is
named to the client. Beside OpenAI's own there are all of `Sampling` and `ring_mlx.serve.generation_fields`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ring_mlx.engine.events import Sampling
from ring_mlx.engine.request import Request
from ring_mlx.generation.forms import TextForm
from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.serve.failures import ApiError, bad, cannot
from ring_mlx.serve.fields import MOST_VALUES, Fields, check_count, read_json
from ring_mlx.serve.forms import FORMS, choice_of, form_of, own_form_of, text_form_of
from ring_mlx.serve.generation_fields import (
    ENDS,
    SAMPLING,
    THOUGHT,
    ends_of,
    left_out_of,
    sampling_of,
    stops_of,
    thought_of,
)
from ring_mlx.serve.left_out import LeftOut

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
PARTS = {"text": "text", "refusal": "refusal"}
UNSUPPORTED = (
    *("functions", "function_call", "audio", "web_search_options", "suffix"),
    "adapters",  # mlx_lm.server's
)
# Of these an answer does not depend, or not with these values.
HARMLESS = ("cache_prompt", "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user")
NEUTRAL = {
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
}
READ = {
    *HARMLESS,
    *SAMPLING,
    *ENDS,
    *FORMS,
    *UNSUPPORTED,
    *("max_tokens", "model", "n", "response_format", "stop", "stream", "stream_options"),
}
CHAT_READ = {
    *READ,
    *THOUGHT,
    *("add_generation_prompt", "continue_final_message", "logprobs", "max_completion_tokens", "messages"),
    *("parallel_tool_calls", "prediction", "tool_choice", "tools", "top_logprobs"),
}
MESSAGE_READ = {"content", "name", "reasoning", "reasoning_content", "role", "tool_call_id", "tool_calls"}
MOST_TOP_LOGPROBS, MOST_CHOICES = 20, 128
# An agent's long day is 2,000 messages and as many calls, a large set of tools 100; what is far above only costs time.
MOST_MESSAGES, MOST_CALLS, MOST_TOOLS = 4_096, 4_096, 1_000


@dataclass(eq=False)
class ApiRequest(Request):
    """A request as it came from a client.

    Args:
        model: The name that the client gave, or None.
        stream: Whether the answer comes in pieces.
        include_usage: Whether a stream ends with the usage.
        prediction: A text that the client expects much of in the answer; it changes nothing but the time.
        left_out: What the client sent and the answer does not depend on, though it should; the client is told.
        n: How many answers.
        best_of: So many are made, of which the ``n`` likeliest are given; None is ``n``.
        prompts: Further prompts, which are answered as the first one.
        index: Which of the answers this one is.
        echo: The prompt is the start of the answer.
        echoed: Its text.
        is_prompt_only: Nothing is generated.
        tells_logprobs: Whether the client gets the log-probabilities that are told.
        truncates: The oldest turns may be dropped where the conversation exceeds the context.
    """

    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    prediction: str = ""
    left_out: tuple[str, ...] = ()
    truncates: bool = False
    n: int = 1
    best_of: int | None = None
    prompts: tuple[Any, ...] = ()
    index: int = 0
    echo: bool = False
    echoed: str = ""
    is_prompt_only: bool = False
    tells_logprobs: bool = True


def parse_chat(body: Mapping[str, Any], defaults: Sampling) -> ApiRequest:
    """A request to ``/v1/chat/completions``.

    Raises ApiError 400 for a wrong value, 422 for what cannot be done here.
    """
    fields, left_out = Fields(body), left_out_of(body, CHAT_READ, NEUTRAL)
    logprobs = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if top and not logprobs:
        fields.refuse("top_logprobs", "needs logprobs to be true")
    messages = _messages(fields, left_out)
    most = fields.either("max_completion_tokens", "max_tokens")
    request = common(fields, messages, defaults, most, left_out)
    choice, one_call = choice_of(fields), not fields.boolean("parallel_tool_calls", True)
    tools = _tools(fields) if choice.is_wanted else []
    return replace(
        request,
        is_text=False,
        form=form_of(text_form(fields), tools, choice, one_call),
        continue_last=_continues(fields, messages, left_out),
        top_logprobs=(top or 0) if logprobs else None,
        tools=tools,
        one_call=one_call,
        prediction=_prediction(fields),
        **thought_of(fields, left_out),
        left_out=left_out.names,
    )


def check_supported(fields: Fields, names: Iterable[str]) -> None:
    """Raises ApiError 422 if the client asks for something of these names."""
    for name in names:
        if fields.get(name):
            raise cannot(f"{name} is not supported; leave it out.", name)


def common(fields: Fields, prompt: Any, defaults: Sampling, most_sent_as: str, left_out: LeftOut) -> ApiRequest:
    check_supported(fields, UNSUPPORTED)
    options = fields.object("stream_options")
    left_out.note(options, ("include_usage", "include_obfuscation"), "stream_options.")
    most = fields.within(most_sent_as, RANGES["max_tokens"])
    return ApiRequest(
        prompt=prompt,
        is_text=True,
        model=fields.text("model"),
        sampling=sampling_of(fields, defaults),
        max_tokens=most,
        stop=stops_of(fields),
        stream=fields.boolean("stream", False),
        include_usage=Fields(options, "stream_options.").boolean("include_usage", False),
        n=fields.integer("n", 1, MOST_CHOICES) or 1,
        **ends_of(fields, most),
    )


def _continues(fields: Fields, messages: list[dict[str, Any]], left_out: LeftOut) -> bool:
    """Whether the last message is the start of the answer: an assistant's without calls, unless the client says otherwise."""
    last = messages[-1]
    can = is_begun(last)
    begins = fields.get("add_generation_prompt") is not None and fields.boolean("add_generation_prompt", True)
    if not fields.boolean("continue_final_message", not begins):
        return False
    if not fields.get("continue_final_message"):
        if fields.get("add_generation_prompt") is False and not can:
            left_out.add("add_generation_prompt")
        return can and bool(last["content"] or last.get("reasoning_content"))
    if begins:
        fields.refuse("continue_final_message", "contradicts add_generation_prompt; send one of them")
    return must_continue(fields, last)


def is_begun(message: Mapping[str, Any]) -> bool:
    """Whether a message can be the start of an answer."""
    return message["role"] == "assistant" and not message.get("tool_calls")


def must_continue(fields: Fields, last: Mapping[str, Any]) -> bool:
    """Whether the client says that its last message is to be gone on with. Raises ApiError if it cannot be."""
    wanted = fields.boolean("continue_final_message", False)
    if wanted and not is_begun(last):
        fields.refuse("continue_final_message", "needs a last message of the assistant's, without tool calls")
    return wanted


def _messages(fields: Fields, left_out: LeftOut) -> list[dict[str, Any]]:
    given = fields.array("messages")
    if not given:
        fields.refuse("messages", "must be an array with at least one message")
    check_count("messages", len(given), MOST_MESSAGES)
    lists = [m.get("tool_calls") for m in given if isinstance(m, dict)]
    check_calls([call for calls in lists if isinstance(calls, list) for call in calls])
    return [_message(m, f"messages[{i}].", left_out) for i, m in enumerate(given)]


def check_calls(calls: list[Any], param: str = "messages") -> None:
    """Before any is read: `read_json` bounds the arguments of one call, not those of all."""
    check_count("tool calls", len(calls), MOST_CALLS, param)
    functions = [c.get("function") for c in calls if isinstance(c, dict)]
    texts = [f["arguments"] for f in functions if isinstance(f, dict) and isinstance(f.get("arguments"), str)]
    values = sum(text.count(mark) for text in texts for mark in ",[{")
    check_count("values in arguments of tool calls", values, MOST_VALUES, param)


def _message(given: Any, place: str, left_out: LeftOut) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise bad(f"{place[:-1]} is not an object; give role and content.", place[:-1], "invalid_value")
    fields = Fields(given, place)
    role = fields.text("role")
    if role not in ROLES:
        fields.refuse("role", f"must be one of {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": ROLES[role], "content": text_of(fields, "content", PARTS, "messages")}
    left_out.note({name: value for name, value in given.items() if value}, MESSAGE_READ, "messages.")
    if role == "assistant":
        if thought := fields.text(fields.either("reasoning_content", "reasoning")):
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
    return tools


def text_form(fields: Fields) -> TextForm | None:
    return own_form_of(fields, text_form_of(fields.object("response_format"), "response_format", "json_schema"))
