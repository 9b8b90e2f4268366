"""Kernels prove themselves when a model is loaded, lest the first answer wait for it; knows no kernel."""

from __future__ import annotations

from contextlib import suppress

import mlx.core as mx

from metal_kernels import launch
from ring_mlx.model import Model

PREFILL_TOKENS = 9


def check_kernels(model: Model) -> None:
    """Call the model as for a short prompt and one more token, so that the kernels of both are tried now.

    A kernel tries itself wherever it is first wanted (`metal_kernels.proofs`); this only makes it earlier. Where all are
    proven nothing is computed. What fails besides the kernels fails again at the first answer, which can say so.
    """
    where = launch.backend()
    if where is None or where.ledger is None:
        return
    with suppress(RuntimeError, ValueError):
        ids = mx.arange(PREFILL_TOKENS + 1)[None] % model.config.vocab_size
        cache = model.make_cache()
        model(ids[:, :-1], cache, last_only=True)
        model(ids[:, -1:], cache)
