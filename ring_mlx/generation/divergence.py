"""How far a model's predictions are from a reference's, where both read the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# Rows of logits that are compared at one time.
HEAD_TOKENS = 128
Floats = npt.NDArray[np.float64]


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
        """How often the likeliest token differs."""
        return 1 - self.top1_agreement

    @property
    def perplexity_ratio(self) -> float:
        """The model's perplexity over the reference's."""
        return self.perplexity / self.reference_perplexity


def divergence(reference: mx.array, model: mx.array, targets: mx.array) -> Floats:
    """KL(reference || model), whether the argmax differs, and the losses of the targets, the reference's first.

    ::

        KL_t = sum over v of p_reference(v) (log p_reference(v) - log p_model(v))

    Args:
        reference, model: Logits [n, vocab] float32.
        targets: The tokens that came [n].

    Returns:
        [4, n].
    """
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (reference, model))
    kl = (mx.exp(p) * (p - q)).sum(axis=-1)
    flips = mx.argmax(reference, axis=-1) != mx.argmax(model, axis=-1)
    losses = [-mx.take_along_axis(x, targets[:, None], axis=-1)[:, 0] for x in (p, q)]
    return np.array(mx.stack([kl, flips.astype(mx.float32), *losses]), dtype=np.float64)


def summary(measured: Sequence[Floats]) -> Divergence:
    """Of all positions of what `divergence` gave."""
    kl, flips, theirs, ours = np.concatenate(measured, axis=1)
    return Divergence(
        len(kl),
        float(kl.mean()),
        float(np.median(kl)),
        float(np.quantile(kl, 0.99)),
        1 - float(flips.mean()),
        math.exp(min(float(ours.mean()), 700.0)),
        math.exp(min(float(theirs.mean()), 700.0)),
    )
