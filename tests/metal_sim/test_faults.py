"""One planted fault a kernel: each must be reported, and what is clean must pass."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from tests.metal_sim import MetalCompileError, MetalRunError, Options, SimulatedKernel, metal_kernel
from tests.metal_sim.flags import LOCAL_BOUNDS_VERSION
from tests.metal_sim.marks import needs_simulator
from tests.metal_sim.toolchain import find_toolchain

pytestmark = needs_simulator

SIZE, THREADS = 256, 64
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
GOOD = f"""
  threadgroup float buf[64];
  uint i = thread_position_in_grid.x; uint t = thread_position_in_threadgroup.x;
  buf[t] = x[i] * 2.0f;
  {BARRIER}
  out[i] = static_cast<T>(buf[63 - t]);
"""
INDEX = "uint i = thread_position_in_grid.x; "
OUT = "out[thread_position_in_grid.x]"


class Fault(NamedTuple):
    """A kernel body, what its report must contain (None: nothing is reported), and how to run it."""

    name: str
    source: str
    expected: str | None
    options: Mapping[str, Any] = MappingProxyType({})


def changed(before: str, after: str, source: str = GOOD) -> str:
    assert before in source
    return source.replace(before, after)


MEMORY = [
    Fault("clean", GOOD, None),
    Fault("read_beyond_input", changed("x[i]", "x[i + 1]"), "out of bounds: read"),
    Fault("read_far_beyond_input", changed("x[i]", "x[i + 4000000]"), "out of bounds: read"),
    Fault("write_beyond_output", changed("out[i]", "out[i + 1]"), "out of bounds: write"),
    Fault("negative_index", changed("x[i]", "x[int(i) - 1]"), "out of bounds: read"),
    Fault("threadgroup_overrun", changed("buf[63 - t]", "buf[64 - t]"), "index out of the bounds"),
    Fault(
        "threadgroup_overrun_through_pointer",
        changed("buf[63 - t]", "p[64 - t]", changed("buf[64];", "buf[64]; threadgroup float* p = buf;")),
        "out of bounds: read",
    ),
    Fault(
        "private_overrun",
        INDEX + "float a[4]; for (int k = 0; k < 4; k++) a[k] = x[i]; out[i] = a[i % 5];",
        "index out of the bounds",
    ),
    Fault(
        "private_overrun_through_pointer",
        INDEX + "float a[4]; thread float* p = a; for (int k = 0; k < 5; k++) p[k] = x[i]; out[i] = p[i % 4];",
        "out of bounds: access beside a private array",
    ),
    Fault("uninitialised_threadgroup", changed("buf[t] =", "if (t != 5) buf[t] ="), "uninitialised"),
    Fault("unwritten_output_read", changed("out[i] =", "out[i] = out[i] +"), "uninitialised"),
    Fault("unwritten_output_increased", INDEX + "out[i] += 1;", "uninitialised"),
    Fault("input_written", INDEX + "((device float*)x)[i] = 1; out[i] = 0;", "write to input"),
    Fault("output_not_written", GOOD, "unwritten {'out': 64}", {"threads": 192}),
    Fault("uninitialised_private", INDEX + "float s; if (i < 300) s += x[i]; out[i] = s;", "NaN"),
    Fault("threadgroup_memory_limit", changed("buf[64]", "buf[64 * 129]"), "threadgroup memory: more than 32768 bytes"),
    Fault("smaller_limit", GOOD, "threadgroup memory: more than 255 bytes", {"threadgroup_memory": 255}),
    Fault(
        "threadgroup_memory_with_padding",  # 32,766 bytes, but a half stands before or behind floats
        changed("buf[64];", "buf[8191]; threadgroup half h[1]; h[0] = 1.0h;"),
        "threadgroup memory: more than 32768 bytes with",
    ),
    Fault(
        "threadgroup_memory_of_all_branches",  # no threadgroup has both arrays, but Metal reserves both
        "uint t = thread_position_in_threadgroup.x;"
        " if (threadgroup_position_in_grid.x == 0) { threadgroup float a[5000]; a[t] = 1; out[t] = a[t]; }"
        f" else {{ threadgroup float b[5000]; b[t] = 1; {OUT} = b[t]; }}",
        "threadgroup memory: more than 32768 bytes with",
    ),
    Fault(
        "overrun_into_the_next_array",
        changed("buf[64];", "buf[64], next[64];", changed("buf[63 - t]", "(buf + 64)[t]")).replace(
            "buf[t] =", "next[t] = buf[t] ="
        ),
        "out of bounds: read",
    ),
]
ORDER = [
    Fault("no_barrier", changed(BARRIER, ""), "race"),
    Fault("barrier_without_flag", changed("mem_flags::mem_threadgroup", "mem_flags::mem_none"), "race"),
    Fault("barrier_with_wrong_flag", changed("mem_flags::mem_threadgroup", "mem_flags::mem_device"), "race"),
    Fault("simdgroup_barrier", changed("threadgroup_barrier", "simdgroup_barrier"), "race"),
    Fault("barrier_in_branch", changed(BARRIER, f"if (t < 40) {BARRIER}"), "divergence"),
    Fault(
        "different_barriers",
        changed(BARRIER, f"if (t < 32) {{ {BARRIER} }}\n else {{ {BARRIER} }}"),
        "divergence: threads wait at different barriers",
    ),
    Fault("return_before_barrier", changed("buf[t] =", "if (i >= 250) return;\n buf[t] ="), "divergence"),
    Fault("race_between_threadgroups", changed("out[i] =", "out[t] ="), "race: write/write"),
    Fault("plain_accumulation", INDEX + "out[0] += x[i];", "race", {"init_value": 0.0}),
    Fault(
        "simd_sum_in_branch",
        INDEX + "float s = 0; if (i % 2) s = simd_sum(x[i]); out[i] = s;",
        "divergence: SIMD operation",
    ),
    Fault(
        "simd_sum_in_uneven_loop",
        INDEX + "float s = 0; for (uint k = 0; k < i % 3; k++) s += simd_sum(x[i]); out[i] = s;",
        "divergence: SIMD operation",
    ),
    Fault("undefined_shuffle_source", INDEX + "out[i] = simd_shuffle_down(x[i], 1);", "NaN"),
]
ARITHMETIC = [
    Fault(
        "wide_access_to_narrow_threadgroup_array",  # Metal aligns the array as its type, whatever is read from it
        """
  threadgroup half buf[64];
  uint t = thread_position_in_threadgroup.x;
  buf[t] = half(x[thread_position_in_grid.x]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const half4 v = ((threadgroup half4*)buf)[t / 4];
  out[thread_position_in_grid.x] = v[t % 4];
""",
        "misaligned",
    ),
    Fault(
        "misaligned_vector",
        INDEX + "if (i < 32) { const device float4* p = (const device float4*)(x + 1 + i); float4 v = *p;"
        " out[i] = v.x + v.w; } else out[i] = 0;",
        "misaligned",
    ),
    Fault("division_by_zero", INDEX + "out[i] = float(100 / int(x[i]));", "division by zero"),
    Fault("float_to_unsigned", INDEX + "out[i] = float(uint(x[i] - 5.0f));", "conversion out of range"),
    Fault("shift_too_far", INDEX + "out[i] = float(1u << uint(x[i]));", "shift amount"),
]
TYPES = [
    Fault(
        "implicit_bfloat",
        changed("static_cast<T>(buf[63 - t])", "buf[63 - t]"),
        "implicit conversion",
        {"dtype": mx.bfloat16},
    ),
    Fault(
        "device_pointer_to_threadgroup",
        OUT + " = f(x);",
        "no matching function",
        {"header": "inline float f(threadgroup const float* p) { return p[0]; }\n"},
    ),
    Fault(
        "device_lvalue_to_thread_reference",
        f"f({OUT});",
        "no matching function",
        {"header": "inline void f(thread float& p) { p = 1; }\n"},
    ),
    Fault("write_to_const", f"x[0] = 1; {OUT} = 0;", "read-only"),
    Fault(
        "bare_pointer", INDEX + "float a[2]; float* p = a; p[0] = 1; p[1] = 2; out[i] = p[0];", "needs an address space"
    ),
    Fault(
        "bare_reference",
        f"float y = 1; f(y); {OUT} = y;",
        "needs an address space",
        {"header": "inline void f(float& p) { p = 1; }\n"},
    ),
    Fault("program_variable", OUT + " = K[0];", "program-scope", {"header": "static const float K[2] = {1, 2};\n"}),
    Fault("double", f"double d = x[0]; {OUT} = float(d);", "'double' does not exist"),
    Fault(
        "shuffle_of_ulong",
        f"ulong v = thread_position_in_grid.x; v = metal::simd_shuffle_xor(v, 1); {OUT} = float(v);",
        "Metal has no such SIMD function",
    ),
    Fault("bfloat_sum_of_mlx", f"bfloat v = bfloat(1.0f); {OUT} = float(simd_sum(v));", None),
    Fault("unknown_attribute", "out[thread_position_in_gird.x] = 1;", "undeclared"),
    Fault("half_to_bfloat", f"half a = half(x[0]); bfloat b = a; {OUT} = float(b);", "cannot initialize"),
]
FAULTS = [*MEMORY, *ORDER, *ARITHMETIC, *TYPES]


def found(fault: Fault, order: int) -> str:
    """What the simulator says about a fault; empty if nothing."""
    options = dict(fault.options)
    dtype, threads = options.pop("dtype", mx.float32), options.pop("threads", SIZE)
    init_value = options.pop("init_value", None)
    kernel = metal_kernel("fault", ["x"], ["out"], fault.source, mode="check", order=order, **options)
    try:
        (out,) = kernel(
            inputs=[mx.arange(SIZE).astype(mx.float32)],
            template=[("T", dtype)],
            grid=(threads, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(SIZE,)],
            output_dtypes=[dtype],
            init_value=init_value,
        )
    except (MetalRunError, MetalCompileError) as error:
        return str(error)
    assert SimulatedKernel.last is not None
    if SimulatedKernel.last.unwritten:
        return f"unwritten {SimulatedKernel.last.unwritten}"
    return "NaN in the output" if bool(mx.isnan(out.astype(mx.float32)).any()) else ""


@pytest.mark.parametrize("order", [0, 1], ids=["forward", "reverse"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault, order):
    old_clang = find_toolchain().major < LOCAL_BOUNDS_VERSION
    if fault.name == "private_overrun_through_pointer" and old_clang:
        pytest.skip(f"only clang {LOCAL_BOUNDS_VERSION} and newer can report this")
    report = found(fault, order)
    if fault.expected is None:
        assert report == ""
    else:
        assert fault.expected in report


def test_all_faults_of_the_suite_are_there():
    assert len(FAULTS) == len({f.name for f in FAULTS}) == 49


def test_reports_name_the_line():
    assert "fault.metal:10:" in found(next(f for f in FAULTS if f.name == "read_beyond_input"), 0)


def test_reports_name_the_other_access():
    assert "at fault.metal:" in found(next(f for f in FAULTS if f.name == "no_barrier"), 0)


@pytest.mark.parametrize(("threads", "limit"), [(2048, 1024), (512, 384)])
def test_more_threads_than_a_pipeline_allows_are_refused_as_mlx_does(threads, limit):
    kernel = metal_kernel("fault", ["x"], ["out"], f"{OUT} = x[0];", threads=limit)
    with pytest.raises(ValueError, match=rf"size \({threads}\) is greater than  .* per threadgroup \({limit}\)\."):
        kernel(
            inputs=[mx.zeros(8)],
            grid=(256, 1, 1),
            threadgroup=(threads, 1, 1),  # MLX does not take the smaller grid into account
            output_shapes=[(256,)],
            output_dtypes=[mx.float32],
        )


def places(seed):
    """Where a run finds its arrays, of 4, 2 and 16 bytes an element."""
    source = """
  threadgroup float a[40]; threadgroup half b[9]; threadgroup uint4 c[3];
  uint i = thread_position_in_grid.x;
  if (i == 0) out[0] = uint(reinterpret_cast<ulong>(&a[0]));
  if (i == 1) out[1] = uint(reinterpret_cast<ulong>(&b[0]));
  if (i == 2) out[2] = uint(reinterpret_cast<ulong>(&c[0]));
"""
    kernel = metal_kernel("places", ["x"], ["out"], source, placement=seed)
    (out,) = kernel(
        inputs=[mx.zeros(8)],
        grid=(3, 1, 1),
        threadgroup=(3, 1, 1),
        output_shapes=[(3,)],
        output_dtypes=[mx.uint32],
    )
    return tuple(out.tolist())


def test_threadgroup_arrays_lie_in_any_order_at_their_own_alignment_and_no_better_one():
    found = [places(seed) for seed in range(16)]
    assert found == [places(seed) for seed in range(16)]
    orders = {tuple(sorted(range(3), key=where.__getitem__)) for where in found}
    assert len(orders) == 6
    for where in found:
        for address, size in zip(where, (4, 2, 16), strict=True):
            assert address % (2 * size) == size


def test_the_placement_follows_the_schedule_or_the_environment(monkeypatch):
    assert [Options(order=order).seed() for order in (0, 1)] == [0, 1]
    monkeypatch.setenv("RING_MLX_SIM_PLACEMENT", "7")
    assert [Options(order=1).seed(), Options(placement=3).seed()] == [7, 3]
