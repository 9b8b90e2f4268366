"""What ``ring-mlx serve`` takes and gives, as an OpenAPI document that schemathesis makes requests from."""

from __future__ import annotations

from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.serve.generation_fields import NUMBERS, SENT_AS

VOCABULARY = 1024
TEXT, FLAG, OBJECT = {"type": "string"}, {"type": "boolean", "nullable": True}, {"type": "object"}


def whole(low, high):
    """A whole number in a range, or null."""
    return {"type": "integer", "minimum": low, "maximum": high, "nullable": True}


def setting(name):
    """The values of one of RANGES, or null."""
    r, greatest = RANGES[name], VOCABULARY - 1 if name == "top_k" else RANGES[name].greatest
    return {"type": "integer" if r.is_whole else "number", "minimum": r.least, "maximum": greatest, "nullable": True}


PART = OBJECT | {"required": ["type", "text"], "properties": {"type": {"enum": ["text"]}, "text": TEXT}}
MESSAGE = OBJECT | {
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"oneOf": [TEXT, {"type": "array", "items": PART}]},
        "name": TEXT | {"nullable": True},
        "tool_call_id": TEXT | {"nullable": True},
    },
}
TALK = OBJECT | {
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "user", "assistant", "tool"]},
        "content": TEXT,
        "thinking": TEXT | {"nullable": True},
        "tool_name": TEXT | {"nullable": True},
    },
}
ENDS = {
    "stop_token_ids": {
        "type": "array",
        "maxItems": 3,
        "nullable": True,
        "items": {"type": "integer", "minimum": 0, "maximum": VOCABULARY - 1},
    },
    "min_tokens": whole(0, 2),
    "ignore_eos": FLAG,
}
COMMON = {
    **ENDS,
    **{SENT_AS.get(name, name): setting(name) for name in NUMBERS},
    "stop": {"nullable": True, "oneOf": [{"type": "string", "minLength": 1}, {"type": "array", "maxItems": 16, "items": {"type": "string", "minLength": 1}}]},
    "stream": {"enum": [False, None], "nullable": True},
}  # fmt: skip
CHAT = OBJECT | {
    "required": ["messages"],
    "properties": {
        "messages": {"type": "array", "minItems": 1, "items": MESSAGE},
        "logprobs": FLAG,
        "n": whole(1, 3),
        "thinking_budget": setting("thinking_budget"),
        "parallel_tool_calls": FLAG,
        "enable_thinking": FLAG,
        **COMMON,
    },
}
IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 1023}}
SOME = {"type": "string", "minLength": 1}
FEW = {"type": "array", "minItems": 1, "maxItems": 3}
COMPLETION = OBJECT | {
    "required": ["prompt"],
    "properties": {
        "prompt": {"oneOf": [SOME, IDS, FEW | {"items": SOME}, FEW | {"items": IDS}]},
        "n": whole(1, 2),
        "echo": FLAG,
        "logprobs": whole(0, 20),
        "response_format": OBJECT | {"properties": {"type": {"enum": ["text", "json_object"]}}},
        **COMMON,
    },
}
STOPS = COMMON["stop"]
SETTINGS = {name: schema for name, schema in COMMON.items() if name != "stop"}


def parts(*kinds):
    """Text, or parts of these kinds."""
    part = OBJECT | {"required": ["type", "text"], "properties": {"type": {"enum": [*kinds]}, "text": TEXT}}
    return {"oneOf": [TEXT, {"type": "array", "items": part}]}


def kind(of, required=(), /, **properties):
    """An object of a type."""
    return OBJECT | {"required": ["type", *required], "properties": {"type": {"enum": [of]}, **properties}}


def perhaps(of, required=(), /, **properties):
    """An object of a type that need not be said."""
    return OBJECT | {"required": [*required], "properties": {"type": {"enum": [of]}, **properties}}


