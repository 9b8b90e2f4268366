"""Some of MLX's own Metal kernels, from the headers of its wheel, each with arguments and what MLX's CPU ops say.

They exercise what our kernels use too: quantized products, simdgroup_matrix, softmax, attention, delta-rule chunks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.gated_delta import gated_delta_ops

from tests.metal_sim.build import KERNELS, MLX_INCLUDE, build
from tests.metal_sim.entry import kernel_parameters
from tests.metal_sim.kernel import NUMPY_TYPES, from_numpy, to_numpy
from tests.metal_sim.runtime import Buffer, Options, dispatch

METAL_NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
AIR_NAMES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
STEEL_NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
QUANTIZED = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
Argument = "mx.array | npt.NDArray[np.generic] | Output"


class Output(NamedTuple):
    """An output buffer."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True)
class Case:
    """One dispatch of one kernel.

    Attributes:
        headers: What to include, relative to MLX's kernel folder; the last one defines the kernel.
        function: The kernel, and its template arguments as Metal text.
        arguments: Buffers by index.
        grid: In threads.
        references: What each output should hold.
        tolerance: Largest error, relative to the largest reference value (or to 1).
        air_name: The kernel's name in MLX's compiled library.
        constants: Values of function constants.
    """

    headers: tuple[str, ...]
    function: tuple[str, str]
    arguments: dict[int, Argument]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    references: Sequence[mx.array]
    tolerance: float
    air_name: str
    constants: dict[int, int] = field(default_factory=dict)

    def buffers(self, n: int, names: dict[int, str]) -> tuple[list[Buffer | None], list[tuple[Buffer, Output]]]:
        """Fresh buffers for a run: all by index, and the outputs."""
        placed: list[Buffer | None] = [None] * n
        outputs = []
        for i, value in self.arguments.items():
            name = names.get(i, "?")
            if isinstance(value, Output):
                zeros = np.zeros(value.shape, NUMPY_TYPES[value.dtype])
                placed[i] = buffer = Buffer(zeros, name, is_writable=True, is_initialized=False)
                outputs.append((buffer, value))
            else:
                placed[i] = Buffer(to_numpy(value) if isinstance(value, mx.array) else value, name)
        return placed, outputs

    def run(self, mode: str, options: Options) -> list[npt.NDArray[np.generic]]:
        """Compile from source, run, and return the bits of the outputs."""
        name, template = self.function
        text = (MLX_INCLUDE / KERNELS / self.headers[-1]).read_text(encoding="utf-8")
        parameters = kernel_parameters(text, name)
        source = "".join(f'#include "{KERNELS}/{h}"\n' for h in self.headers)
        library = build(source, f"{name}<{template}>", parameters, mode, name, self.constants)
        names = {p.buffer: p.name for p in parameters if p.buffer is not None}
        placed, outputs = self.buffers(1 + max(names), names)
        dispatch(library, placed, self.grid, self.threadgroup, mode, options)
        return [b.array().reshape(o.shape) for b, o in outputs]

    def assert_right(self, results: Sequence[npt.NDArray[np.generic]]) -> None:
        """Every output is near its reference."""
        wanted = [a for a in self.arguments.values() if isinstance(a, Output)]
        for bits, output, reference in zip(results, wanted, self.references, strict=True):
            got = np.array(from_numpy(bits, output.dtype).astype(mx.float32))
            expected = np.array(reference.astype(mx.float32)).reshape(got.shape)
            error = np.abs(got - expected).max()
            assert error <= self.tolerance * max(1.0, float(np.abs(expected).max()))


def _normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def _ints(*values: int) -> npt.NDArray[np.generic]:
    return np.array(values, np.int32)


def _longs(*values: int) -> npt.NDArray[np.generic]:
    return np.array(values, np.int64)


