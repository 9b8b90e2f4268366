"""The size of a conversion as text: bits and bytes of each part, disk, memory."""

from __future__ import annotations

from ring_mlx.convert.conversion import CACHE_LIMIT_BYTES, CHUNK_WEIGHTS
from ring_mlx.convert.plan import Plan, by_part
from ring_mlx.convert.sources import Source
from ring_mlx.model.memory import GB, PLAIN_CONTEXT, WORKSPACE_BYTES, budget_bytes, cache_bytes

# Float32 weights that are held at one time, times the arrays that the fit of scales keeps of them.
FIT_ARRAYS = 14


def table(source: Source, plan: Plan) -> str:
    """The answer to ``--dry-run``."""
    rows = by_part(plan)
    width = max(len(part) for part, _, _ in rows)
    lines = [f"{'part':{width}} {'weights':>16} {'bits/weight':>12} {'bytes':>16}"]
    for part, n, size in rows:
        lines.append(f"{part:{width}} {n:16,} {8 * size / n:12.3f} {size:16,}")
    before = source.nbytes
    # The same for every model; the program itself comes on top.
    converting = CHUNK_WEIGHTS * 4 * FIT_ARRAYS + CACHE_LIMIT_BYTES
    context = min(PLAIN_CONTEXT, source.config.context_tokens)
    running = plan.nbytes + cache_bytes(source.config, context) + WORKSPACE_BYTES
    lines += [
        (
            f"source {before / GB:.3f} GB in {len({t.file for t in source.tensors.values()})} files, "
            f"result {plan.nbytes / GB:.3f} GB in {len(plan.shards)} ({plan.nbytes / before:.2f} of the source)"
        ),
        (
            f"memory: about {converting / GB:.1f} GB to convert, {running / GB:.1f} GB to run with {context:,} tokens "
            f"(this machine can give {budget_bytes() / GB:.1f} GB)"
        ),
    ]
    if plan.left_float:
        names = ", ".join(plan.left_float[:3]) + (" ..." if len(plan.left_float) > 3 else "")
        lines.append(f"left in float, as their rows do not divide into groups: {len(plan.left_float)} ({names})")
    return "\n".join(lines)
