"""What ``ring-mlx serve`` takes and gives, as an OpenAPI document that schemathesis makes requests from."""

from __future__ import annotations

from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.serve.protocol import NUMBERS, SENT_AS

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
COMMON = {
    **{SENT_AS.get(name, name): setting(name) for name in NUMBERS},
    "stop": {"nullable": True, "oneOf": [{"type": "string", "minLength": 1}, {"type": "array", "maxItems": 16, "items": {"type": "string", "minLength": 1}}]},
    "stream": {"enum": [False, None], "nullable": True},
}  # fmt: skip
CHAT = OBJECT | {
    "required": ["messages"],
    "properties": {
        "messages": {"type": "array", "minItems": 1, "items": MESSAGE},
        "logprobs": FLAG,
        "thinking_budget": setting("thinking_budget"),
        **COMMON,
    },
}
IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 1023}}
SOME = {"type": "string", "minLength": 1}
ONE = {"type": "array", "minItems": 1, "maxItems": 1}
COMPLETION = OBJECT | {
    "required": ["prompt"],
    "properties": {
        "prompt": {"oneOf": [SOME, IDS, ONE | {"items": SOME}, ONE | {"items": IDS}]},
        "logprobs": whole(0, 20),
        **COMMON,
    },
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
}
ANSWER = {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"]}


def _post(body):
    answers = {"200": _json(ANSWER), **{s: _json(ERROR) for s in ("400", "404", "405", "411", "413", "415", "422")}}
    return {"post": {"requestBody": {"required": True, **_json(body, "")}, "responses": answers}}


def _json(schema, description="as it says"):
    content = {"content": {"application/json": {"schema": schema}}}
    return {"description": description, **content} if description else content


DOCUMENT = {
    "openapi": "3.0.3",
    "info": {"title": "ring-mlx", "version": "1"},
    "paths": {"/v1/chat/completions": _post(CHAT), "/v1/completions": _post(COMPLETION)},
}
