"""The CUDA text of the mixture-of-experts kernels, with that backend's sizes and operands, run on the CPU."""

from __future__ import annotations

import mlx.core as mx
import pytest

from metal_kernels import launch
from metal_kernels.launch import Backend
from metal_kernels.quantized_moe.decode import decode_moe
from metal_kernels.quantized_moe.experts import Experts
from metal_kernels.quantized_moe.prefill import prefill_moe
from metal_kernels.quantized_moe.tiles import TILES
from tests.compare import assert_close
from tests.kernel_reference import assert_as_exact
from tests.metal_sim.cuda_host import cuda_kernel
from tests.metal_sim.marks import needs_simulator
from tests.moe_cases import MICRO, PLAIN, Case, naive_moe

HOST = Backend("cuda", cuda_kernel)
FORMATS = [("affine", 4, 64), ("affine", 8, 32), ("affine", 3, 32), ("affine", 6, 32), *MICRO, *PLAIN]
# Weights and h rounded to bfloat16 or float16.
ROUNDED = {mx.float32: 1e-6, mx.bfloat16: 6e-3, mx.float16: 1e-3}


@needs_simulator
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_decode(form):
    case = Case(form, 3, hidden=128, shared=64, residual=mx.float32)
    with launch.use(HOST):
        y = decode_moe(case.x, case.chosen, case.weights, Experts(*case.routed, case.shared), case.residual)
    naive = naive_moe(case.x, case.chosen, case.weights, *case.routed, case.shared, case.residual)
    assert_as_exact(y, naive, case.exact())


@needs_simulator
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_prefill(form):
    case = Case(form, 20, hidden=128, shared=64, residual=mx.float32)
    with launch.use(HOST):
        y = prefill_moe(case.x, case.chosen, case.weights, Experts(*case.routed, case.shared), case.residual)
    assert_close(y, case.exact(), ROUNDED[mx.bfloat16])


@needs_simulator
@pytest.mark.parametrize("dtype", list(ROUNDED))
@pytest.mark.parametrize("tile", TILES)
def test_tiles_and_operands(dtype, tile):
    case = Case(("affine", 4, 32), 21, top_k=2, dtype=dtype)
    with launch.use(HOST):
        y = prefill_moe(case.x, case.chosen, case.weights, Experts(*case.routed), None, tile)
    assert_close(y, case.exact(), ROUNDED[dtype])
