"""Tests the usual kernels when a model is loaded, so that the first answer does not wait for it."""

from __future__ import annotations

import hashlib
import time

import mlx.core as mx
from mlx.utils import tree_flatten

from metal_kernels import choices, launch
from ring_mlx.model.decode_step import MOST_TOKENS
from ring_mlx.model.model import Model
from ring_mlx.model.tentative import Tentative

PREFILL_TOKENS = 9
# Seconds after which no more lengths of speculative steps are tried; each has kernels of its own to build. The others are tried
# when a step has so many tokens.
STEPS_S = 2.0


def check_kernels(model: Model, *, speculates: bool = False) -> None:
    """Call the model as for a short prompt and one more token, so that the kernels of both are tried now.

    If it ``speculates``, steps of two tokens and more are tried too, as many lengths as take ``STEPS_S``.

    A kernel is tested when it is first needed (`metal_kernels.proofs`); this only makes that earlier. Where such a
    model was tried before on this machine nothing is done. What fails besides the kernels fails again at the first
    answer, which can say so.
    """
    where = launch.backend()
    if where is None or where.ledger is None:
        return
    kind = _kind(model) + (" and steps" if speculates else "")
    if where.ledger.has_tried(kind):
        return
    try:
        ids = mx.arange(PREFILL_TOKENS + 1)[None] % model.config.vocab_size
        cache = model.make_cache()
        model(ids[:, :-1], cache, last_only=True)
        model(ids[:, -1:], cache)
        began = time.perf_counter()
        for count in range(2, MOST_TOKENS + 1) if speculates else ():
            if time.perf_counter() - began > STEPS_S:
                break
            Tentative(model, cache, [[n % model.config.vocab_size for n in range(count)]]).keep(
                [1]
            )  # which folds states again
    except (RuntimeError, ValueError):
        return
    where.ledger.note_tried(kind)


def _kind(model: Model) -> str:
    """Equal where the same kernels are launched in the same way."""
    arrays = sorted((name, a.shape, str(a.dtype)) for name, a in tree_flatten(model.parameters()))
    streamed = [getattr(layer.mlp, "is_streamed", False) for layer in model.layers]
    whole = repr((model.config, arrays, streamed, sorted(choices.active().items()), launch.sources()))
    return f"model {hashlib.sha256(whole.encode()).hexdigest()[:16]}"
