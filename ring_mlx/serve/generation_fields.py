"""How an answer is generated: sampling, ends and the thought, as clients ask for them, alike on all routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ring_mlx.engine.events import Sampling
from ring_mlx.generation.sampling_ranges import MOST, MOST_CONTEXT, RANGES
from ring_mlx.serve.failures import bad
from ring_mlx.serve.fields import Fields, check_count
from ring_mlx.serve.left_out import LeftOut

SENT_AS = {"temp": "temperature"}
# The same settings by the names that llama.cpp and Ollama have for them.
ALSO_SENT_AS = {"repetition_penalty": "repeat_penalty"}
LAST_N = "repeat_last_n"
NUMBERS = [name for name in RANGES if name in Sampling.__dataclass_fields__ and name != "logit_bias"]
ENDS = ("stop_token_ids", "min_tokens", "ignore_eos")
THOUGHT = ("chat_template_kwargs", "enable_thinking", "reasoning", "reasoning_effort", "thinking", "thinking_budget")
SAMPLING = {*(SENT_AS.get(name, name) for name in NUMBERS), *ALSO_SENT_AS.values(), LAST_N, "logit_bias"}
MOST_STOPS, MOST_STOP_CHARS, MOST_STOP_IDS, MOST_BIASES, MOST_OPTIONS = 16, 1_000, 1_000, 10_000, 100
KINDS = {"enabled": True, "adaptive": True, "auto": True, "disabled": False}
TEMPLATE_OWN = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length"),
    *("messages", "padding", "processor_kwargs", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
    *("tokenize", "tokenizer_kwargs", "tools", "truncation"),
}


def sampling_of(fields: Fields, defaults: Sampling) -> Sampling:
    given = {}
    for name in NUMBERS:
        sent = fields.either(SENT_AS.get(name, name), ALSO_SENT_AS.get(name, name))
        given[name] = fields.within(sent, RANGES[name])
    given["logit_bias"] = _logit_bias(fields)
    last = fields.integer(LAST_N, -1, MOST_CONTEXT)
    if last is not None and given["repetition_context_size"] not in (None, last):
        fields.refuse(LAST_N, f"contradicts repetition_context_size {given['repetition_context_size']}; send one")
    if last == 0:
        given["repetition_penalty"] = 1.0
    elif last is not None:
        given["repetition_context_size"] = MOST_CONTEXT if last < 0 else last
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


def ends_of(fields: Fields, max_tokens: int | None) -> dict[str, Any]:
    """Which tokens end an answer, and from when on, as arguments of a request."""
    ids = fields.array("stop_token_ids")
    check_count("stop_token_ids", len(ids), MOST_STOP_IDS)
    if any(type(i) is not int or i < 0 for i in ids):
        fields.refuse("stop_token_ids", "must be an array of token ids")
    least = fields.integer("min_tokens", 0, MOST) or 0
    if max_tokens is not None and 0 <= max_tokens < least:
        fields.refuse("min_tokens", f"must not be above the most tokens, {max_tokens}")
    return {"stop_ids": frozenset(ids), "min_tokens": least, "ignore_eos": fields.boolean("ignore_eos", False)}


def thought_of(
    fields: Fields,
    left_out: LeftOut,
    *,
    effort: str | None = None,
    reads: Sequence[str] = (),
    wanted: bool | None = None,
) -> dict[str, Any]:
    """Whether the model is to think, and how long, as arguments of a request.

    Templates that can leave the thought out do; where one cannot, a budget of 0 closes the thought at once. Of efforts
    only none is a statement: a model of one kind of thought has no others.

    Args:
        effort: Of ``output_config``, which only one route has.
        reads: What else of ``reasoning`` the route reads.
        wanted: Whether there is to be a thought where the client does not say; None leaves that to the template.

    Raises ApiError 400 if two fields contradict each other.
    """
    options = template_options_of(fields)
    thinking, reasoning = (
        Fields(fields.object("thinking"), "thinking."),
        Fields(fields.object("reasoning"), "reasoning."),
    )
    kind = thinking.text("type")
    if thinking.values and kind not in (None, *KINDS):
        thinking.refuse("type", f"must be one of {', '.join(KINDS)}")
    said: dict[str, object] = {
        "thinking": KINDS[kind or "adaptive"] if thinking.values else None,
        "enable_thinking": fields.boolean("enable_thinking", False)
        if fields.get("enable_thinking") is not None
        else None,
        "chat_template_kwargs.enable_thinking": options.get("enable_thinking"),
    }
    efforts = {"reasoning_effort": fields.text("reasoning_effort"), "reasoning.effort": reasoning.text("effort")}
    for name, value in {**efforts, "output_config.effort": effort}.items():
        if value == "none":
            said[name] = False
        elif value is not None:
            left_out.add(name)
    stated = {name: value for name, value in said.items() if isinstance(value, bool)}
    if len(set(stated.values())) > 1:
        raise bad(
            f"{' and '.join(stated)} contradict each other; send one of them.", next(iter(stated)), "invalid_value"
        )
    neutral = "display" if thinking.get("display") == "summarized" else "type"
    left_out.note(thinking.values, ("type", "budget_tokens", neutral), "thinking.")
    left_out.note(reasoning.values, ("effort", *reads), "reasoning.")
    budget = _budget(fields, thinking)
    wanted = next(iter(stated.values()), None if budget else wanted)
    if wanted is not None:
        options = {"enable_thinking": wanted} | options
    return {"template_options": options, "thinking_budget": 0 if wanted is False else budget}


def _budget(fields: Fields, thinking: Fields) -> int | None:
    budget: int | None = fields.within("thinking_budget", RANGES["thinking_budget"])
    other: int | None = thinking.within("budget_tokens", RANGES["thinking_budget"])
    if budget is not None and other not in (None, budget):
        thinking.refuse("budget_tokens", f"contradicts thinking_budget {budget}; send one")
    return other if budget is None else budget


def template_options_of(fields: Fields) -> dict[str, Any]:
    options = fields.object("chat_template_kwargs")
    check_count("chat_template_kwargs", len(options), MOST_OPTIONS)
    for name, value in options.items():
        if name in TEMPLATE_OWN or not (value is None or isinstance(value, (bool, int, float, str))):
            fields.refuse("chat_template_kwargs", "may hold the template's own plain options, such as enable_thinking")
    return options


def left_out_of(given: Mapping[str, Any], known: set[str], neutral: Mapping[str, tuple[Any, ...]]) -> LeftOut:
    """The fields of a body that are not known, without those whose value asks for nothing."""
    return LeftOut({name: value for name, value in given.items() if value not in neutral.get(name, ())}, known)
