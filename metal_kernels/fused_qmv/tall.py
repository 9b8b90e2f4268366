"""The fused products of a few tokens on simdgroup matrices: eight tokens cost nearly what one costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.constants import BLOCKS, PACKS, TALL
from metal_kernels.launch import Kernel
from metal_kernels.packed import THREADGROUP_BYTES, Matrices, padded
from metal_kernels.quantized_moe.tiles import operand

HERE = Path(__file__).parent
INPUTS = ("x", "gate", "weight", *(f"{m}_{part}" for m in ("first", "second") for part in "wsb"), "residual")
KERNEL = Kernel(HERE / "tall_qmv.metal", INPUTS, ("first", "second"), (*PACKS, BLOCKS, TALL))
TILE = 16  # rows
# More simdgroups leave each fewer units of a token to keep in registers, and are refused by some pipelines of Apple's.
SIMDGROUPS = {"metal": 12, "cuda": 16}
MAX_UNITS = 8
AHEAD = 2  # tiles whose weights are under way


class Sizes(NamedTuple):
    """What is best for some matrices.

    Attributes:
        units: Of a token that a simdgroup keeps, where there are simdgroups enough; more where there are not.
        threadgroups: Each prepares the tokens again, which costs as much as some tiles.
    """

    units: int
    threadgroups: dict[str, int]


# On an H200 two threadgroups fit at once on each of 132 SMs: mini's head takes 79 us so, 82 with twice as many and 87 with 640.
# There the norm's product of four and eight tokens takes 12 us with 128 (13 to 14 with 256, or with 4 units), where
# fused_qmv.metal takes 18 and 39; the gate's 8, where that takes 10 and 17. Not timed on Apple hardware.
HEAD = Sizes(4, {"metal": 640, "cuda": 264})
LAYER = Sizes(2, {"metal": 128, "cuda": 128})


class Cut(NamedTuple):
    """How the product is cut.

    Attributes:
        kernel: Which one takes it.
        template: The kernel's arguments that follow from it.
        threadgroups: How many there are.
        threads: Of each.
    """

    kernel: Kernel
    template: list[tuple[str, Any]]
    threadgroups: int
    threads: int


def cut(name: str, matrices: Matrices, tokens: int, groups: int, dtype: mx.Dtype) -> Cut | None:
    """How the matrices are cut for inputs of ``dtype`` in ``groups`` groups; None where this kernel does not take them.

    It takes formats whose quarters of 32 or 64 values fill whole words, and on CUDA no float32, which the matrix units there
    do not multiply.
    """
    form, where = dict(matrices.first.template), choices.where()
    sizes = HEAD if name == "head" else LAYER
    K, held = form["K"], operand(where, dtype)
    unit = 64 if form["GROUP"] % 64 == 0 and K // groups % 64 == 0 else 32
    units, most = K // unit, SIMDGROUPS.get(where, SIMDGROUPS["metal"])
    own = max(min(sizes.units, units), -(-units // most))
    simdgroups = -(-units // own)
    factors = [0 if n == 4 else 2 * (n + TILE * 4) for n in matrices.first.factor_bytes(TILE)]
    memory = padded(simdgroups * max(8 * unit * held.size, 1024), 32 * (units if groups > 1 else simdgroups), *factors)
    is_known = form["BITS"] * unit // 4 % 32 == 0 and K // groups % unit == 0 and own <= MAX_UNITS
    if not is_known or memory > THREADGROUP_BYTES or (where == "cuda" and held == mx.float32):
        return None
    rows = [w.shape[-2] for w in matrices.all]
    wanted = -(-sum(rows) // (TILE * sizes.threadgroups.get(where, sizes.threadgroups["metal"])))
    tiles = choices.scaled(wanted, name, tokens)
    template = [("M", held), ("UNIT", unit), ("SIMDGROUPS", simdgroups), ("TILES", tiles), ("AHEAD", min(AHEAD, tiles))]
    return Cut(KERNEL, template, sum(-(-n // (TILE * tiles)) for n in rows), simdgroups * 32)
