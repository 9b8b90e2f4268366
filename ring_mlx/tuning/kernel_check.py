"""Tests the usual kernels when a model is loaded, so that the first answer does not wait for it."""

from __future__ import annotations

import hashlib

import mlx.core as mx
from mlx.utils import tree_flatten

from metal_kernels import choices, launch
from ring_mlx.model.model import Model

PREFILL_TOKENS = 9


def check_kernels(model: Model) -> None:
    """Call the model as for a short prompt and one more token, so that the kernels of both are tried now.

    A kernel is tested when it is first needed (`metal_kernels.proofs`); this only makes that earlier. Where such a
    model was tried before on this machine nothing is done. What fails besides the kernels fails again at the first
    answer, which can say so.
    """
    where = launch.backend()
    if where is None or where.ledger is None:
        return
    kind = _kind(model)
    if where.ledger.has_tried(kind):
        return
    try:
        ids = mx.arange(PREFILL_TOKENS + 1)[None] % model.config.vocab_size
        cache = model.make_cache()
        model(ids[:, :-1], cache, last_only=True)
        model(ids[:, -1:], cache)
    except (RuntimeError, ValueError):
        return
    where.ledger.note_tried(kind)


def _kind(model: Model) -> str:
    """Equal where the same kernels are launched in the same way."""
    arrays = sorted((name, a.shape, str(a.dtype)) for name, a in tree_flatten(model.parameters()))
    streamed = [getattr(layer.mlp, "is_streamed", False) for layer in model.layers]
    whole = repr((model.config, arrays, streamed, sorted(choices.active().items()), launch.sources()))
    return f"model {hashlib.sha256(whole.encode()).hexdigest()[:16]}"
