"""A twin of `mx.fast.metal_kernel` that runs the same Metal source on an NVIDIA GPU.

Knows when a kernel has to be compiled, where compiled ones stay, and how MLX launches it; what the CUDA text looks like is
`cuda_source`'s matter.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels import machine
from metal_kernels.twin.cuda_source import (
    Triple,
    Variant,
    cuda_source,
    cuts_simd_groups,
    shape_scalars,
    uses_simd_groups,
)
from metal_kernels.twin.fatbin import fatbin
from metal_kernels.twin.nvrtc import compile_cubin, shim_headers
from metal_kernels.twin.spec import KernelSpec, Template

# Further options of NVRTC, such as -lineinfo for profilers and compute-sanitizer.
OPTIONS_VARIABLE = "RING_MLX_TWIN_OPTIONS"


def cache_folder() -> Path:
    """Where compiled kernels stay."""
    return machine.cache_folder() / "twin"


def cached(parts: tuple[object, ...], make: Callable[[], bytes]) -> bytes:
    """What ``make`` returned for these parts, from disk if it was made before.

    The file is written beside its place and moved there. A folder that cannot be written costs a compilation, no more.
    """
    path = cache_folder() / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave a kernel that is cut
        os.replace(file.name, path)
    except OSError:
        pass
    return made


@functools.cache
def architecture() -> str:
    """Architecture of the GPU, such as sm_90; raises RuntimeError if there is no NVIDIA GPU."""
    if not mx.cuda.is_available():
        raise RuntimeError("[metal_kernel] The CUDA twin needs an NVIDIA GPU and MLX's CUDA backend.")
    return str(mx.device_info(mx.gpu)["architecture"])


class TwinKernel:
    def __init__(self, spec: KernelSpec, options: tuple[str, ...]) -> None:
        self.spec = spec
        self.options = options
        self._compiled: dict[object, tuple[str, bytes]] = {}
        self._uses_simd_groups = uses_simd_groups(spec)
        self._uses_shapes = any(use.shape or use.strides for use in spec.shape_uses)
        # A precompiled kernel gets no strides from MLX: where the body names them they are those of a dense array.
        self._is_contiguous = spec.ensure_row_contiguous or any(use.strides for use in spec.shape_uses)

    def __call__(
        self, *, threadgroup: Triple, template: Template | None = None, verbose: bool = False, **others: Any
    ) -> list[mx.array]:
        """Same contract as the callable that `mx.fast.metal_kernel` returns."""
        inputs = others["inputs"] = [x if isinstance(x, mx.array) else mx.array(x) for x in others["inputs"]]
        output_dtypes, grid = others["output_dtypes"], others["grid"]
        gx, gy, gz = grid
        tx, ty, tz = threadgroup
        block = (min(gx, tx), min(gy, ty), min(gz, tz))
        is_ragged = bool(gx % block[0] or gy % block[1] or gz % block[2])
        key = (
            tuple([(x.dtype, x.ndim) for x in inputs]),
            tuple(output_dtypes),
            tuple(template) if template else (),
            block,
            is_ragged,
        )
        compiled = self._compiled.get(key)
        if compiled is None or verbose:
            self.spec.check_counts(inputs, others["output_shapes"], output_dtypes)
            compiled = self._compile(Variant(*key), verbose)
            self._compiled[key] = compiled
        scalars = shape_scalars(self.spec, inputs) if self._uses_shapes else []
        if is_ragged:
            if self._uses_simd_groups and cuts_simd_groups(grid, block):
                raise NotImplementedError(
                    f"[metal_kernel] {self.spec.name}: grid {grid} cuts SIMD-groups of threadgroup {threadgroup}."
                )
            scalars += grid
        return mx.fast.precompiled_cuda_kernel(
            name=compiled[0],
            compiled_source=compiled[1],
            scalars=scalars,
            threadgroup=block,
            ensure_row_contiguous=self._is_contiguous,
            **others,
        )

    def _compile(self, variant: Variant, verbose: bool) -> tuple[str, bytes]:
        """Name and machine code of a variant, from disk or NVRTC."""
        options = (*self.options, *shlex.split(os.environ.get(OPTIONS_VARIABLE, "")))
        source = cuda_source(self.spec, variant, options)
        if verbose:
            print(f"Generated source code for `{self.spec.name}`:\n```\n{source.text}\n```")
        parts = (source.text, tuple(shim_headers().items()), architecture(), options)

        def make() -> bytes:
            return fatbin(compile_cubin(source.text, self.spec.name, architecture(), options)[0], architecture())

        return source.name, cached(("fatbin", *parts), make)


def metal_kernel(*described: Any, compile_options: Mapping[str, Any] | None = None, **named: Any) -> TwinKernel:
    """Same contract as `mx.fast.metal_kernel`, for an NVIDIA GPU of compute capability 8.0 or newer.

    Limits: inputs are made dense where the body names strides; a grid must not cut a SIMD-group; sizes of inputs whose
    shape the body names are below 2^31; no textures and no vector swizzles. Of ``compile_options``, the math mode
    ``fast`` is NVRTC's fast math and the others are its default.
    """
    is_fast = (compile_options or {}).get("math_mode") == "fast"
    return TwinKernel(KernelSpec(*described, **named), ("--use_fast_math",) if is_fast else ())
