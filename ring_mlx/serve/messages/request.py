"""What clients of ``/v1/messages`` may ask, checked and made into a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ring_mlx.engine.events import Sampling
from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.serve.fields import Fields
from ring_mlx.serve.left_out import LeftOut
from ring_mlx.serve.messages.blocks import Blocks, system_of, tools_of
from ring_mlx.serve.protocol import (
    NO_THOUGHT,
    NUMBERS,
    SENT_AS,
    ApiRequest,
    check_form,
    check_supported,
    sampling_of,
    stops_of,
    template_options_of,
    wants_tools,
)
from ring_mlx.serve.turns import Turns, with_system

UNSUPPORTED = ("container", "mcp_servers")
READ = {
    *("messages", "model", "max_tokens", "system", "tools", "tool_choice", "stop_sequences", "stream", "thinking"),
    *("metadata", "output_config", "output_format", "chat_template_kwargs", "logit_bias", "service_tier"),
    *("cache_control", "betas", "user_profile_id"),
    *(SENT_AS.get(name, name) for name in NUMBERS),
    *UNSUPPORTED,
}
CHOICES = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}


def parse_messages(body: Mapping[str, Any], defaults: Sampling) -> ApiRequest:
    """A request to ``/v1/messages``; errors as `ring_mlx.serve.protocol.parse_chat`."""
    fields, left_out = Fields(body), LeftOut(body, READ)
    check_supported(fields, UNSUPPORTED)
    _check_output(fields, left_out)
    turns = Turns()
    Blocks(turns, left_out).read(fields)
    talk, tools = turns.checked("messages"), tools_of(fields, left_out)
    off, budget = _thinking(fields, left_out)
    options = template_options_of(fields)
    fields.object("metadata")
    return ApiRequest(
        prompt=with_system(system_of(fields), talk),
        continue_last=talk[-1]["role"] == "assistant",
        model=fields.text("model"),
        sampling=sampling_of(fields, defaults),
        max_tokens=fields.within("max_tokens", RANGES["max_tokens"]),
        stop=stops_of(fields, "stop_sequences"),
        tools=tools if wants_tools(_choice(fields, left_out)) else [],
        thinking_budget=budget,
        template_options=NO_THOUGHT | options if off else options,
        stream=fields.boolean("stream", False),
        left_out=left_out.names,
    )


def _choice(fields: Fields, left_out: LeftOut) -> str:
    choice = Fields(fields.object("tool_choice"), "tool_choice.")
    if choice.boolean("disable_parallel_tool_use", False):
        left_out.add("tool_choice.disable_parallel_tool_use")
    kind = choice.text("type") or "auto"
    if kind not in CHOICES:
        choice.refuse("type", f"must be one of {', '.join(CHOICES)}")
    return CHOICES[kind]


def _thinking(fields: Fields, left_out: LeftOut) -> tuple[bool, int | None]:
    """Whether there is to be no thought, and the tokens that it may have."""
    thinking = Fields(fields.object("thinking"), "thinking.")
    kind = thinking.text("type") or "adaptive"
    if kind not in ("enabled", "disabled", "adaptive"):
        thinking.refuse("type", "must be enabled, disabled or adaptive")
    if thinking.text("display") not in (None, "summarized"):
        left_out.add("thinking.display")
    budget: int | None = thinking.within("budget_tokens", RANGES["thinking_budget"])
    return kind == "disabled", {"enabled": budget, "disabled": 0}.get(kind)


def _check_output(fields: Fields, left_out: LeftOut) -> None:
    """The form and the effort; a model of one kind of thought has no efforts."""
    output = Fields(fields.object("output_config"), "output_config.")
    check_form(output.object("format"), "output_config.format")
    check_form(fields.object("output_format"), "output_format")
    for name in output.values:
        if name != "format" and output.get(name) is not None:
            left_out.add(f"output_config.{name}")
