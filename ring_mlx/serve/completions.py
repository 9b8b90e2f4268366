"""What clients of ``/v1/completions`` may ask, checked and made into a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ring_mlx.engine.events import Sampling
from ring_mlx.generation.forms import Form
from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.serve.failures import cannot
from ring_mlx.serve.fields import Fields, check_count
from ring_mlx.serve.generation_fields import left_out_of
from ring_mlx.serve.protocol import MOST_CHOICES, MOST_TOP_LOGPROBS, NEUTRAL, READ, ApiRequest, common, text_form

COMPLETION_READ = {
    *READ,
    *("best_of", "chat_template_kwargs", "echo", "logprobs", "prediction", "prompt", "thinking_budget", "tools"),
}


def parse_completion(body: Mapping[str, Any], defaults: Sampling) -> ApiRequest:
    """A request to ``/v1/completions``; errors as `ring_mlx.serve.protocol.parse_chat`."""
    fields, left_out = Fields(body), left_out_of(body, COMPLETION_READ, NEUTRAL)
    for name in ("tools", "chat_template_kwargs", "prediction"):
        if fields.get(name):
            raise cannot(f"{name} needs the chat template; send it to /v1/chat/completions, or leave it out.", name)
    first, *others = _prompts(fields)
    echo, most = fields.boolean("echo", False), fields.get("max_tokens")
    if is_prompt_only := echo and type(most) in (int, float) and most == 0:
        fields = Fields({**body, "max_tokens": 1})
    request = common(fields, first, defaults, "max_tokens", left_out)
    best_of = fields.integer("best_of", request.n, MOST_CHOICES)
    if best_of is not None and request.stream and best_of > request.n:
        fields.refuse("best_of", "must not be above n in a stream, which cannot take back what it has sent")
    check_count("answers", (best_of or request.n) * (1 + len(others)), MOST_CHOICES, "prompt")
    top = fields.integer("logprobs", 0, MOST_TOP_LOGPROBS)
    text = text_form(fields)
    is_ranked = best_of is not None and best_of > request.n
    return replace(
        request,
        prompts=tuple(others),
        form=None if text is None else Form(text),
        best_of=best_of if is_ranked else None,
        top_logprobs=0 if top is None and is_ranked else top,
        tells_logprobs=top is not None,
        echo=echo,
        prompt_logprobs=echo and top is not None,
        is_prompt_only=is_prompt_only,
        thinking_budget=fields.within("thinking_budget", RANGES["thinking_budget"]),
        left_out=left_out.names,
    )


def _prompts(fields: Fields) -> list[str | list[int]]:
    """The prompts: a text, token ids, or an array of texts or of ids."""
    given = fields.get("prompt")
    several = isinstance(given, list) and bool(given) and all(isinstance(p, (str, list)) for p in given)
    prompts = given if several else [given]
    for prompt in prompts:
        ids = isinstance(prompt, list) and all(type(i) is int and i >= 0 for i in prompt)
        if not prompt or not (isinstance(prompt, str) or ids):
            fields.refuse("prompt", "must be text, token ids, or an array of these, and not empty")
    return list(prompts)
