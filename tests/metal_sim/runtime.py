"""Runs one dispatch of a built kernel in the C++ runtime and turns what it found into words."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.metal_sim.build import runtime_library
from tests.metal_sim.symbols import symbolize

REDZONE_BYTES = 4096
REDZONE = 0xCB
POISON = 0xFF
MAX_THREADS = 1024  # of the simulator; a pipeline may allow fewer
MAX_OUTPUTS = 16
WRITABLE, INITIALIZED = 1, 2


class MetalRunError(Exception):
    """The kernel ran and did something that Metal does not define; the arguments are its reports."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class _BufferRecord(ctypes.Structure):
    _fields_ = (
        ("pointer", ctypes.c_void_p),
        ("size", ctypes.c_ulong),
        ("flags", ctypes.c_int),
        ("element_size", ctypes.c_uint),
        ("name", ctypes.c_char_p),
    )


class _Statistics(ctypes.Structure):
    _fields_ = (
        ("accesses", ctypes.c_long),
        ("switches", ctypes.c_long),
        ("simd_ops", ctypes.c_long),
        ("barriers", ctypes.c_long),
        ("threadgroup_read", ctypes.c_long),
        ("threadgroup_written", ctypes.c_long),
        ("threadgroup_bytes", ctypes.c_uint),
        ("n_reports", ctypes.c_int),
        ("unwritten", ctypes.c_long * MAX_OUTPUTS),
    )


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        order: 0 runs threads, SIMD-groups and threadgroups in rising order, 1 in falling order.
        placement: Seed of the places of threadgroup arrays; None takes RING_MLX_SIM_PLACEMENT, or else ``order``.
        threads: The most of a threadgroup that the pipeline allows.
        threadgroup_memory: Bytes of arrays, padded, that a threadgroup may have.
        count: Count traffic instead of checking accesses; mode must be check.
        every: Run only one threadgroup in so many, where what is counted is alike in all.
        strict_divergence: Report SIMD operations that not all lanes reach.
        early_exit: Allow threads to return before others reach a barrier.
        none_is_execution: Let barriers with `mem_none` order memory.
        simd_ops_order: Let SIMD operations order memory within their group.
        allow: Kinds of report that are no error.
    """

    order: int = 0
    placement: int | None = None
    threads: int = MAX_THREADS
    threadgroup_memory: int = 32 * 1024
    count: bool = False
    every: int = 1
    strict_divergence: bool = True
    early_exit: bool = False
    none_is_execution: bool = False
    simd_ops_order: bool = False
    allow: tuple[str, ...] = ("same-value write",)

    def seed(self) -> int:
        """Of the placement."""
        if self.placement is not None:
            return self.placement
        return int(os.environ.get("RING_MLX_SIM_PLACEMENT") or self.order) & 0x7FFFFFFF


@dataclass(frozen=True)
class Report:
    """One kind of finding at one place: of the source, or an address of the library, looked up when somebody reads it."""

    kind: str
    message: str
    place: str
    pc: int
    count: int
    library: Path

    def __str__(self) -> str:
        message = re.sub(r"at \+0x([0-9a-f]+)", lambda found: f"at {self._at(int(found[1], 16))}", self.message)
        place = self._at(self.pc) if self.pc else self.place
        return f"{place}: {self.kind}: {message} (x{self.count})".removeprefix(": ")

    def _at(self, address: int) -> str:
        return symbolize(self.library, [address])[address]


class Asked(NamedTuple):
    """What SIMD-groups ask of a buffer.

    Attributes:
        lane_bytes: Of all lanes.
        nbytes: The same, but a byte that several lanes of one access want is counted once.
        lines: Of 128 bytes, touched by each access.
        accesses: Instructions of a SIMD-group.
    """

    lane_bytes: int = 0
    nbytes: int = 0
    lines: int = 0
    accesses: int = 0


class Traffic(NamedTuple):
    """Of one buffer: what was asked, and how many of its bytes were read or written at all."""

    name: str
    reads: Asked
    writes: Asked
    distinct_read: int
    distinct_written: int


@dataclass(frozen=True)
class RunInfo:
    """Facts of a dispatch."""

    seconds: float
    accesses: int
    switches: int
    simd_ops: int
    barriers: int
    threadgroup_read: int
    threadgroup_written: int
    threadgroup_bytes: int
    reports: tuple[Report, ...] = ()
    unwritten: dict[str, int] = field(default_factory=dict)
    traffic: tuple[Traffic, ...] = ()


class Buffer:
    """A copy of an array between two red zones."""

    def __init__(
        self, data: npt.NDArray[np.generic], name: str, is_writable: bool = False, is_initialized: bool = True
    ) -> None:
        data = np.ascontiguousarray(data).reshape(data.shape or (1,))
        self.name, self.shape, self.dtype, self.nbytes = name, data.shape, data.dtype, data.nbytes
        self.is_writable, self.is_initialized = is_writable, is_initialized
        self.raw = np.full(self.nbytes + 2 * REDZONE_BYTES + 64, REDZONE, np.uint8)
        self.start = REDZONE_BYTES + -(self.raw.ctypes.data + REDZONE_BYTES) % 64
        self.inner = self.raw[self.start : self.start + self.nbytes]
        self.inner[:] = np.frombuffer(data.tobytes(), np.uint8) if is_initialized else POISON

    def record(self) -> _BufferRecord:
        """As the runtime wants it."""
        flags = (WRITABLE if self.is_writable else 0) | (INITIALIZED if self.is_initialized else 0)
        address = self.raw.ctypes.data + self.start
        return _BufferRecord(address, self.nbytes, flags, self.dtype.itemsize, self.name.encode())

    def array(self) -> npt.NDArray[np.generic]:
        """A copy of the contents."""
        return self.inner.view(self.dtype).reshape(self.shape).copy()

    def is_redzone_intact(self) -> bool:
        """Whether nothing wrote beside the array."""
        return bool(
            (self.raw[: self.start] == REDZONE).all() and (self.raw[self.start + self.nbytes :] == REDZONE).all()
        )


@functools.cache
def _runtime() -> ctypes.CDLL:
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _kernel(library: Path) -> ctypes.CDLL:
    _runtime()
    return ctypes.CDLL(str(library))


def check_sizes(grid: Sequence[int], threadgroup: Sequence[int], limit: int = MAX_THREADS) -> None:
    """Raises ValueError, in MLX's words where it has some, unless Metal could dispatch this."""
    if any(n <= 0 for n in (*grid, *threadgroup)):
        raise ValueError(f"empty grid {tuple(grid)} or threadgroup {tuple(threadgroup)}")
    threads = math.prod(threadgroup)
    if threads > limit:
        most = f"the maximum allowed threads per threadgroup ({limit})."
        raise ValueError(f"Thread group size ({threads}) is greater than  {most}")


