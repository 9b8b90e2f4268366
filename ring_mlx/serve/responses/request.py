"""What clients of ``/v1/responses`` may ask, checked and made into a request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ring_mlx.engine.events import Sampling
from ring_mlx.generation.forms import TextForm
from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.serve.failures import bad
from ring_mlx.serve.fields import Fields
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
from ring_mlx.serve.protocol import (
    HARMLESS,
    MOST_TOP_LOGPROBS,
    NEUTRAL,
    ApiRequest,
    check_supported,
    must_continue,
)
from ring_mlx.serve.responses.items import Items, Tools
from ring_mlx.serve.responses.stored import Stored
from ring_mlx.serve.turns import Message, Turns, with_system

LOGPROBS = "message.output_text.logprobs"
UNSUPPORTED = ("background", "conversation", "prompt")
# They change nothing of an answer, and are in the response again where clients look for them.
REPEATED = ("max_tool_calls", "metadata", "prompt_cache_key", "safety_identifier", "user")
READ = {
    *("client_metadata", "include", "input", "instructions", "max_output_tokens", "model", "parallel_tool_calls"),
    *("previous_response_id", "stop", "store", "stream", "stream_options", "text", "tool_choice", "tools"),
    *("continue_final_message", "top_logprobs", "truncation"),
    *SAMPLING,
    *ENDS,
    *FORMS,
    *THOUGHT,
    *HARMLESS,
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
    fields, left_out = Fields(body), left_out_of(body, READ, NEUTRAL)
    check_supported(fields, UNSUPPORTED)
    talk = _talk(fields, stored, left_out)
    choice, one_call = choice_of(fields), not fields.boolean("parallel_tool_calls", True)
    tools, most = Tools(fields, left_out), fields.within("max_output_tokens", RANGES["max_tokens"])
    Fields(fields.object("reasoning"), "reasoning.").text("summary")
    return ResponsesRequest(
        prompt=with_system(fields.text("instructions") or "", talk),
        model=fields.text("model"),
        sampling=sampling_of(fields, defaults),
        max_tokens=most,
        stop=stops_of(fields),
        **ends_of(fields, most),
        top_logprobs=_logprobs(fields, left_out),
        tools=tools.functions if choice.is_wanted else [],
        one_call=one_call,
        continue_last=must_continue(fields, talk[-1] if talk else {"role": "system"}),
        form=form_of(own_form_of(fields, _text_form(fields)), tools.functions, choice, one_call),
        **thought_of(fields, left_out, reads=("summary", "generate_summary")),
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


def _logprobs(fields: Fields, left_out: LeftOut) -> int | None:
    count = fields.integer("top_logprobs", 0, MOST_TOP_LOGPROBS)
    include = fields.array("include")
    for name in include:
        if not isinstance(name, str):
            fields.refuse("include", "must be an array of strings")
        if name != LOGPROBS:
            left_out.add(name)
    return count or 0 if count or LOGPROBS in include else None


def _text_form(fields: Fields) -> TextForm | None:
    return text_form_of(Fields(fields.object("text"), "text.").object("format"), "text.format")


def _truncates(fields: Fields) -> bool:
    if (how := fields.text("truncation")) not in (None, "auto", "disabled"):
        fields.refuse("truncation", "must be auto or disabled")
    return how == "auto"


def _repeated(fields: Fields, left_out: LeftOut) -> dict[str, Any]:
    """What the response repeats of the request."""
    text = Fields(fields.object("text"), "text.")
    left_out.note(text.values, ("format", "verbosity"), "text.")
    form = text.object("format") or {"type": "text"}
    if text.text("verbosity") not in (None, "medium"):
        left_out.add("text.verbosity")
    fields.text("service_tier")
    left_out.note(fields.object("stream_options"), ("include_usage", "include_obfuscation"), "stream_options.")
    if any(not isinstance(value, str) for value in fields.object("metadata").values()):
        raise bad("metadata has a value that is not a string; send strings.", "metadata", "invalid_value")
    return {
        **{name: fields.get(name) for name in REPEATED if fields.get(name) is not None},
        "instructions": fields.text("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
        "previous_response_id": fields.text("previous_response_id"),
        "reasoning": {"effort": None, "summary": None} | fields.object("reasoning"),
        "store": fields.boolean("store", True),
        "text": {"format": form},
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": fields.array("tools"),
        "truncation": fields.text("truncation") or "disabled",
    }
