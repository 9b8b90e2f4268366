"""The work that is timed: a decode step, and parts of a prompt, of the model itself.

A step goes through some layers with their own weights, more than a cache holds, and the head, compiled as always. Several steps are handed over before the first is waited for, as in an answer. A prompt of one
prefill step goes through a linear layer and the softmax layer after it.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.choices import Chosen
from ring_mlx.generation.decoding import prefill, step_sizes
from ring_mlx.model import memory
from ring_mlx.model.model import Model
from ring_mlx.model.tentative import Tentative
from ring_mlx.tuning.race import Run

# Of a prompt that is read at once.
PROMPT_TOKENS = {choices.CPU: 128, "": 2048}
LEAST_LAYERS = 8
ROWS = {choices.ONE: 1, choices.FEW: 4, choices.EIGHT: 8}


def work(model: Model, name: str, chosen: Chosen) -> Run:
    """The work of a choice, done with these choices."""
    if name == "prefill_step":
        return reading(model, chosen)
    kind = name.partition("/")[2]
    if kind == choices.MANY:
        return prompt(model, chosen)
    by_rows = step(model, chosen, ROWS[kind])
    if ROWS[kind] == 1:
        return by_rows
    by_tokens = several(model, chosen, ROWS[kind])

    def both(times: int) -> None:
        by_rows(times)
        by_tokens(times)

    return both


def step(model: Model, chosen: Chosen, rows: int = 1, is_whole: bool = False) -> Run:
    """A decode step of so many rows, compiled for these choices, through two groups of layers or all."""
    last = len(model.layers) if is_whole else _end_of_two_groups(model)
    part = _own(model, 0, last)
    cache = list(model.make_cache() if rows == 1 else model.make_cache([0] * rows))[:last]
    tokens = _tokens(model, rows, 1)
    with choices.use(chosen):
        part(tokens, cache)  # a step is one after others

    def run(times: int) -> None:
        with choices.use(chosen):
            for _ in range(times):
                mx.async_eval(part(tokens, cache), [c.state for c in cache])
        mx.eval([c.state for c in cache])
        mx.synchronize()

    return run


def several(model: Model, chosen: Chosen, count: int) -> Run:
    """A speculative step of so many tokens of one row, through the layers of `step`; the tokens are taken back."""
    last = _end_of_two_groups(model)
    part, cache = _own(model, 0, last), list(model.make_cache())[:last]
    first, tokens = _tokens(model, 1, 1), [n % model.config.vocab_size for n in range(count)]
    with choices.use(chosen):
        part(first, cache)

    def run(times: int) -> None:
        with choices.use(chosen):
            for _ in range(times):
                tentative = Tentative(part, cache, [tokens])
                mx.async_eval(tentative.logits)
                tentative.keep([0])
        mx.synchronize()

    return run


def prompt(model: Model, chosen: Chosen) -> Run:
    """As many tokens as are read at once, through two layers."""
    tokens = _bounded(model, PROMPT_TOKENS.get(choices.where(), PROMPT_TOKENS[""]))
    return _reading(model, chosen, [tokens])


def reading(model: Model, chosen: Chosen) -> Run:
    """As many tokens as the longest step has, in steps as chosen, through two layers."""
    longest = max(int(v) for v in choices.TABLE["prefill_step"].values_on(choices.where()))
    with choices.use(chosen):
        size = int(choices.chosen("prefill_step"))
    return _reading(model, chosen, step_sizes(_bounded(model, longest), size))


def fitting_steps(model: Model) -> list[int]:
    """Steps whose temporaries fit into memory beside the model, going by what the present one takes."""
    default = int(choices.chosen("prefill_step"))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    reading(model, choices.active())(1)
    each = (mx.get_peak_memory() - before) / default
    room = memory.budget_bytes() - before
    steps = [int(v) for v in choices.TABLE["prefill_step"].values_on(choices.where())]
    return [s for s in steps if s <= default or (s <= model.config.context_tokens and 2 * s * each <= room)]


def _own(model: Model, first: int, last: int) -> Model:
    """Some layers of the model as one that compiles its own steps."""
    part, layers = copy.copy(model), copy.copy(model.model)
    layers.layers, layers._step = model.layers[first:last], None
    part.model, layers._embed, part._head = layers, copy.deepcopy(layers._embed), copy.deepcopy(part._head)
    return part


def _end_of_two_groups(model: Model) -> int:
    """Up to the second softmax layer, and `LEAST_LAYERS` where there are so many."""
    softmax = [i for i, layer in enumerate(model.layers) if not layer.is_linear][:2]
    return max(softmax[-1] + 1, min(LEAST_LAYERS, len(model.layers)))


def _reading(model: Model, chosen: Chosen, sizes: list[int]) -> Run:
    """Tokens in steps of these sizes through the last two layers up to a softmax one."""
    last = max(i for i, layer in enumerate(model.layers) if not layer.is_linear) + 1
    first = max(0, last - 2)
    layers, tokens = _own(model, first, last).model, _tokens(model, 1, sum(sizes))

    def forward(tokens: mx.array, cache: list[Any], last_only: bool) -> mx.array:
        return layers(tokens, cache, exact=model.exact)

    def run(times: int) -> None:
        for _ in range(times):
            cache = list(model.make_cache())[first:last]
            with choices.use(chosen):
                for _, states in prefill(tokens, forward, cache, sizes, every_position=True):
                    mx.eval(states)

    return run


def _tokens(model: Model, rows: int, count: int) -> mx.array:
    return mx.arange(rows * count).reshape(rows, count) % model.config.vocab_size


def _bounded(model: Model, tokens: int) -> int:
    return min(tokens, model.config.context_tokens)
