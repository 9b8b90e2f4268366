"""CUDA source of a Metal kernel: one extern "C" function whose parameters are what MLX's launcher passes.

Knows the conventions of `mx.fast.precompiled_cuda_kernel` (pointers of inputs, pointers of outputs, int scalars) and
where each kernel attribute of Metal comes from on CUDA. Shapes and grids are run-time scalars, so that a change of
either compiles nothing; dtypes, numbers of dimensions, the threadgroup and template arguments are compiled in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.twin.attributes import KERNEL_ATTRIBUTES
from metal_kernels.twin.rewrite import rewrite
from metal_kernels.twin.spec import METAL_TYPES, KernelSpec, TemplateValue

CUDA_TYPES = {**METAL_TYPES, mx.float16: "half", mx.bfloat16: "bfloat", mx.int8: "signed char"}
NAME = "MSL_KERNEL_NAME"
GRID = ("msl_grid_x", "msl_grid_y", "msl_grid_z")
SIMD_WORDS = ("simd_", "simdgroup", "quad_", "quadgroup")
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Variant:
    """Everything beside the kernel's text that shapes its code."""

    input_types: tuple[tuple[mx.Dtype, int], ...]
    output_dtypes: tuple[mx.Dtype, ...]
    template: tuple[tuple[str, TemplateValue], ...]
    threadgroup: Triple
    is_ragged: bool


@dataclass(frozen=True)
class CudaSource:
    """A translation unit and the name of its kernel, which is unique to the text."""

    text: str
    name: str


def uses_simd_groups(spec: KernelSpec) -> bool:
    """Whether the kernel names SIMD-group or quad-group functions or attributes."""
    return any(word in spec.source or word in spec.header for word in SIMD_WORDS)


def cuts_simd_groups(grid: Triple, threadgroup: Triple) -> bool:
    """Whether the last threadgroups of a ragged grid end inside of a SIMD-group or number their threads otherwise.

    CUDA has no partial blocks: the threads outside of the grid return at once, which barriers allow.
    """
    below = 1
    for axis in range(3):
        rest = grid[axis] % threadgroup[axis]
        is_last = all(n == 1 for n in threadgroup[axis + 1 :])
        if rest and not (is_last and rest * below % 32 == 0):
            return True
        below *= threadgroup[axis]
    return False


def cuda_source(spec: KernelSpec, variant: Variant, options: Sequence[str] = ()) -> CudaSource:
    """The CUDA text of a kernel for one variant; ``options`` of the compiler only make the name another one."""
    header = rewrite(spec.header, f"{spec.name}.header")
    body = rewrite(spec.source, f"{spec.name}.metal")
    parameters, scalars, prologue = _inputs(spec, variant)
    for name, dtype in zip(spec.output_names, variant.output_dtypes, strict=True):
        type_ = f"atomic<{CUDA_TYPES[dtype]}>" if spec.atomic_outputs else CUDA_TYPES[dtype]
        parameters.append(f"{type_}* __restrict__ {name}")
    parameters += scalars
    if variant.is_ragged:
        parameters += [f"const int {g}" for g in GRID]
        prologue.append(_return_outside())
    prologue += [_template_constant(k, v) for k, v in variant.template]
    prologue += [_attribute(a, variant) for a in spec.attributes]
    x, y, z = variant.threadgroup
    lines = [
        "#define MSL_APPLE_LAYOUT 1" if _needs_apple_layout(spec) else "",
        "#define MSL_EVEN_PAIRS 1" if "MSL_EVEN_PAIRS" in spec.source + spec.header else "",
        '#include "shim.cuh"',
        "namespace msl {",
        f'#line 1 "{spec.name}.header"',
        header,
        f'extern "C" __global__ void __launch_bounds__({x * y * z}) {NAME}(',
        "  " + ",\n  ".join(parameters) + ") {",
        *(f"  {line}" for line in prologue),
        f'#line 1 "{spec.name}.metal"',
        body,
        "}",
        "}",
        "",
    ]
    text = "\n".join(lines)
    name = f"{spec.name}_{hashlib.sha256(repr((text, tuple(options))).encode()).hexdigest()[:16]}"
    return CudaSource(text.replace(NAME, name), name)


def _needs_apple_layout(spec: KernelSpec) -> bool:
    """Source that names the elements of a lane relies on Apple's order, unless it says that it knows both."""
    text = spec.source + spec.header
    return "thread_elements" in text and "MSL_TENSOR_CORE_LAYOUT" not in text