NAME = {"type": "string", "minLength": 1}
FUNCTION = kind("function", ["name"], name=NAME, description=TEXT | {"nullable": True}, parameters=OBJECT, strict=FLAG)
HOSTED = kind("web_search_call")  # is left out, so that nothing is left to answer where there is no other item
ITEM = {
    "oneOf": [
        perhaps("message", ["role", "content"], role={"enum": ["user", "assistant"]},
             content=parts("input_text", "output_text")),
        perhaps("message", ["role", "content"], role={"enum": ["system", "developer"]}, content=SOME),
        kind("function_call", ["name"], name=NAME, call_id=TEXT, arguments={}),
        kind("function_call_output", ["output"], call_id=TEXT, output=parts("input_text")),
        kind("reasoning", content=parts("reasoning_text")),
        HOSTED,
    ]
}  # fmt: skip
INPUT = {"oneOf": [TEXT, {"type": "array", "minItems": 1, "items": ITEM, "not": {"items": HOSTED}}]}
RESPONSE = OBJECT | {
    "anyOf": [
        {"required": ["input"], "properties": {"input": INPUT}},
        {"required": ["instructions"], "properties": {"instructions": SOME}},
    ],
    "properties": {
        "input": INPUT,
        "instructions": TEXT | {"nullable": True},
        "tools": {
            "type": "array",
            "items": {
                "oneOf": [
                    FUNCTION,
                    OBJECT
                    | {
                        "required": ["type"],
                        "properties": {"type": SOME | {"not": {"enum": ["function", "namespace"]}}},
                    },
                ]
            },
        },
        "tool_choice": {"enum": ["auto", "none"]},
        "reasoning": OBJECT | {"properties": {"effort": TEXT, "summary": TEXT}},
        "include": {"type": "array", "items": TEXT},
        "text": OBJECT | {"properties": {"format": {"oneOf": [perhaps("text"), kind("json_object")]}}},
        "metadata": OBJECT | {"additionalProperties": TEXT},
        "store": FLAG,
        "top_logprobs": whole(0, 20),
        "truncation": {"enum": ["auto", "disabled"]},
        **SETTINGS,
    },
}
BLOCK = {
    "oneOf": [
        kind("text", ["text"], text=TEXT),
        kind("tool_result", tool_use_id=TEXT, content=parts("text"), is_error=FLAG),
        kind("document", ["source"], source=kind("text", data=TEXT)),
    ]
}
SAID = {
    "oneOf": [
        kind("text", ["text"], text=TEXT),
        kind("thinking", thinking=TEXT, signature={}),
        kind("tool_use", ["name"], id=TEXT, name=NAME, input=OBJECT),
    ]
}


def turn(role, block):
    """A message of a role."""
    content = {"oneOf": [TEXT, {"type": "array", "items": block}]}
    return OBJECT | {"required": ["role", "content"], "properties": {"role": {"enum": [role]}, "content": content}}


COUNTED = {
    "messages": {"type": "array", "minItems": 1, "items": {"oneOf": [turn("user", BLOCK), turn("assistant", SAID)]}},
    "system": parts("text"),
    "tools": {"type": "array", "items": OBJECT | {"required": ["name", "input_schema"], "properties": {"name": NAME, "input_schema": OBJECT, "description": TEXT}}},
    "tool_choice": kind("auto"),
    "thinking": {"oneOf": [kind("disabled"), perhaps("adaptive"), kind("enabled", budget_tokens=setting("thinking_budget"))]},
}  # fmt: skip
MESSAGES = OBJECT | {
    "required": ["messages"],
    "properties": {**COUNTED, "stop_sequences": STOPS, **SETTINGS},
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
}
OTHER_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {"type": {"enum": ["error"]}, "error": {"type": "object", "required": ["message", "type"]}},
}
RESPONDED = {"type": "object", "required": ["id", "object", "created_at", "model", "output", "status", "usage"]}
MESSAGE_SAID = {"type": "object", "required": ["id", "type", "role", "model", "content", "stop_reason", "usage"]}
COUNT = {"type": "object", "required": ["input_tokens"], "properties": {"input_tokens": {"type": "integer"}}}
ANSWER = {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"]}


def _post(body, answer=ANSWER, error=ERROR):
    answers = {"200": _json(answer), **{s: _json(error) for s in ("400", "404", "405", "411", "413", "415", "422")}}
    return {"post": {"requestBody": {"required": True, **_json(body, "")}, "responses": answers}}


def _json(schema, description="as it says"):
    content = {"content": {"application/json": {"schema": schema}}}
    return {"description": description, **content} if description else content


def lenient(schema):
    """The same, where null stands for a field that may be missing, as on the routes of agents."""
    if isinstance(schema, list):
        return [lenient(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: value if name == "enum" else lenient(value) for name, value in schema.items()}
    needed = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        if name not in needed:
            values = {"enum": [*field["enum"], None]} if "enum" in field else {}
            schema["properties"][name] = field | values | {"nullable": True}
    return schema


LINES = OBJECT | {
    "required": ["messages", "stream"],
    "properties": {
        "messages": {"type": "array", "minItems": 1, "items": TALK},
        "stream": {"enum": [False]},
        "think": FLAG,
        "options": OBJECT
        | {
            "properties": {
                **{name: COMMON[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop")},
                "repeat_penalty": setting("repetition_penalty"),
                "repeat_last_n": whole(-1, 100),
            }
        },
    },
}
LINES_SAID = {"type": "object", "required": ["model", "created_at", "message", "done", "done_reason", "eval_count"]}
PLAIN_ERROR = {"type": "object", "required": ["error"], "properties": {"error": TEXT}}


DOCUMENT = {
    "openapi": "3.0.3",
    "info": {"title": "ring-mlx", "version": "1"},
    "paths": {
        "/v1/chat/completions": _post(CHAT),
        "/v1/completions": _post(COMPLETION),
        "/v1/responses": _post(lenient(RESPONSE), RESPONDED),
        "/api/chat": _post(LINES, LINES_SAID, PLAIN_ERROR),
        "/v1/messages": _post(lenient(MESSAGES), MESSAGE_SAID, OTHER_ERROR),
        "/v1/messages/count_tokens": _post(
            lenient(OBJECT | {"required": ["messages"], "properties": COUNTED}), COUNT, OTHER_ERROR
        ),
    },
}
