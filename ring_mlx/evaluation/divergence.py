"""The divergence of a model's predictions from a reference's on the same tokens.

`ring_mlx.convert.report` reads both a layer at a time, for models that do not fit into memory together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.shards import safetensors_in
from ring_mlx.errors import NoFitError, OptionError
from ring_mlx.evaluation.perplexity import Floats, nats, scored_logits, windows
from ring_mlx.model import memory
from ring_mlx.model.model import Model
from ring_mlx.system.progress import Progress

HEAD_TOKENS = 128  # rows of logits that are compared at one time


@dataclass(frozen=True)
class Divergence:
    """Over counted tokens: KL(reference || model) in nats, how often the likeliest token is the same, perplexities."""

    tokens: int
    kl_mean: float
    kl_median: float
    kl_99: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float

    @property
    def flips(self) -> float:
        return 1 - self.top1_agreement

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.reference_perplexity


def divergence(reference: mx.array, model: mx.array, targets: mx.array) -> Floats:
    """KL(reference || model), whether the argmax differs, and the nats of the targets, the reference's first [4, n].

    ::

        KL_t = sum over v of p_reference(v) (log p_reference(v) - log p_model(v))

    Args:
        reference, model: Logits [n, vocab] float32.
        targets: The tokens that came [n].
    """
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (reference, model))
    kl = (mx.exp(p) * (p - q)).sum(axis=-1)
    flips = mx.argmax(reference, axis=-1) != mx.argmax(model, axis=-1)
    losses = [nats(x, targets) for x in (reference, model)]
    return np.array(mx.stack([kl, flips.astype(mx.float32), *losses]), dtype=np.float64)


def summary(measured: Sequence[Floats]) -> Divergence:
    """Over all positions of what `divergence` gave."""
    kl, flips, theirs, ours = np.concatenate(measured, axis=1)
    middle, high = np.quantile(kl, [0.5, 0.99])
    perplexities = (math.exp(min(float(losses.mean()), 700.0)) for losses in (ours, theirs))
    return Divergence(len(kl), float(kl.mean()), float(middle), float(high), 1 - float(flips.mean()), *perplexities)


def check_same_tokens(ours: TokenizerWrapper, theirs: TokenizerWrapper, text: str, name: str) -> None:
    if list(ours.encode(text)) != list(theirs.encode(text)):
        raise OptionError(f"--kl {name} splits the text into other tokens; give a model of the same tokenizer.")


def check_both_fit(model: Model, reference: Path) -> None:
    """Raises NoFitError, before the reference is read, if memory cannot hold it beside the model."""
    ours = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    theirs, room = sum(f.stat().st_size for f in safetensors_in(reference)), memory.budget_bytes()
    if ours + theirs + memory.WORKSPACE_BYTES > room:
        raise NoFitError(
            f"this model takes {ours / memory.GB:.1f} GB and {reference.name} {theirs / memory.GB:.1f} GB, but this "
            f"machine can give {room / memory.GB:.1f} GB; compare a conversion with its source layer by layer with "
            "`ring-mlx convert --report`."
        )


def diverge(
    model: Model, reference: Model, ids: Sequence[int], window: int, stride: int, progress: Progress | None = None
) -> Divergence:
    """Read a text with both models, of one vocabulary, in the windows of `perplexity.perplexity`.

    Raises OptionError if the vocabularies differ, or as for `perplexity.windows`.
    """
    sizes = model.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise OptionError(f"--kl compares vocabularies of {sizes[0]} and {sizes[1]} tokens; give a model of the same.")
    found = []
    for start, first, end in windows(len(ids), window, stride):
        both = (scored_logits(m, ids[start:end], first - start) for m in (reference, model))
        for (left, targets), (right, _) in zip(*both, strict=True):
            for at in range(0, left.shape[0], HEAD_TOKENS):
                rows = slice(at, at + HEAD_TOKENS)
                found.append(divergence(left[rows], right[rows], targets[rows]))
        if progress:
            progress(end - 1, len(ids) - 1)
    return summary(found)


def table(found: Divergence, reference: str) -> str:
    return (
        f"KL({reference} || this): mean {found.kl_mean:.6f}, median {found.kl_median:.6f}, 99 % {found.kl_99:.6f} nats "
        f"over {found.tokens:,} tokens; same likeliest token {found.top1_agreement:.2%}; perplexity "
        f"{found.perplexity:.4f}, the reference's {found.reference_perplexity:.4f}"
    )
