"""What clients of ``/v1/messages`` may ask, checked and made into a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ring_mlx.engine.events import Sampling
from ring_mlx.generation.forms import TextForm
from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.serve.fields import Fields
from ring_mlx.serve.forms import FORMS, Choice, choice_of, form_of, own_form_of, text_form_of
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
from ring_mlx.serve.messages.blocks import Blocks, system_of, tools_of
from ring_mlx.serve.protocol import ApiRequest, check_supported
from ring_mlx.serve.turns import Turns, with_system

UNSUPPORTED = ("container", "mcp_servers")
READ = {
    *("messages", "model", "max_tokens", "system", "tools", "tool_choice", "stop_sequences", "stream", "metadata"),
    *("output_config", "output_format", "cache_control", "betas", "user_profile_id"),
    *SAMPLING,
    *ENDS,
    *FORMS,
    *THOUGHT,
    *UNSUPPORTED,
}
NEUTRAL = {"service_tier": ("auto", "standard_only")}


def parse_messages(body: Mapping[str, Any], defaults: Sampling) -> ApiRequest:
    """A request to ``/v1/messages``; errors as `ring_mlx.serve.protocol.parse_chat`."""
    fields, left_out = Fields(body), left_out_of(body, READ, NEUTRAL)
    check_supported(fields, UNSUPPORTED)
    effort = _effort(fields, left_out)
    turns = Turns()
    Blocks(turns, left_out).read(fields)
    talk, tools = turns.checked("messages"), tools_of(fields, left_out)
    most = fields.within("max_tokens", RANGES["max_tokens"])
    choice, one_call = _choice(fields)
    tools = tools if choice.is_wanted else []
    fields.object("metadata")
    return ApiRequest(
        prompt=with_system(system_of(fields), talk),
        continue_last=talk[-1]["role"] == "assistant",
        model=fields.text("model"),
        sampling=sampling_of(fields, defaults),
        max_tokens=most,
        **ends_of(fields, most),
        stop=stops_of(fields, "stop_sequences"),
        tools=tools,
        form=form_of(_text_form(fields), tools, choice, one_call),
        one_call=one_call,
        # Anthropic's models do not think unless they are asked to, and clients take the first block for the text.
        **thought_of(fields, left_out, effort=effort, wanted=False),
        stream=fields.boolean("stream", False),
        left_out=left_out.names,
    )


def _choice(fields: Fields) -> tuple[Choice, bool]:
    """The choice of a tool, and whether only one may be called."""
    given = Fields(fields.object("tool_choice"), "tool_choice.")
    return choice_of(fields), given.boolean("disable_parallel_tool_use", False)


def _text_form(fields: Fields) -> TextForm | None:
    """By ``output_config``, or as it was called before."""
    now = text_form_of(
        Fields(fields.object("output_config"), "output_config.").object("format"), "output_config.format"
    )
    return own_form_of(fields, now or text_form_of(fields.object("output_format"), "output_format"))


def _effort(fields: Fields, left_out: LeftOut) -> str | None:
    """The effort."""
    output = Fields(fields.object("output_config"), "output_config.")
    left_out.note(output.values, ("effort", "format"), "output_config.")
    return output.text("effort")
