"""What clients of ``/v1/responses`` may ask, checked and made into a request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ring_mlx.engine.events import Sampling
from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.serve.failures import bad
from ring_mlx.serve.fields import Fields
from ring_mlx.serve.left_out import LeftOut
from ring_mlx.serve.protocol import (
    MOST_TOP_LOGPROBS,
    NO_THOUGHT,
    NUMBERS,
    SENT_AS,
    ApiRequest,
    check_form,
    check_supported,
    sampling_of,
    template_options_of,
    wants_tools,
)
from ring_mlx.serve.responses.items import Items, Tools
from ring_mlx.serve.responses.stored import Stored
from ring_mlx.serve.turns import Message, Turns, with_system

LOGPROBS = "message.output_text.logprobs"
UNSUPPORTED = ("background", "conversation", "prompt")
# They change nothing of an answer, and are in the response again where clients look for them.
REPEATED = ("max_tool_calls", "metadata", "prompt_cache_key", "safety_identifier", "user")
READ = {
    *("include", "input", "instructions", "max_output_tokens", "model", "previous_response_id", "reasoning", "store"),
    *(
        "stream",
        "stream_options",
        "parallel_tool_calls",
        "text",
        "thinking_budget",
        "chat_template_kwargs",
        "tool_choice",
        "tools",
    ),
    *("top_logprobs", "truncation", "logit_bias", "service_tier", "prompt_cache_retention", "client_metadata"),
    *(SENT_AS.get(name, name) for name in NUMBERS),
    *REPEATED,
    *UNSUPPORTED,
}


@dataclass(eq=False)
class ResponsesRequest(ApiRequest):
    """A request to ``/v1/responses``.

    Args:
        repeated: Values of the request that are in the response again.
        talk: The conversation without instructions.
        places: Namespace and name of tools, by the name that the model calls.
        has_summary: Whether the thought is also given as its own summary.
        stored: Where the response is kept, or None.
    """

    repeated: Mapping[str, Any] = field(default_factory=dict)
    talk: list[Message] = field(default_factory=list)
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    has_summary: bool = False
    stored: Stored | None = None


def parse_responses(body: Mapping[str, Any], defaults: Sampling, stored: Stored) -> ResponsesRequest:
    """A request to ``/v1/responses``; errors as `ring_mlx.serve.protocol.parse_chat`, and 404 for what is not stored."""
    fields, left_out = Fields(body), LeftOut(body, READ)
    check_supported(fields, UNSUPPORTED)
    talk = _talk(fields, stored, left_out)
    tools, effort = Tools(fields, left_out), _reasoning(fields, left_out)
    options, budget = template_options_of(fields), fields.within("thinking_budget", RANGES["thinking_budget"])
    return ResponsesRequest(
        prompt=with_system(fields.text("instructions") or "", talk),
        model=fields.text("model"),
        sampling=sampling_of(fields, defaults),
        max_tokens=fields.within("max_output_tokens", RANGES["max_tokens"]),
        top_logprobs=_logprobs(fields, left_out),
        tools=tools.functions if wants_tools(_choice(fields)) else [],
        thinking_budget=0 if effort == "none" else budget,
        template_options=NO_THOUGHT | options if effort == "none" else options,
        stream=fields.boolean("stream", False),
        truncates=_truncates(fields),
        repeated=_repeated(fields, left_out),
        talk=talk,
        places=tools.places,
        has_summary=fields.object("reasoning").get("summary") not in (None, "none"),
        stored=stored if fields.boolean("store", True) else None,
        left_out=left_out.names,
    )


def _talk(fields: Fields, stored: Stored, left_out: LeftOut) -> list[Message]:
    """The conversation, from its start where that was kept."""
    previous = fields.text("previous_response_id")
    turns = Turns(json.loads(stored.get(previous, "previous_response_id").messages) if previous else ())
    if fields.get("input") is not None:
        Items(turns, stored, left_out).read(fields.get("input"))
    talk = turns.checked("input")
    if not talk and not fields.text("instructions"):
        fields.refuse("input", "must be text or an array with at least one item that is read")
    return talk


def _reasoning(fields: Fields, left_out: LeftOut) -> str | None:
    """The effort: none is no thought; a model of one kind of thought has no others."""
    reasoning = Fields(fields.object("reasoning"), "reasoning.")
    effort = reasoning.text("effort")
    reasoning.text("summary")
    if effort not in (None, "none"):
        left_out.add("reasoning.effort")
    return effort


def _logprobs(fields: Fields, left_out: LeftOut) -> int | None:
    count = fields.integer("top_logprobs", 0, MOST_TOP_LOGPROBS)
    include = fields.array("include")
    for name in include:
        if not isinstance(name, str):
            fields.refuse("include", "must be an array of strings")
        if name != LOGPROBS:
            left_out.add(name)
    return count or 0 if count or LOGPROBS in include else None


def _choice(fields: Fields) -> object:
    """The choice of a tool; a choice among all of them is no force."""
    choice = fields.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") in ("auto", "none"):
        return choice["type"]
    return choice


def _truncates(fields: Fields) -> bool:
    if (how := fields.text("truncation")) not in (None, "auto", "disabled"):
        fields.refuse("truncation", "must be auto or disabled")
    return how == "auto"


def _repeated(fields: Fields, left_out: LeftOut) -> dict[str, Any]:
    """What the response repeats of the request."""
    text = Fields(fields.object("text"), "text.")
    form = text.object("format") or {"type": "text"}
    check_form(form, "text.format")
    if text.text("verbosity") not in (None, "medium"):
        left_out.add("text.verbosity")
    if not fields.boolean("parallel_tool_calls", True):
        left_out.add("parallel_tool_calls")
    if fields.text("service_tier") not in (None, "auto", "default"):
        left_out.add("service_tier")
    for name in ("metadata", "stream_options"):
        fields.object(name)
    if any(not isinstance(value, str) for value in fields.object("metadata").values()):
        raise bad("metadata has a value that is not a string; send strings.", "metadata", "invalid_value")
    return {
        **{name: fields.get(name) for name in REPEATED if fields.get(name) is not None},
        "instructions": fields.text("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "parallel_tool_calls": True,
        "previous_response_id": fields.text("previous_response_id"),
        "reasoning": {"effort": None, "summary": None} | fields.object("reasoning"),
        "store": fields.boolean("store", True),
        "text": {"format": form},
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": fields.array("tools"),
        "truncation": fields.text("truncation") or "disabled",
    }
