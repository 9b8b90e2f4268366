"""simdgroup_matrix, SIMD functions and wide accesses in the simulator."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_sim import MetalRunError, SimulatedKernel, metal_kernel
from tests.metal_sim.kernels import (
    APPLE_ELEMENTS,
    SIMD_SOURCE,
    TILE_HEADER,
    TILE_SOURCE,
    simd_arguments,
    tile_arguments,
    tile_reference,
    with_elements,
)
from tests.metal_sim.marks import needs_simulator

pytestmark = needs_simulator

DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])


@DTYPES
@pytest.mark.parametrize("is_transposed", [False, True], ids=["nn", "nt"])
@pytest.mark.parametrize(("mode", "order"), [("fast", 0), ("check", 0), ("check", 1)])
def test_tiled_product(dtype, is_transposed, mode, order):
    kernel = metal_kernel("tiles", ["a", "b"], ["out", "count"], TILE_SOURCE, TILE_HEADER, mode=mode, order=order)
    arguments = tile_arguments(dtype, is_transposed)
    out, count = kernel(**arguments)
    assert out.dtype == mx.float32
    np.testing.assert_allclose(np.array(out), np.array(tile_reference(arguments)), atol=2e-5, rtol=1e-5)
    assert count.item() == 6
    assert SimulatedKernel.last.threadgroup_bytes == 2 * 32 * 40 * dtype.size


def test_elements_of_a_lane_are_in_apples_order():
    kernel = metal_kernel("tiles", ["a", "b"], ["out", "count"], with_elements(APPLE_ELEMENTS), TILE_HEADER)
    arguments = tile_arguments(mx.float32, False)
    out, _ = kernel(**arguments)
    expected = tile_reference(arguments) * mx.arange(1, 65)[:, None]
    np.testing.assert_allclose(np.array(out), np.array(expected), rtol=1e-4, atol=1e-3)


def test_simd_functions_against_numpy():
    kernel = metal_kernel("simd_functions", ["x"], ["out"], SIMD_SOURCE)
    arguments = simd_arguments(mx.float32)
    out = np.array(kernel(**arguments)[0]).reshape(2, 32, 24)
    x = np.array(arguments["inputs"][0]).reshape(2, 32)
    lanes = np.arange(32)
    expected = {
        0: x.sum(1, keepdims=True) + 0 * x,
        1: x.prod(1, keepdims=True) + 0 * x,
        2: x.min(1, keepdims=True) + 0 * x,
        3: x.max(1, keepdims=True) + 0 * x,
        4: x.cumsum(1),
        5: x.cumsum(1) - x,
        6: x[:, ::-1],
        7: x[:, lanes ^ 5],
        8: np.where(lanes >= 3, x[:, lanes - 3], -1),
        9: np.where(lanes < 29, x[:, (lanes + 3) % 32], -1),
        10: x[:, 7:8] + 0 * x,
        11: x[:, (lanes - 4) % 32],
        12: x[:, (lanes + 4) % 32],
        16: x.reshape(2, 8, 4).sum(2).repeat(4, 1),
        17: x.reshape(2, 8, 4).max(2).repeat(4, 1),
        18: x[:, lanes // 4 * 4 + 2],
        19: x[:, :1] + 0 * x,
        20: (lanes == 0) + 0 * x,
    }
    for column, values in expected.items():
        np.testing.assert_array_equal(out[:, :, column], values, err_msg=str(column))


@pytest.mark.parametrize("type_", ["float4", "float3", "uint4", "half4", "uchar4", "ulong2"])
def test_wide_access_over_the_end_is_reported(type_):
    size = {"float4": 16, "float3": 16, "uint4": 16, "half4": 8, "uchar4": 4, "ulong2": 16}[type_]
    source = f"""
      uint i = thread_position_in_grid.x;
      {type_} v = ((const device {type_}*)x)[i];
      out[i] = float(v.x) + float(v.y);
    """
    kernel = metal_kernel("wide", ["x"], ["out"], source)
    with pytest.raises(MetalRunError, match="out of bounds: read"):
        kernel(
            inputs=[mx.zeros((32 * size // 4 - 1,))],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(32,)],
            output_dtypes=[mx.float32],
        )


@pytest.mark.parametrize("is_dense", [True, False])
def test_views_arrive_dense_or_as_they_are(is_dense):
    x = mx.arange(24).reshape(4, 6).astype(mx.float32).T[1:4]
    source = """
      uint i = thread_position_in_grid.x;
      out[i] = x[i / x_shape[1] * x_strides[0] + i % x_shape[1] * x_strides[1]] + (x_ndim - 2) + (x_strides[0] == 1);
    """
    kernel = metal_kernel("view", ["x"], ["out"], source, ensure_row_contiguous=is_dense)
    (out,) = kernel(
        inputs=[x], grid=(12, 1, 1), threadgroup=(12, 1, 1), output_shapes=[(3, 4)], output_dtypes=[mx.float32]
    )
    np.testing.assert_array_equal(np.array(out), np.array(x) + (0 if is_dense else 1))


@pytest.mark.parametrize(
    "dtype", [mx.bool_, mx.uint8, mx.int8, mx.uint16, mx.int16, mx.int32, mx.uint32, mx.int64, mx.uint64, mx.bfloat16]
)
def test_every_dtype_goes_in_and_out(dtype):
    x = (mx.arange(40) % 2).astype(dtype)
    kernel = metal_kernel(
        "copy", ["x", "s"], ["out"], "out[thread_position_in_grid.x] = s ? x[thread_position_in_grid.x] : T(0);"
    )
    (out,) = kernel(
        inputs=[x, True],
        template=[("T", dtype)],
        grid=(40, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(40,)],
        output_dtypes=[dtype],
    )
    assert out.dtype == dtype
    assert bool((out == x).all())
