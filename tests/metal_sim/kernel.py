"""A twin of `mx.fast.metal_kernel` that type-checks a kernel and runs it on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from metal_kernels.twin.spec import KernelSpec, Template
from tests.metal_sim.build import build
from tests.metal_sim.entry import kernel_parameters
from tests.metal_sim.lint import lint, lint_name
from tests.metal_sim.runtime import Buffer, Options, RunInfo, dispatch
from tests.metal_sim.signature import metal_function
from tests.metal_sim.toolchain import MetalCompileError

NUMPY_TYPES = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.float32: np.float32,
}

_linted: set[tuple[KernelSpec, tuple[str, ...]]] = set()
_typed: dict[KernelSpec, set[object]] = {}


def to_numpy(x: mx.array) -> npt.NDArray[np.generic]:
    """The bits of an array; numpy holds bfloat16 as uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def from_numpy(x: npt.NDArray[np.generic], dtype: mx.Dtype) -> mx.array:
    """The inverse of `to_numpy`."""
    return mx.array(x).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(x)


class SimulatedKernel:
    """What `metal_kernel` returns; `SimulatedKernel.last` holds the facts of the newest dispatch of any kernel."""

    last: RunInfo | None = None

    def __init__(self, spec: KernelSpec, mode: str, is_strict: bool, options: Options) -> None:
        self.spec = spec
        self.mode = mode
        self.is_strict = is_strict
        self.options = options
        self._libraries: dict[tuple[str, str], Path] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
        mode: str | None = None,
    ) -> list[mx.array]:
        """Same contract as the callable that `mx.fast.metal_kernel` returns; ``mode`` overrides the kernel's."""
        spec, template, mode = self.spec, template or [], mode or self.mode
        spec.check_counts(inputs, output_shapes, output_dtypes)
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        source, function, instance = metal_function(spec, arrays, output_dtypes, template)
        if verbose:
            print(f"Generated source code for `{spec.name}`:\n```\n{source}\n```")
        if (source, mode) not in self._libraries:
            self._libraries[source, mode] = self._build(source, function, instance, mode, template)
        outputs = [
            output_buffer(name, shape, dtype, init_value)
            for name, shape, dtype in zip(spec.output_names, output_shapes, output_dtypes, strict=True)
        ]
        buffers = [*_input_buffers(spec, arrays), *outputs]
        library = self._libraries[source, mode]
        SimulatedKernel.last = dispatch(library, buffers, grid, threadgroup, mode, self.options)
        return [
            from_numpy(b.array().reshape(tuple(shape)), dtype)
            for b, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True)
        ]

    def _build(self, source: str, function: str, instance: str, mode: str, template: Template) -> Path:
        """Check the source, if that is asked for, and compile it."""
        refused = lint_name(function)
        if refused:
            raise MetalCompileError("\n".join(refused))
        parameters = kernel_parameters(source, function)
        shared = self.spec.header, self.spec.source
        if self.is_strict:
            template_types = tuple(k for k, v in template if isinstance(v, mx.Dtype))
            if (self.spec, template_types) not in _linted:  # what else differs between variants MLX writes
                found = lint(source, self.spec.name, template_types)
                if found:
                    raise MetalCompileError("\n".join(found))
                _linted.add((self.spec, template_types))
            known = _typed.setdefault(self.spec, set())
            news = _facts(self.spec, source, function, template) - known
            if news:
                build(source, instance, parameters, "strict", self.spec.name, shared=shared)
                known |= news
        return build(source, instance, parameters, mode, self.spec.name, shared=shared)


def _facts(spec: KernelSpec, source: str, function: str, template: Template) -> set[object]:
    """What sets a variant apart: the lines of its signature and each value of its template.

    A variant without a new one is not type-checked with address spaces, but still compiled: that takes longest of a test.
    """
    head = source.partition(spec.source)[0].removeprefix(spec.header).replace(function, "")
    return {*head.splitlines(), *((name, str(value)) for name, value in template)}


def _input_buffers(spec: KernelSpec, arrays: Sequence[mx.array]) -> list[Buffer]:
    buffers = []
    for name, a, use in zip(spec.input_names, arrays, spec.shape_uses, strict=True):
        if spec.ensure_row_contiguous or a.ndim == 0 or a.size == 0:
            data, strides = to_numpy(a), _contiguous_strides(a.shape)
        else:
            data, strides = _storage(a)
        buffers.append(Buffer(data, name))
        if a.ndim and use.shape:
            buffers.append(Buffer(np.array(a.shape, np.int32), f"{name}_shape"))
        if a.ndim and use.strides:
            buffers.append(Buffer(np.array(strides, np.int64), f"{name}_strides"))
        if a.ndim and use.ndim:
            buffers.append(Buffer(np.array([a.ndim], np.int32), f"{name}_ndim"))
    return buffers


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    return [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]


def _storage(a: mx.array) -> tuple[npt.NDArray[np.generic], list[int]]:
    """The memory that a view spans, from its first element, and the view's strides in elements."""
    view = memoryview(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)  # type: ignore[arg-type]
    strides = [s // view.itemsize for s in view.strides or ()]
    if any(s < 0 for s in strides):
        raise NotImplementedError("[metal_sim] negative strides")
    extent = 1 + sum((n - 1) * s for n, s in zip(a.shape, strides, strict=True))
    base = np.lib.stride_tricks.as_strided(np.asarray(view), (extent,), (view.itemsize,))
    return base.copy(), strides


def output_buffer(name: str, shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> Buffer:
    if init_value is None:
        return Buffer(np.empty(tuple(shape), NUMPY_TYPES[dtype]), name, is_writable=True, is_initialized=False)
    return Buffer(to_numpy(mx.full(tuple(shape), init_value, dtype)), name, is_writable=True)


def metal_kernel(*described: Any, mode: str = "check", strict: bool = True, **named: Any) -> SimulatedKernel:
    """Same contract as `mx.fast.metal_kernel`.

    Args:
        *described: As MLX's, but for ``compile_options``, which change nothing.
        mode: ``check`` or ``fast``; ``strict`` type-checks alone are part of both unless ``strict`` is False.
        strict: Whether to check types and run the lint first.
        **named: The same by name, and fields of `tests.metal_sim.runtime.Options`, such as ``order=1``.
    """
    named.pop("compile_options", None)
    options = Options(**{f.name: named.pop(f.name) for f in fields(Options) if f.name in named})
    return SimulatedKernel(KernelSpec(*described, **named), mode, strict, options)