def _struct(*parts: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A parameter struct from its fields in order."""
    return np.frombuffer(b"".join(p.tobytes() for p in parts), np.uint8)


def _strides(a: mx.array) -> npt.NDArray[np.generic]:
    return _longs(*[int(np.prod(a.shape[i + 1 :])) for i in range(a.ndim)])


def _groups(groups: Sequence[int], threadgroup: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, z = (g * t for g, t in zip(groups, threadgroup, strict=True))
    return x, y, z


def qmv(dtype: mx.Dtype, bits: int, tolerance: float, M: int = 1, N: int = 512, K: int = 1024) -> Case:
    """Quantized matrix times vectors."""
    x, w = _normal(M, K, dtype=dtype), _normal(N, K, dtype=dtype) * 0.1
    quantized, scales, biases = mx.quantize(w, 64, bits)
    wide = mx.dequantize(quantized, scales.astype(mx.float32), biases.astype(mx.float32), 64, bits)
    return Case(
        QUANTIZED,
        ("affine_qmv_fast", f"{METAL_NAMES[dtype]}, 64, {bits}, false"),
        {0: quantized, 1: scales, 2: biases, 3: x, 4: Output((M, N), dtype), 5: _ints(K), 6: _ints(N)},
        _groups((M, (N + 7) // 8, 1), (32, 2, 1)),
        (32, 2, 1),
        [x.astype(mx.float32) @ wide.T],
        tolerance,
        f"affine_qmv_fast_{AIR_NAMES[dtype]}_gs_64_b_{bits}_batch_0_pr_0_hgs_0_r_4",
    )


def gather_qmv() -> Case:
    """Quantized matrices chosen by index times vectors."""
    E, N, K = 4, 128, 512
    x, w = _normal(3, 1, K), _normal(E, N, K) * 0.1
    quantized, scales, biases = mx.quantize(w, 64, 4)
    right = mx.array([[1, 3], [0, 2], [2, 2]], mx.uint32)
    left = mx.array([[0, 0], [1, 1], [2, 2]], mx.uint32)
    reference = mx.gather_qmm(
        x[:, None], quantized, scales, biases, rhs_indices=right, transpose=True, group_size=64, bits=4
    )
    return Case(
        QUANTIZED,
        ("affine_gather_qmv_fast", "float, 64, 4"),
        {
            0: quantized,
            1: scales,
            2: biases,
            3: x,
            4: left,
            5: right,
            6: Output((6, 1, N), mx.float32),
            7: _ints(K),
            8: _ints(N),
            9: _ints(1),
            10: _ints(*x.shape),
            11: _strides(x),
            12: _ints(1),
            13: _ints(*quantized.shape),
            14: _strides(quantized),
            15: _strides(scales),
            16: _strides(biases),
            17: _ints(1),
            18: _ints(6),
            19: _longs(1),
            20: _longs(1),
        },
        _groups((1, N // 8, 6), (32, 2, 1)),
        (32, 2, 1),
        [reference],
        1e-4,
        "affine_gather_qmv_fast_float_gs_64_b_4",
    )


def qmm(dtype: mx.Dtype, tolerance: float, M: int = 40, N: int = 96, K: int = 256) -> Case:
    """Quantized matrix product on simdgroup_matrix."""
    x, w = _normal(M, K, dtype=dtype), _normal(N, K, dtype=dtype) * 0.1
    quantized, scales, biases = mx.quantize(w, 64, 4)
    wide = mx.dequantize(quantized, scales.astype(mx.float32), biases.astype(mx.float32), 64, 4)
    aligned = "true" if N % 32 == 0 else "false"
    return Case(
        QUANTIZED,
        ("affine_qmm_t", f"{METAL_NAMES[dtype]}, 64, 4, {aligned}, false"),
        {0: quantized, 1: scales, 2: biases, 3: x, 4: Output((M, N), dtype), 5: _ints(K), 6: _ints(N), 7: _ints(M)},
        _groups(((N + 31) // 32, (M + 31) // 32, 1), (32, 2, 2)),
        (32, 2, 2),
        [x.astype(mx.float32) @ wide.T],
        tolerance,
        f"affine_qmm_t_{AIR_NAMES[dtype]}_gs_64_b_4_alN_{aligned}_batch_0",
    )


def steel_gemm(dtype: mx.Dtype, tolerance: float, bm: int = 32, M: int = 100, N: int = 90, K: int = 72) -> Case:
    """Matrix product on simdgroup_matrix, ragged in every direction."""
    a, b = _normal(M, K, dtype=dtype), _normal(K, N, dtype=dtype)
    bn, bk = bm, 16
    columns, rows = (N + bn - 1) // bn, (M + bm - 1) // bm
    parameters = _struct(_ints(M, N, K, K, N, N, columns, rows), _longs(0, 0, 0), _ints(0, K // bk, 0, 0))
    name = STEEL_NAMES[dtype]
    return Case(
        ("steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h"),
        ("gemm", f"{METAL_NAMES[dtype]}, {bm}, {bn}, {bk}, 2, 2, false, false, float"),
        {0: a, 1: b, 3: Output((M, N), dtype), 4: parameters},
        _groups((columns, rows, 1), (32, 2, 2)),
        (32, 2, 2),
        [a.astype(mx.float32) @ b.astype(mx.float32)],
        tolerance,
        f"steel_gemm_fused_nn_{name}_{name}_bm{bm}_bn{bn}_bk{bk}_wm2_wn2",
        {10: 0, 100: 0, 110: 0, 200: M % bm == 0, 201: N % bn == 0, 202: K % bk == 0},
    )


def softmax(dtype: mx.Dtype, tolerance: float, D: int = 1000) -> Case:
    """Softmax of rows."""
    x = _normal(6, D, dtype=dtype) * 3
    threads = ((D + 3) // 4 + 31) // 32 * 32
    return Case(
        ("softmax.h",),
        ("softmax_single_row", f"{METAL_NAMES[dtype]}, {METAL_NAMES[dtype]}"),
        {0: x, 1: Output((6, D), dtype), 2: _ints(D)},
        _groups((6, 1, 1), (threads, 1, 1)),
        (threads, 1, 1),
        [mx.softmax(x, -1)],
        tolerance,
        f"block_softmax_{STEEL_NAMES[dtype]}",
    )


def sdpa_vector(dtype: mx.Dtype, tolerance: float, L: int, T: int = 1, is_causal: bool = False) -> Case:
    """Attention of few queries."""
    B, H, G, D = 1, 4, 2, 64
    q, k, v = _normal(B, H, T, D, dtype=dtype), _normal(B, G, L, D, dtype=dtype), _normal(B, G, L, D, dtype=dtype)
    reference = mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask="causal" if is_causal else None)
    return Case(
        ("sdpa_vector.h",),
        ("sdpa_vector", f"{METAL_NAMES[dtype]}, {D}, {D}"),
        {
            0: q,
            1: k,
            2: v,
            3: Output((B, H, T, D), dtype),
            4: _ints(H // G),
            5: _ints(L),
            6: _longs(L * D),
            7: _longs(D),
            8: _longs(L * D),
            9: _longs(D),
            10: np.array([D**-0.5], np.float32),
        },
        _groups((B * H, T, 1), (1024, 1, 1)),
        (1024, 1, 1),
        [reference],
        tolerance,
        f"sdpa_vector_{AIR_NAMES[dtype]}_64_64",
        {20: 0, 21: 0, 22: is_causal, 23: 0, 24: 0, 25: 0, 26: 0},
    )


def steel_attention(dtype: mx.Dtype, tolerance: float, L: int, is_causal: bool) -> Case:
    """Attention of many queries on simdgroup_matrix."""
    B, H, D, block = 1, 2, 64, 32
    q, k, v = (_normal(B, H, L, D, dtype=dtype) for _ in range(3))
    blocks, rest = -(-L // block), L - L // block * block
    strides = (H * L * D, L * D, D)
    parameters = _struct(
        _ints(B, H, D, L, L, 1),
        np.array([D**-0.5], np.float32),
        _ints(blocks, blocks, L // block, L // block, rest, rest, 0),
        _longs(*strides * 4),
    )
    name = STEEL_NAMES[dtype]
    return Case(
        ("steel/attn/kernels/steel_attention.h",),
        ("attention", f"{METAL_NAMES[dtype]}, {block}, {block}, {D}, {D}, 4, 1, {METAL_NAMES[dtype]}, float"),
        {0: q, 1: k, 2: v, 3: Output((B, H, L, D), dtype), 4: parameters},
        _groups((blocks, H, B), (32, 4, 1)),
        (32, 4, 1),
        [mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask="causal" if is_causal else None)],
        tolerance,
        f"steel_attention_{name}_bq32_bk32_bd64_bv64_wm4_wn1_mask{name}",
        {200: L % block == 0, 201: L % block == 0, 300: 0, 301: is_causal, 302: 0, 303: 0},
    )


def gated_delta(dtype: mx.Dtype, tolerance: float, T: int) -> Case:
    """A chunked delta rule on simdgroup_matrix."""
    B, H, D = 1, 16, 128
    q, k, v = _normal(B, T, H, D, dtype=dtype) * 0.1, _normal(B, T, H, D, dtype=dtype) * 0.1, _normal(B, T, H, D)
    v = v.astype(dtype)
    g = mx.random.uniform(0.8, 1.0, (B, T, H)).astype(dtype)
    beta = mx.random.uniform(0, 1, (B, T, H)).astype(dtype)
    state = _normal(B, H, D, D)
    text = (MLX_INCLUDE / KERNELS / "gated_delta_update.h").read_text(encoding="utf-8")
    return Case(
        ("gated_delta_update.h",),
        ("gated_delta_fused_chunk", f"{METAL_NAMES[dtype]}, {D}, {D}, {H}, {H}, 8"),
        {
            0: q,
            1: k,
            2: v,
            3: state,
            4: g,
            5: beta,
            6: Output((B, T, H, D), dtype),
            7: Output(state.shape, mx.float32),
            8: _ints(T),
        },
        (32, D // 8, B * H),
        (32, 4, 1),
        gated_delta_ops(q, k, v, g, beta, state),
        tolerance,
        f"gated_delta_fused_chunk_{AIR_NAMES[dtype]}_128_128_16_16_8",
        {int(i): 0 for i in re.findall(r"function_constant\((\d+)\)\]\];", text)},
    )


f32, f16, bf16 = mx.float32, mx.float16, mx.bfloat16
CASES: dict[str, Callable[[], Case]] = {
    "qmv_f32": lambda: qmv(f32, 4, 1e-4),
    "qmv_bf16": lambda: qmv(bf16, 4, 3e-2),
    "qmv_f16_3bit": lambda: qmv(f16, 3, 2e-2),
    "qmv_bf16_6bit": lambda: qmv(bf16, 6, 3e-2, M=3),
    "qmv_f32_8bit": lambda: qmv(f32, 8, 1e-4),
    "gather_qmv_f32": gather_qmv,
    "qmm_f32": lambda: qmm(f32, 1e-4),
    "qmm_bf16_ragged": lambda: qmm(bf16, 3e-2, N=72),
    "qmm_f16": lambda: qmm(f16, 3e-2),
    "steel_gemm_f32": lambda: steel_gemm(f32, 1e-4),
    "steel_gemm_f16": lambda: steel_gemm(f16, 1e-2, bm=64),
    "steel_gemm_bf16": lambda: steel_gemm(bf16, 3e-2, bm=64),
    "softmax_f32": lambda: softmax(f32, 1e-5),
    "softmax_f16": lambda: softmax(f16, 1e-1),
    "softmax_bf16": lambda: softmax(bf16, 1e-1),
    "sdpa_vector_f32": lambda: sdpa_vector(f32, 1e-4, L=100),
    "sdpa_vector_f16": lambda: sdpa_vector(f16, 1e-2, L=333),
    "sdpa_vector_bf16_causal": lambda: sdpa_vector(bf16, 3e-2, L=100, T=4, is_causal=True),
    "steel_attention_f32_causal": lambda: steel_attention(f32, 1e-4, L=80, is_causal=True),
    "steel_attention_bf16": lambda: steel_attention(bf16, 3e-2, L=96, is_causal=False),
    "gated_delta_f32": lambda: gated_delta(f32, 1e-4, T=70),
    "gated_delta_bf16": lambda: gated_delta(bf16, 3e-2, T=64),
}


def make(name: str) -> Case:
    """The case, with the same random numbers each time."""
    mx.random.seed(0)
    return CASES[name]()
