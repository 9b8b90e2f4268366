"""Runs the twin's CUDA text on the simulator's runtime: what the GPU would compute, less its rounding, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metal_kernels.twin.cuda_source import (
    Triple,
    Variant,
    cuda_source,
    cuts_simd_groups,
    shape_scalars,
    uses_simd_groups,
)
from metal_kernels.twin.nvrtc import SHIM
from metal_kernels.twin.spec import KernelSpec, Template
from tests.metal_sim.build import digest
from tests.metal_sim.flags import CUDA_HOST
from tests.metal_sim.kernel import from_numpy, output_buffer, to_numpy
from tests.metal_sim.runtime import Buffer, Options, dispatch
from tests.metal_sim.toolchain import cache_folder, staged, toolchain

HOST = Path(__file__).parent / "cuda_host"


def _build(text: str, name: str) -> Path:
    headers = {p.name: p.read_text(encoding="utf-8") for p in (*SHIM.glob("*.cuh"), *HOST.iterdir())}
    text += f'\nextern "C" void msl_entry() {{ msl_cuda_call(&msl::{name}); }}\n'
    library = cache_folder() / f"cuda-{digest(text, sorted(headers.items()), CUDA_HOST, toolchain().identity)}.so"
    if not library.exists():
        with staged(library) as path:
            unit, compiled = path.with_suffix(".cpp"), path.with_suffix(".o")
            unit.write_text(text, encoding="utf-8")
            for header, content in headers.items():  # the host's ptx.cuh replaces the shim's
                (path.parent / header).write_text(content.replace('"../runtime/', f'"{HOST.parent}/runtime/'))
            toolchain().compile([*CUDA_HOST, "-c"], unit, compiled)
            toolchain().link([compiled], path)
    return library


def run_cuda_on_host(
    spec: KernelSpec,
    *,
    inputs: Sequence[mx.array],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    grid: Triple,
    threadgroup: Triple,
    template: Template | None = None,
    init_value: float | None = None,
    **options: Any,
) -> list[mx.array]:
    """Same contract as a call of `metal_kernels.twin.metal_kernel`'s kernel."""
    block = (min(threadgroup[0], grid[0]), min(threadgroup[1], grid[1]), min(threadgroup[2], grid[2]))
    groups = tuple(-(-g // t) for g, t in zip(grid, block, strict=True))
    is_ragged = any(g % t for g, t in zip(grid, block, strict=True))
    if is_ragged and uses_simd_groups(spec) and cuts_simd_groups(grid, block):
        raise NotImplementedError(f"[metal_kernel] {spec.name}: grid {grid} cuts SIMD-groups of {threadgroup}.")
    types = tuple((x.dtype, x.ndim) for x in inputs)
    variant = Variant(types, tuple(output_dtypes), tuple(template or ()), block, is_ragged)
    source = cuda_source(spec, variant)
    scalars = shape_scalars(spec, inputs) + (list(grid) if is_ragged else [])
    outputs = [
        output_buffer(name, shape, dtype, init_value)
        for name, shape, dtype in zip(spec.output_names, output_shapes, output_dtypes, strict=True)
    ]
    buffers = [Buffer(to_numpy(x), name) for x, name in zip(inputs, spec.input_names, strict=True)]
    buffers += [*outputs, *(Buffer(np.array([n], np.int32), "scalar") for n in scalars)]
    full = [n * t for n, t in zip(groups, block, strict=True)]
    dispatch(_build(source.text, source.name), buffers, full, block, "fast", Options(early_exit=True, **options))
    return [
        from_numpy(b.array().reshape(tuple(shape)), dtype)
        for b, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True)
    ]


def cuda_kernel(*described: Any, compile_options: object = None, **named: Any) -> Callable[..., list[mx.array]]:
    """A backend: same contract as `mx.fast.metal_kernel`, by way of the twin's CUDA text."""
    spec = KernelSpec(*described, **named)

    def call(*, inputs: Sequence[Any], verbose: bool = False, stream: object = None, **rest: Any) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        spec.check_counts(arrays, rest["output_shapes"], rest["output_dtypes"])
        return run_cuda_on_host(spec, inputs=arrays, **rest)

    return call
