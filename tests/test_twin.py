"""The CUDA twin without a GPU: its text against the simulator, its compilation with NVRTC, its cache and its calls."""

from __future__ import annotations

import io
import struct
import sys

import mlx.core as mx
import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from metal_kernels.twin import kernel, metal_kernel, nvrtc
from metal_kernels.twin.cuda_source import Variant, cuda_source, cuts_simd_groups
from metal_kernels.twin.nvrtc import CudaCompileError, compile_cubin
from metal_kernels.twin.spec import KernelSpec
from tests.metal_sim import metal_kernel as simulated_kernel
from tests.metal_sim.cuda_host import cuda_kernel, run_cuda_on_host
from tests.metal_sim.kernels import (
    APPLE_ELEMENTS,
    BOTH_ELEMENTS,
    TALL_SOURCE,
    TILE_SOURCE,
    math_arguments,
    math_functions,
    simd_arguments,
    simd_functions,
    tile_arguments,
    tile_reference,
    tiles,
    with_elements,
)
from tests.metal_sim.marks import needs_nvrtc, needs_simulator

DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])
HMMA, MOVM = 0x23C, 0x23A  # a product on a tensor core, and what turns a tile


def variant(arguments, threadgroup=None, is_ragged=False):
    types = tuple((x.dtype, x.ndim) for x in arguments["inputs"])
    block = threadgroup or arguments["threadgroup"]
    return Variant(types, tuple(arguments["output_dtypes"]), tuple(arguments["template"]), block, is_ragged)


def simulate(spec, arguments):
    built = simulated_kernel(spec.name, spec.input_names, spec.output_names, spec.source, spec.header, mode="fast")
    return built(**arguments)


@needs_simulator
@DTYPES
@pytest.mark.parametrize("is_transposed", [False, True], ids=["nn", "nt"])
@pytest.mark.parametrize("elements", ["", APPLE_ELEMENTS, BOTH_ELEMENTS], ids=["none", "apple", "both"])
def test_matrix_products(dtype, is_transposed, elements):
    arguments = tile_arguments(dtype, is_transposed)
    out, count = run_cuda_on_host(tiles(with_elements(elements) if elements else TILE_SOURCE), **arguments)
    expected = tile_reference(arguments)
    if elements:
        expected = expected * mx.arange(1, 65)[:, None]
    np.testing.assert_allclose(np.array(out), np.array(expected), rtol=1e-4, atol=2e-3 if elements else 2e-5)
    assert count.item() == 6


@needs_simulator
@pytest.mark.parametrize("layout", ["", "// thread_elements"], ids=["tensor_core", "apple"])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["nn", "nt"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_two_tiles_at_a_time(dtype, is_transposed, layout):
    x = mx.random.normal((16, 16)).astype(dtype)
    y = mx.random.normal((8, 16) if is_transposed else (16, 8)).astype(dtype)
    (out,) = run_cuda_on_host(
        KernelSpec("tall", ("x", "y"), ("out",), TALL_SOURCE + layout),
        inputs=[x, y],
        template=[("T", dtype), ("TB", is_transposed)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(16, 8)],
        output_dtypes=[mx.float32],
    )
    wide = x.astype(mx.float32) @ (y.T if is_transposed else y).astype(mx.float32) + 1
    np.testing.assert_allclose(np.array(out), np.array(wide), rtol=1e-5, atol=1e-5)


@needs_simulator
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.int32, mx.uint32, mx.int16])
def test_simd_functions_equal_the_simulators(dtype):
    arguments = simd_arguments(dtype)
    (ours,) = run_cuda_on_host(simd_functions(), **arguments)
    (theirs,) = simulate(simd_functions(), arguments)
    np.testing.assert_array_equal(np.array(ours), np.array(theirs))


@needs_simulator
@DTYPES
def test_math_equals_the_simulators(dtype):
    arguments = math_arguments(dtype)
    (ours,) = run_cuda_on_host(math_functions(), **arguments)
    (theirs,) = simulate(math_functions(), arguments)
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-6)


