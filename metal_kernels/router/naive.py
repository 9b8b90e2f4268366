"""Group-limited sigmoid routing in float32 MLX operations."""

from __future__ import annotations

import mlx.core as mx

# MLX's CUDA backend (0.32.4) sorts and partitions no more.
MOST_ROWS_TO_SORT = 65535


def naive_route(
    logits: mx.array, bias: mx.array | None, top_k: int, n_group: int, topk_group: int, factor: float, normalize: bool
) -> tuple[mx.array, mx.array]:
    """Choose ``top_k`` experts a token out of its best groups.

    ::

        p = sigmoid(logits),  b = p + bias
        group score = sum of the two largest b of the group; only the topk_group best groups stay (others: -inf)
        chosen = the top_k largest b that stay, ties to the lower index
        w = p[chosen] / (sum p[chosen] + 1e-20) * factor

    The bias steers the choice and never the weight.

    Args:
        logits: [..., E], computed in float32 whatever the dtype.
        bias: ``expert_bias`` [E] float32, or None.
        top_k: Experts a token.
        n_group: Number of equal groups of experts.
        topk_group: Groups that stay.
        factor: ``routed_scaling_factor``.
        normalize: ``norm_topk_prob``; one expert alone is never normalised.

    Returns:
        Indices [..., top_k] int32 by falling b, and weights [..., top_k] float32.

    Source: arXiv 2510.19338 and the DeepSeek-V3 router, arXiv 2412.19437, section 2.1.2.
    """
    scores = mx.sigmoid(logits.astype(mx.float32))
    biased = scores if bias is None else scores + bias.astype(mx.float32)
    if n_group > 1:
        biased = keep_best_groups(biased, n_group, topk_group)
    chosen = mx.stop_gradient(mx.argsort(-biased, axis=-1)[..., :top_k])
    return chosen.astype(mx.int32), weights_of(scores, chosen, factor, normalize and top_k > 1)


def weights_of(scores: mx.array, chosen: mx.array, factor: float, normalize: bool) -> mx.array:
    """Of the chosen experts [..., top_k], by their scores [..., E]."""
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    if normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * factor


def keep_best_groups(biased: mx.array, n_group: int, topk_group: int) -> mx.array:
    """The scores [..., E] with those of all but the best groups at -inf."""
    grouped = mx.unflatten(biased, -1, (n_group, -1))
    kept = mx.argsort(-sum_of_best_two(grouped), axis=-1)[..., :topk_group]
    dropped = mx.put_along_axis(mx.full(grouped.shape[:-1], -mx.inf), kept, mx.array(0.0), axis=-1)
    return (grouped + dropped[..., None]).flatten(-2)


def sum_of_best_two(grouped: mx.array) -> mx.array:
    """Along the last axis."""
    if grouped.shape[-1] == 1:
        return grouped[..., 0]
    if grouped.size // grouped.shape[-1] <= MOST_ROWS_TO_SORT:
        return mx.topk(grouped, 2, axis=-1).sum(axis=-1)
    best = mx.argmax(grouped, axis=-1, keepdims=True)
    others = mx.where(mx.arange(grouped.shape[-1]) == best, -mx.inf, grouped)
    return grouped.max(axis=-1) + others.max(axis=-1)
