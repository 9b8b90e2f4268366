"""Whether two choices of experts agree: near ties may fall either way, and weights are those of what was chosen."""

from __future__ import annotations

import mlx.core as mx

from metal_kernels.agreement import Judged
from metal_kernels.router.naive import keep_best_groups, sum_of_best_two, weights_of

# Sigmoids of float32 logits differ in their last bits, 1e-7; what is no further apart than this is a tie.
NEAR = 1e-5

Arguments = tuple[mx.array, "mx.array | None", int, int, int, float, bool]


def agree_on_experts(
    operation: str, arguments: Arguments, found: tuple[mx.array, mx.array], expected: tuple[mx.array, mx.array]
) -> Judged:
    """The largest distance between scores of what was chosen and what `naive_route` chooses, and what is wrong."""
    logits, bias, top_k, n_group, topk_group, factor, normalize = arguments
    (chosen, weights), (right, _) = found, expected
    kinds = [(x.shape, x.dtype) for x in (*found, *expected)]
    if kinds[:2] != kinds[2:]:
        return None, f"{operation} returns {kinds[:2]} instead of {kinds[2:]}"
    scores = mx.sigmoid(logits.astype(mx.float32))
    biased = scores if bias is None else scores + bias.astype(mx.float32)
    if not mx.isfinite(biased).all():
        return None, None
    ordered = mx.sort(chosen, axis=-1)
    if ordered.min() < 0 or ordered.max() >= logits.shape[-1] or (ordered[..., 1:] == ordered[..., :-1]).any():
        return None, f"{operation} chooses an expert that is not there, or one twice"
    kept = keep_best_groups(biased, n_group, topk_group) if n_group > 1 else biased
    gap = mx.take_along_axis(kept, right, axis=-1) - mx.take_along_axis(biased, chosen, axis=-1)
    worst = float(mx.where(_groups_are_clear(biased, n_group, topk_group), mx.abs(gap).max(axis=-1), 0).max())
    if worst > NEAR * (1 + float(mx.abs(biased).max())):
        return worst, f"{operation} chooses an expert whose score is {worst:.2g} away from the right one's"
    due = weights_of(scores, chosen, factor, normalize and top_k > 1)
    error = float((mx.abs(weights - due) / mx.maximum(mx.abs(due), 1e-6)).max())
    if not error <= 1e-3:
        return error, f"{operation} weighs an expert wrongly, by a factor of {1 + error:.2g}"
    return max(worst, error), ""


def _groups_are_clear(biased: mx.array, n_group: int, topk_group: int) -> mx.array:
    """Which tokens' groups are chosen beyond a near tie [...]: of the others, all experts may be other ones."""
    if n_group == 1 or topk_group >= n_group:
        return mx.ones(biased.shape[:-1], mx.bool_)
    groups = -mx.sort(-sum_of_best_two(mx.unflatten(biased, -1, (n_group, -1))), axis=-1)
    return groups[..., topk_group - 1] - groups[..., topk_group] > 2 * NEAR * (1 + mx.abs(biased).max(axis=-1))