SHAPES_SOURCE = """
  threadgroup float shared_sum[64];
  uint3 p = thread_position_in_grid;
  uint t = thread_index_in_threadgroup;
  shared_sum[t] = float(x[(p.y * x_shape[1] + p.x) % x_shape[1]]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint size = threads_per_threadgroup.x * threads_per_threadgroup.y;
  float total = 0;
  for (uint k = 0; k < size; k++) total += shared_sum[k];
  uint i = p.y * threads_per_grid.x + p.x;
  out[i] = total + float(x_strides[0]) + float(x_ndim) + float(s) + c[2] + 100.0f * float(threadgroups_per_grid.x);
"""


@needs_simulator
@pytest.mark.parametrize("grid", [(32, 8, 1), (27, 5, 1), (3, 2, 1)], ids=["whole", "ragged", "small"])
def test_shapes_attributes_and_ragged_grids(grid):
    spec = KernelSpec("shapes", ("x", "s", "c"), ("out",), SHAPES_SOURCE)
    arguments = {
        "inputs": [mx.arange(30).reshape(2, 15).astype(mx.bfloat16), mx.array(3), mx.arange(3).astype(mx.float32)],
        "template": [],
        "grid": grid,
        "threadgroup": (16, 4, 1),
        "output_shapes": [(grid[0] * grid[1],)],
        "output_dtypes": [mx.float32],
    }
    (ours,) = run_cuda_on_host(spec, **arguments)
    (theirs,) = simulate(spec, arguments)
    np.testing.assert_array_equal(np.array(ours), np.array(theirs))


@needs_simulator
def test_the_host_backend_has_the_contract_of_mlx():
    built = cuda_kernel("double_it", ["x", "s"], ["out"], "out[thread_position_in_grid.x] = x[0] * s;")
    call = {"grid": (4, 1, 1), "threadgroup": (4, 1, 1), "output_shapes": [(4,)], "output_dtypes": [mx.float32]}
    (out,) = built(inputs=[mx.ones((1,)), 2.0], stream=mx.cpu, **call)
    assert out.tolist() == [2.0] * 4
    with pytest.raises(ValueError, match="Expected `inputs` to have size 2"):
        built(inputs=[mx.ones((1,))], **call)


def test_grids_that_cut_simd_groups():
    assert not cuts_simd_groups((96, 1, 1), (64, 1, 1))
    assert cuts_simd_groups((80, 1, 1), (64, 1, 1))
    assert not cuts_simd_groups((32, 6, 1), (32, 4, 1))
    assert cuts_simd_groups((64, 3, 1), (96, 2, 1))


def test_text_depends_on_neither_shape_nor_grid():
    spec = KernelSpec("k", ("x",), ("o",), "o[thread_position_in_grid.x] = x[x_shape[0]];")
    types = ((mx.float32, 1),)
    text = cuda_source(spec, Variant(types, (mx.float32,), (), (32, 1, 1), False))
    assert "x__size0" in text.text
    assert text.name in text.text
    assert cuda_source(spec, Variant(types, (mx.float16,), (), (32, 1, 1), False)).name != text.name
    assert (
        cuda_source(spec, Variant(types, (mx.float32,), (), (32, 1, 1), False), ["--use_fast_math"]).name != text.name
    )


def instructions(cubin, opcode):
    """Number of these instructions: 16 bytes each, opcode in the low 12 bits."""
    sections = ELFFile(io.BytesIO(cubin)).iter_sections()
    code = b"".join(section.data() for section in sections if section.name.startswith(".text."))
    return sum(word & 0xFFF == opcode for (word, _) in struct.iter_unpack("<QQ", code))


