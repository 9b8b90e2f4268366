"""The mixture of experts as three dense products, for training: same parameters, same result, faster gradients.

With 16 small experts it is cheaper to run all of them as one wide SwiGLU, and to zero those that the router did not
choose, than to gather; the gradient of a dense product is a dense product. Knows `MoE`, not training.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ring_mlx.model.moe import MoE


def dense_moe(
    block: MoE,
    x: mx.array,
    residual: mx.array | None = None,
    logits: mx.array | None = None,
    loads: list[mx.array] | None = None,
) -> mx.array:
    """Same result as ``MoE.__call__``.

    Args:
        block: The module.
        x: [..., hidden] float32.
        residual: [..., hidden] to add to; None adds nothing.
        logits: The router's, [..., E]; None lets it score x.
        loads: If given, how many tokens chose each expert, [E], is appended.
    """
    chosen, weights = block.gate(x) if logits is None else block.gate.choose(logits)
    experts = block.switch_mlp
    E, inner, hidden = experts.up_proj.weight.shape
    one_hot = (chosen[..., None] == mx.arange(E)).astype(x.dtype)
    if loads is not None:
        loads.append(one_hot.sum(axis=tuple(range(one_hot.ndim - 1))))
    gate, up = (w.reshape(E * inner, hidden) for w in (experts.gate_proj.weight, experts.up_proj.weight))
    down = experts.down_proj.weight.transpose(0, 2, 1).reshape(E * inner, hidden)
    share = (one_hot * weights[..., None]).sum(axis=-2)
    h = nn.silu(x @ gate.T) * (x @ up.T)
    h = (h.reshape(*x.shape[:-1], E, inner) * share[..., None]).reshape(*x.shape[:-1], E * inner)
    y = h @ down
    if "shared_experts" in block:
        y = y + block.shared_experts(x)
    return y if residual is None else residual + y
