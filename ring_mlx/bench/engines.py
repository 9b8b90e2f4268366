"""Our model and mlx-lm's behind one interface for timing: read a prompt, give tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step as mlx_lm_generate_step
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from ring_mlx.bench.config import BenchError
from ring_mlx.checkpoint.weights import lies_by_columns
from ring_mlx.generation.decoding import decode_rows, generate_step, prefill, step_sizes
from ring_mlx.model.config import LINEAR_TYPES
from ring_mlx.model.model import Model

OURS, THEIRS = "ring-mlx", "mlx-lm"


@dataclass(frozen=True)
class Engine:
    """A model with its library's loop: our `generate_step` or mlx-lm's.

    ``agree`` takes tokens that were chosen here to those that all processes go on with; None where this one is alone.
    """

    name: str
    model: Any
    agree: Callable[[mx.array], mx.array] | None = None

    def make_cache(self) -> Any:
        """An empty cache; more than one row of equal length may use it."""
        return make_prompt_cache(self.model)

    def tokens(self, prompt: mx.array, cache: Any, count: int, step: int) -> Iterator[Any]:
        """Read the prompt in steps, then yield ``count`` times, once a token (of each row), the likeliest.

        One row goes through the library's own loop; several rows of a prompt [B, T] go through ours for both.
        """
        is_ours = self.name == OURS
        choose = None if self.agree is None else self._greedy
        if prompt.shape[0] > 1:
            # mlx-lm's head takes all positions that it is given, so there the last token is read apart.
            apart = 0 if is_ours else 1
            sizes = step_sizes(prompt.shape[1] - apart, step) + [1] * apart
            forward = self.model if is_ours else lambda tokens, cache, last_only: self.model(tokens, cache=cache)
            *_, (_, logits) = prefill(prompt, forward, cache, sizes)
            yield from (ids for ids, _ in decode_rows(logits, forward, cache, max_tokens=count, sampler=choose))
        elif is_ours:
            yield from generate_step(
                prompt[0], self.model, cache, max_tokens=count, sampler=choose, prefill_step_size=step
            )
        else:
            yield from mlx_lm_generate_step(
                prompt[0], self.model, max_tokens=count, prompt_cache=cache, prefill_step_size=step
            )

    def _greedy(self, logits: mx.array) -> mx.array:
        """[B, vocab] to the likeliest ids [B], the same on all processes."""
        assert self.agree is not None
        return self.agree(mx.argmax(logits, axis=-1))


def theirs(model: Model, raw: dict[str, Any]) -> Engine:
    """Stock mlx-lm's model on the arrays of ours.

    Copied are its router's weights, into its own precision, and on a CPU the matrices that lie by columns, into rows,
    as mlx-lm itself would load them. ``raw`` is the config.json. Raises BenchError if mlx-lm has no such model or
    cannot hold these weights.
    """
    # Not at the top: not every version of mlx-lm has it.
    from mlx_lm.models import bailing_moe_linear as stock

    if raw.get("model_type") not in LINEAR_TYPES:
        raise BenchError(f"--vs runs Ring-linear models, not {raw.get('model_type')!r}; leave it out.")
    arrays = dict(tree_flatten(model.parameters()))
    dtype = model.model.norm.weight.dtype
    for name, array in arrays.items():
        if lies_by_columns(name, array):
            arrays[name] = mx.contiguous(array)
        if ".mlp.gate." in name and not name.endswith("expert_bias") and array.dtype == mx.float32:
            arrays[name] = array.astype(dtype)
    modules = dict(model.named_modules())

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        mine = modules.get(path)
        if mine is None or "scales" not in mine or not hasattr(module, "to_quantized"):
            return False
        return {"bits": mine.bits, "group_size": mine.group_size, "mode": getattr(mine, "mode", "affine")}

    try:
        other = stock.Model(stock.ModelArgs.from_dict(raw))
        nn.quantize(other, class_predicate=settings)
        other.load_weights(list(arrays.items()))
    except (ValueError, TypeError, KeyError, AssertionError) as e:
        raise BenchError(f"mlx-lm cannot hold this model ({_short(e)}); leave --vs out.") from None
    other.eval()
    mx.eval(other.parameters())
    return Engine(THEIRS, other)


def seeded_cache(ours: Engine, other: Engine, prompt: mx.array, step: int) -> Any:
    """mlx-lm's cache after a prompt that ours has read, with its state in mlx-lm's precision."""
    cache = ours.make_cache()
    for _ in prefill(prompt, ours.model, cache, step_sizes(prompt.shape[1], step)):
        pass
    found = other.make_cache()
    dtype = other.model.model.norm.weight.dtype
    for new, old in zip(found, cache, strict=True):
        if isinstance(old, ArraysCache):
            new[0] = old[0].astype(dtype)
        else:
            new.keys, new.values, new.offset = old.keys, old.values, old.offset
    mx.eval([c.state for c in found])
    del cache
    mx.clear_cache()
    return found


def _short(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) < 160 else f"{words[:160]}..."