def dispatch(
    library: Path,
    buffers: Sequence[Buffer | None],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    mode: str,
    options: Options,
) -> RunInfo:
    """Run a kernel over a grid of threads; ``buffers`` are changed in place.

    Raises:
        MetalRunError: If anything was reported whose kind is not allowed.
    """
    check_sizes(grid, threadgroup, options.threads)
    missing = _BufferRecord(None, 0, 0, 1, b"null")
    records = (_BufferRecord * max(1, len(buffers)))(*[missing if b is None else b.record() for b in buffers])
    switches = (
        options.strict_divergence,
        options.early_exit,
        options.none_is_execution,
        options.simd_ops_order,
        options.order == 1,
        mode == "check",
        options.seed(),
        options.threadgroup_memory,
        options.count,
        options.every,
    )
    statistics = _Statistics()
    triple = ctypes.c_int * 3
    started = time.perf_counter()
    status = _runtime().msl_dispatch(
        _kernel(library).msl_entry,
        records,
        len(buffers),
        triple(*grid),
        triple(*threadgroup),
        (ctypes.c_int * len(switches))(*switches),
        ctypes.byref(statistics),
    )
    seconds = time.perf_counter() - started
    if status == 2:
        raise ValueError("the runtime takes at most 64 buffers and 1024 threads in a threadgroup")
    traffic = tuple(_traffic(i, b.name) for i, b in enumerate(buffers) if b is not None) if options.count else ()
    reports = [_report(i, library) for i in range(statistics.n_reports)]
    for b in buffers:
        if b is not None and not b.is_redzone_intact():
            reports.append(Report("out of bounds", f"memory beside buffer {b.name} was written", "", 0, 1, library))
    outputs = [b for b in buffers if b is not None and b.is_writable and b.nbytes]
    unwritten = {b.name: n for b, n in zip(outputs, statistics.unwritten, strict=False) if n}
    errors = [r for r in reports if r.kind not in options.allow]
    if errors:
        raise MetalRunError(*errors)
    return RunInfo(
        seconds,
        statistics.accesses,
        statistics.switches,
        statistics.simd_ops,
        statistics.barriers,
        statistics.threadgroup_read,
        statistics.threadgroup_written,
        statistics.threadgroup_bytes,
        tuple(reports),
        unwritten,
        traffic,
    )


def _traffic(i: int, name: str) -> Traffic:
    found = (ctypes.c_long * 10)()
    _runtime().msl_traffic(i, found)
    return Traffic(name, Asked(*found[0:4]), Asked(*found[4:8]), found[8], found[9])


def _report(i: int, library: Path) -> Report:
    kind, message, file = (ctypes.create_string_buffer(n) for n in (64, 1000, 300))
    pc, line, count = ctypes.c_ulong(), ctypes.c_uint(), ctypes.c_long()
    _runtime().msl_report(i, kind, message, ctypes.byref(pc), file, ctypes.byref(line), ctypes.byref(count))
    place = f"{file.value.decode()}:{line.value}" if line.value else ""
    return Report(kind.value.decode(), message.value.decode(), place, pc.value, count.value, library)
