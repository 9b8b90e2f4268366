"""MLX's own kernels, compiled from their headers, against MLX's CPU ops; none races."""

from __future__ import annotations

import pytest

from tests.metal_sim.marks import needs_simulator
from tests.metal_sim.mlx_kernels import CASES, make
from tests.metal_sim.runtime import MetalRunError, Options

pytestmark = [needs_simulator, pytest.mark.slow]

# These order memory within a SIMD-group by its operations in step, without the barrier that Metal asks for.
UNORDERED = ("gated_delta_f32", "gated_delta_bf16")


@pytest.mark.parametrize("name", CASES)
def test_fast(name):
    case = make(name)
    case.assert_right(case.run("fast", Options()))


@pytest.mark.parametrize("name", CASES)
def test_check(name):
    case = make(name)
    case.assert_right(case.run("check", Options(simd_ops_order=name in UNORDERED)))


def test_memory_ordered_by_simd_operations_alone_is_reported():
    with pytest.raises(MetalRunError, match="race within a simdgroup"):
        make(UNORDERED[0]).run("check", Options())
