"""Trust, but verify: a model's kernels are tried once against the plain operations before it serves; knows no kernel."""

from __future__ import annotations

import warnings

import mlx.core as mx

from metal_kernels import launch
from ring_mlx.model import Model

PREFILL_TOKENS = 9
# Rounding in half precision, and experts that flip because of it, stay well below; a wrong kernel is near 1 or above.
LIMIT = 0.3


def check_kernels(model: Model) -> None:
    """Run a few tokens through the kernels and through the plain operations, and turn kernels off if they disagree.

    It compiles the kernels of a decode step, which the first answer would have to wait for. A kernel that fails to
    build, or that computes nonsense on this machine, costs a warning and speed, but never an answer.
    """
    if launch.backend() is None:
        return
    try:
        found = _difference(model)
        problem = "" if found <= LIMIT else f"their logits differ by {found:.2g} relative RMS"
    except Exception as e:  # noqa: BLE001 whatever a compiler or a driver raises
        problem = " ".join(str(e).split())[:300] or type(e).__name__
    if problem:
        launch.turn_off()
        warnings.warn(
            f"[kernels] {problem}; plain operations are used instead, which are slower. Please report this.",
            stacklevel=3,
        )


def _difference(model: Model) -> float:
    fast = _logits(model)
    with launch.use(None):
        plain = _logits(model)
    error = mx.sqrt(((fast - plain) ** 2).mean() / mx.maximum((plain**2).mean(), 1e-30))
    return float(mx.where(mx.isnan(error), mx.inf, error))


def _logits(model: Model) -> mx.array:
    """Logits of a short prefill and of a decode step, one after the other."""
    ids = mx.arange(PREFILL_TOKENS + 1)[None] % model.config.vocab_size
    cache = model.make_cache()
    logits = [model(ids[:, :-1], cache, last_only=True), model(ids[:, -1:], cache)]
    return mx.concatenate(logits).astype(mx.float32)