def _inputs(spec: KernelSpec, variant: Variant) -> tuple[list[str], list[str], list[str]]:
    """Parameters of the inputs, those of their shapes, and the lines that give both their Metal names."""
    pointers, scalars, prologue = [], [], []
    for name, (dtype, ndim), use in zip(spec.input_names, variant.input_types, spec.shape_uses, strict=True):
        type_ = CUDA_TYPES[dtype]
        if ndim == 0:
            pointers.append(f"const {type_}* __restrict__ {name}__pointer")
            prologue.append(f"const {type_}& {name} = *{name}__pointer;")
            continue
        pointers.append(f"const {type_}* __restrict__ {name}")
        sizes = [f"{name}__size{i}" for i in range(ndim)]
        if use.shape or use.strides:
            scalars += [f"const int {size}" for size in sizes]
        if use.shape:
            prologue.append(f"const int {name}_shape[{ndim}] = {{{', '.join(sizes)}}};")
        if use.strides:
            strides = [" * ".join(["(int64_t)1", *sizes[i + 1 :]]) for i in range(ndim)]
            prologue.append(f"const int64_t {name}_strides[{ndim}] = {{{', '.join(strides)}}};")
        if use.ndim:
            prologue.append(f"constexpr int {name}_ndim = {ndim};")
    return pointers, scalars, prologue


def shape_scalars(spec: KernelSpec, inputs: Sequence[mx.array]) -> list[int]:
    """The scalars that `cuda_source` declared for the shapes of these inputs."""
    return [n for a, use in zip(inputs, spec.shape_uses, strict=True) if use.shape or use.strides for n in a.shape]


def _return_outside() -> str:
    tests = [f"blockIdx.{c} * blockDim.{c} + threadIdx.{c} >= {g}" for c, g in zip("xyz", GRID, strict=True)]
    return f"if ({' || '.join(tests)}) return;"


def _template_constant(name: str, value: TemplateValue) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {'true' if value else 'false'};"
    if isinstance(value, int):
        return f"constexpr int {name} = {value};"
    return f"using {name} = {CUDA_TYPES[value]};"


def _attribute(name: str, variant: Variant) -> str:
    """The declaration of a kernel attribute."""
    x, y, z = variant.threadgroup
    grid: tuple[str, ...]
    dispatched = (str(x), str(y), str(z))
    if variant.is_ragged:
        size = tuple(
            f"min({t}u, (uint){g} - blockIdx.{c} * {t}u)" for c, t, g in zip("xyz", dispatched, GRID, strict=True)
        )
        grid = GRID
    else:
        size = dispatched
        grid = tuple(f"gridDim.{c} * {t}u" for c, t in zip("xyz", dispatched, strict=True))
    triples = {
        "thread_position_in_grid": tuple(
            f"blockIdx.{c} * {t}u + threadIdx.{c}" for c, t in zip("xyz", dispatched, strict=True)
        ),
        "thread_position_in_threadgroup": tuple(f"threadIdx.{c}" for c in "xyz"),
        "threadgroup_position_in_grid": tuple(f"blockIdx.{c}" for c in "xyz"),
        "threadgroups_per_grid": tuple(f"gridDim.{c}" for c in "xyz"),
        "threads_per_threadgroup": size,
        "dispatch_threads_per_threadgroup": dispatched,
        "threads_per_grid": grid,
        "grid_size": grid,
        "grid_origin": ("0", "0", "0"),
    }
    if KERNEL_ATTRIBUTES[name] == "uint3":
        return f"const uint3 {name}({', '.join(triples[name])});"
    index = _linear_index(size)
    threads, all_threads = f"({' * '.join(size)})", x * y * z
    numbers = {
        "thread_index_in_threadgroup": index,
        "thread_index_in_simdgroup": f"{index} % 32",
        "simdgroup_index_in_threadgroup": f"{index} / 32",
        "simdgroups_per_threadgroup": f"({threads} + 31) / 32",
        "dispatch_simdgroups_per_threadgroup": str((all_threads + 31) // 32),
        "threads_per_simdgroup": "32",
        "thread_execution_width": "32",
        "thread_index_in_quadgroup": f"{index} % 4",
        "quadgroup_index_in_threadgroup": f"{index} / 4",
        "quadgroups_per_threadgroup": f"({threads} + 3) / 4",
        "dispatch_quadgroups_per_threadgroup": str((all_threads + 3) // 4),
    }
    return f"const uint {name} = {numbers[name]};"


def _linear_index(size: Sequence[str]) -> str:
    """Index of the thread in its threadgroup; axes of one thread drop out."""
    terms = ["threadIdx.x"]
    if size[1] != "1":
        terms.append(f"threadIdx.y * {size[0]}")
    if size[2] != "1":
        terms.append(f"threadIdx.z * ({size[0]} * {size[1]})")
    return f"({' + '.join(terms)})"
