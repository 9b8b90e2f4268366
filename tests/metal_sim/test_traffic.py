"""What the simulator counts, against bytes and lines counted by hand."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import pytest

from tests.metal_sim import SimulatedKernel, metal_kernel
from tests.metal_sim.marks import needs_simulator
from tests.metal_sim.runtime import Asked

pytestmark = needs_simulator

THREADS = 64  # two SIMD-groups, in one threadgroup
INDEX = "uint i = thread_position_in_grid.x; "
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


class Case(NamedTuple):
    """A body, what it asks of x, and how many bytes of x it reads at all."""

    source: str
    reads: Asked
    distinct: int


# The bytes of all lanes, of each access, lines, accesses.
CASES = {
    "coalesced": Case("out[i] = x[i];", Asked(256, 256, 2, 2), 256),
    "packs": Case("out[i] = ((const device float4*)x)[i].w;", Asked(1024, 1024, 8, 2), 1024),
    "strided": Case("out[i] = x[4 * i];", Asked(256, 256, 8, 2), 256),
    "far_apart": Case("out[i] = x[32 * (i % 32)];", Asked(256, 256, 64, 2), 128),
    "broadcast": Case("out[i] = x[0];", Asked(256, 8, 2, 2), 4),
    "pairs": Case("out[i] = x[i / 2];", Asked(256, 128, 2, 2), 128),
    "misaligned": Case("out[i] = x[i + 1];", Asked(256, 256, 4, 2), 256),
    "reversed": Case("out[i] = x[63 - i];", Asked(256, 256, 2, 2), 256),
    "overlapping": Case("out[i] = ((const device packed_float2*)(x + i))->y;", Asked(512, 264, 4, 2), 260),
    "half_of_the_lanes": Case("out[i] = i % 2 ? x[i] : 0.0f;", Asked(128, 128, 2, 2), 128),
    "again": Case(f"out[i] = x[i]; {BARRIER} out[i] += x[i];", Asked(512, 512, 4, 4), 256),
    "in_a_loop": Case(
        "float s = 0;\n#pragma unroll 1\nfor (int k = 0; k < 3; k++) s += x[i + 64 * k]; out[i] = s;",
        Asked(768, 768, 6, 6),
        768,
    ),
    "in_a_loop_with_sums": Case(
        "float s = 0; for (int k = 0; k < 3; k++) s += simd_sum(x[i + 64 * k]); out[i] = s;", Asked(768, 768, 6, 6), 768
    ),
    # Lanes come to their n-th turn after another number of turns, and yet in step: the sum between brings them there.
    "in_an_uneven_loop": Case(
        "float s = 0; for (uint k = 0; k < 2; k++) { if (i % 2 == k) s += x[i]; s += 0 * simd_sum(s); } out[i] = s;",
        Asked(256, 256, 4, 4),
        256,
    ),
}


def count(source, threads=THREADS, **options):
    kernel = metal_kernel("traffic", ["x"], ["out"], INDEX + source, count=True, **options)
    kernel(
        inputs=[mx.zeros((1024,))],
        grid=(threads, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(threads,)],
        output_dtypes=[mx.float32],
    )
    x, out = SimulatedKernel.last.traffic
    assert (x.name, out.name) == ("x", "out")
    return x, out


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_reads(name, order):
    x, _ = count(CASES[name].source, order=order)
    assert x.reads == CASES[name].reads
    assert x.distinct_read == CASES[name].distinct
    assert (x.writes, x.distinct_written) == (Asked(), 0)


def test_writes_and_reads_of_one_array_are_apart():
    _, out = count(f"out[i] = x[i]; {BARRIER} if (i < 32) out[i] += 1;")
    assert (out.reads, out.distinct_read) == (Asked(128, 128, 1, 1), 128)
    assert (out.writes, out.distinct_written) == (Asked(384, 384, 3, 3), 256)


def test_what_goes_to_threadgroup_memory():
    count(f"threadgroup float buf[66]; buf[i] = x[i]; {BARRIER} out[i] = buf[63 - i] + buf[i];")
    info = SimulatedKernel.last
    assert (info.threadgroup_written, info.threadgroup_read, info.threadgroup_bytes) == (256, 512, 272)


def test_a_part_of_the_threadgroups_is_enough_where_all_are_alike():
    whole, part = (count("out[i] = x[i % 64];", 640, every=n)[0].reads for n in (1, 5))
    assert whole == tuple(5 * n for n in part)
    assert part == Asked(512, 512, 4, 4)


def test_nothing_is_counted_unless_asked_for():
    kernel = metal_kernel("traffic", ["x"], ["out"], INDEX + "out[i] = x[i];")
    kernel(
        inputs=[mx.zeros((64,))],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
    )
    assert SimulatedKernel.last.traffic == ()