@needs_nvrtc
@DTYPES
@pytest.mark.parametrize("elements", ["", APPLE_ELEMENTS], ids=["none", "apple"])
def test_tensor_cores_multiply_half_and_bfloat_and_no_others(dtype, elements):
    source = cuda_source(
        tiles(with_elements(elements) if elements else TILE_SOURCE), variant(tile_arguments(dtype, False))
    )
    cubin, _ = compile_cubin(source.text, source.name, "sm_90")
    assert (instructions(cubin, HMMA) > 0) == (dtype != mx.float32)


@needs_nvrtc
@pytest.mark.parametrize(("is_transposed", "turns"), [(False, 1), (True, 0)], ids=["nn", "nt"])
def test_a_right_operand_turns_once_for_all_its_products(is_transposed, turns):
    body = """
  simdgroup_matrix<half, 8, 8> a[3], b;
  simdgroup_matrix<float, 8, 8> d[3];
  simdgroup_load(b, x, 8, ulong2(0, 0), TB);
#pragma unroll
  for (int i = 0; i < 3; i++) {
    simdgroup_load(a[i], x + 64 * i, 8);
    simdgroup_multiply(d[i], a[i], b);
    simdgroup_store(d[i], out + 64 * i, 8);
  }
"""
    types = ((mx.float16, 1),)
    chosen = Variant(types, (mx.float32,), (("TB", is_transposed),), (32, 1, 1), False)
    source = cuda_source(KernelSpec("turns", ("x",), ("out",), body), chosen)
    cubin, _ = compile_cubin(source.text, source.name, "sm_90")
    assert instructions(cubin, HMMA) == 3
    assert instructions(cubin, MOVM) == turns


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@DTYPES
def test_nvrtc_compiles_what_the_host_ran(dtype, architecture):
    for spec, arguments in (
        (simd_functions(), simd_arguments(dtype)),
        (math_functions(), math_arguments(dtype)),
        (tiles(with_elements(APPLE_ELEMENTS)), tile_arguments(dtype, True)),
    ):
        source = cuda_source(spec, variant(arguments))
        assert compile_cubin(source.text, source.name, architecture)[0]


def test_nvrtc_gets_its_builtins_from_its_own_folder(monkeypatch, tmp_path):
    """NVRTC 13.0 of pip opens them by name alone, and does not find them there."""
    for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc-builtins.alt.so.13.0"):
        (tmp_path / name).touch()
    loaded = []
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda path: loaded.append(path) or path)
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter([str(tmp_path / "libnvrtc.so.13")]))
    assert nvrtc.find_nvrtc.__wrapped__() == str(tmp_path / "libnvrtc.so.13")
    assert loaded == [str(tmp_path / "libnvrtc-builtins.so.13.0"), str(tmp_path / "libnvrtc.so.13")]
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["libnvrtc.so.13"]))
    assert nvrtc.find_nvrtc.__wrapped__() == "libnvrtc.so.13"


@needs_nvrtc
def test_errors_name_the_line_of_the_kernel():
    spec = KernelSpec("broken", ("x",), ("o",), "\n  o[0] = undefined_name;")
    source = cuda_source(spec, Variant(((mx.float32, 1),), (mx.float32,), (), (32, 1, 1), False))
    with pytest.raises(CudaCompileError, match=r'broken.metal\(2\).*"undefined_name" is undefined'):
        compile_cubin(source.text, source.name, "sm_90")


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """Calls of MLX's launcher, on an imagined GPU with an empty cache; compiling returns the name."""
    calls, compiled = [], []

    def launch(**arguments):
        calls.append(arguments)
        made = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in made]

    def compile_(text, name, architecture, options):
        compiled.append((name, architecture, options))
        return name.encode(), ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
    monkeypatch.setattr(kernel, "architecture", lambda: "sm_90")
    monkeypatch.setattr(kernel, "compile_cubin", compile_)
    return calls, compiled


