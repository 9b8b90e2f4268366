"""How long a calibrated conversion takes on this machine, from a sample of its work at its own shapes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ring_mlx.convert.activations import hessian, matrices_together
from ring_mlx.convert.plan import LAST_STAGE, ROUTED, Output, stage_of
from ring_mlx.convert.recipes import Setting
from ring_mlx.convert.second_order import prepare, solve
from ring_mlx.model.config import RingConfig

SAMPLED_WEIGHTS, SAMPLED_TOKENS = 1 << 19, 1024
# Wider matrices are sampled with so many columns; a Hessian's time grows with their square, its factor's with the cube.
MOST_COLUMNS = 1024
# The later of two matrices with a common input, whose Hessian is prepared once.
SHARING = ("g_proj.weight", "up_proj.weight")
# How often the text goes through a layer: to see what each matrix gets, and to see what the next layer gets.
PASSES = 2
# The share of a stage that is over when its matrices are solved for.
SOLVED = 0.9


def kind_of(stage: int, outputs: Sequence[Output]) -> str:
    """Stages of a kind take equally long."""
    if stage in (0, LAST_STAGE):
        return "the embedding" if stage == 0 else "the head"
    return f"layers of {sum(o.count for o in outputs if ROUTED in o.name)}"


def stage_seconds(outputs: Sequence[Output], config: RingConfig, tokens: int) -> dict[str, float]:
    """Seconds of a stage of each kind, for a text of so many tokens."""
    stages: dict[int, list[Output]] = {}
    for o in outputs:
        stages.setdefault(stage_of(o.name), []).append(o)
    known: dict[tuple[int, Setting], tuple[float, float, float]] = {}
    found: dict[str, float] = {}
    for stage, some in stages.items():
        if (kind := kind_of(stage, some)) in found:
            continue
        found[kind] = 0.0
        for o in some:
            if o.setting is None or o.copied or o.setting.mode != "affine":
                continue
            *_, rows, cols = o.shape
            count = math.prod(o.shape[:-2])
            if (cols, o.setting) not in known:
                known[cols, o.setting] = _sample(rows, cols, o)
            hessian_s, prepare_s, solve_s = known[cols, o.setting]
            reached = tokens * (config.num_experts_per_tok if ROUTED in o.name else 1)
            # A product with the rows of a matrix costs as much a token as one with so many columns.
            forward_s = PASSES * reached * hessian_s * rows / cols if stage else 0.0
            own_s = 0.0 if o.name.endswith(SHARING) else reached * hessian_s + count * prepare_s
            found[kind] += forward_s + own_s + o.count * solve_s
    return found


def _sample(rows: int, cols: int, output: Output) -> tuple[float, float, float]:
    """Seconds of a token in a Hessian, of preparing one, and of solving for a weight."""
    assert output.setting is not None
    setting, together = output.setting, min(math.prod(output.shape[:-2]), matrices_together(rows, cols))
    wider = max(1.0, cols / MOST_COLUMNS)
    cols = min(cols, MOST_COLUMNS)
    x = mx.random.normal((SAMPLED_TOKENS, cols), key=mx.random.key(0))
    h, hessian_s = _timed(lambda: hessian([x]))
    stack = mx.broadcast_to(h, (together, cols, cols))
    inputs, prepare_s = _timed(lambda: prepare(stack, setting.group_size))
    rows = min(rows, max(1, SAMPLED_WEIGHTS // (cols * together)))
    w = mx.random.normal((together, rows, cols), key=mx.random.key(1))
    _, solve_s = _timed(lambda: solve(w, inputs, setting, mx.bfloat16))
    return hessian_s / SAMPLED_TOKENS * wider**2, prepare_s / together * wider**3, solve_s / w.size * wider


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Where kernels are compiled first, the second time."""
    for _ in range(1 if mx.default_device() == mx.cpu else 2):
        started = time.perf_counter()
        found = work()
        mx.eval(found)
        took_s = time.perf_counter() - started
    return found, took_s