def call(built, n=64, grid=64, threadgroup=32, **changes):
    arguments = {
        "inputs": [mx.zeros((2, n)), 1.5],
        "template": [("T", mx.float32)],
        "grid": (grid, 1, 1),
        "threadgroup": (threadgroup, 1, 1),
        "output_shapes": [(n,)],
        "output_dtypes": [mx.float32],
    }
    return built(**{**arguments, **changes})


SOURCE = "out[thread_position_in_grid.x] = x[x_shape[1] - 1] + s;"


def test_a_call_launches_with_mlxs_arguments(launches):
    calls, _ = launches
    (out,) = call(metal_kernel("k", ["x", "s"], ["out"], SOURCE), init_value=2.0)
    (launched,) = calls
    assert out.shape == (64,)
    assert launched["name"].startswith("k_")
    assert launched["scalars"] == [2, 64]
    assert launched["grid"] == (64, 1, 1)
    assert launched["threadgroup"] == (32, 1, 1)
    assert launched["init_value"] == 2.0
    assert launched["ensure_row_contiguous"] is True
    assert [x.dtype for x in launched["inputs"]] == [mx.float32, mx.float32]


def test_a_kernel_compiles_once_whatever_the_shape(launches):
    calls, compiled = launches
    built = metal_kernel("k", ["x", "s"], ["out"], SOURCE)
    for n in (64, 128, 640):
        call(built, n=n, grid=n)
    assert len(compiled) == 1
    call(built, grid=48)
    assert len(compiled) == 2
    assert calls[-1]["scalars"] == [2, 64, 48, 1, 1]
    call(built, n=16, grid=16)
    assert calls[-1]["threadgroup"] == (16, 1, 1)
    assert len({c["name"] for c in calls}) == 3


def test_compiled_kernels_stay_on_disk(launches):
    _, compiled = launches
    call(metal_kernel("k", ["x", "s"], ["out"], SOURCE))
    call(metal_kernel("k", ["x", "s"], ["out"], SOURCE))
    assert len(compiled) == 1
    assert len(list(kernel.cache_folder().iterdir())) == 1
    call(metal_kernel("k", ["x", "s"], ["out"], SOURCE, compile_options={"math_mode": "fast"}))
    assert compiled[-1][2] == ("--use_fast_math",)


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "ring-mlx").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel.cached(("a",), lambda: b"made") == b"made"


def test_wrong_counts_and_cut_simd_groups_are_refused(launches):
    built = metal_kernel("k", ["x", "s"], ["out"], SOURCE)
    with pytest.raises(ValueError, match="Expected `inputs` to have size 2"):
        call(built, inputs=[mx.zeros(3)])
    built = metal_kernel("k", ["x", "s"], ["out"], SOURCE + " out[0] = simd_sum(s);")
    with pytest.raises(NotImplementedError, match=r"grid \(80, 1, 1\) cuts SIMD-groups"):
        call(built, grid=80, threadgroup=64)


def test_a_body_that_names_strides_gets_dense_inputs(launches):
    calls, _ = launches
    call(metal_kernel("k", ["x", "s"], ["out"], "out[0] = x[x_strides[0]];", ensure_row_contiguous=False))
    call(metal_kernel("k", ["x", "s"], ["out"], "out[0] = x[0];", ensure_row_contiguous=False))
    assert [c["ensure_row_contiguous"] for c in calls] == [True, False]


def test_a_call_costs_little_python(launches):
    """Counted in function calls, which no machine's speed or load changes."""
    built = metal_kernel("k", ["x", "s"], ["out"], SOURCE)
    arguments = {"inputs": [mx.zeros((2, 64)), mx.array(1.0)]}
    call(built, **arguments)
    seen = []
    sys.setprofile(lambda frame, event, argument: seen.append(event))
    try:
        call(built, **arguments)
    finally:
        sys.setprofile(None)
    assert seen.count("call") + seen.count("c_call") < 30


def test_without_a_gpu_the_error_says_so():
    if mx.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU")
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        kernel.architecture()
