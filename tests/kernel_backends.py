"""Where the tests of kernels run them: on this machine's GPU, or else in the simulator; knows no kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from metal_kernels.launch import Backend, Constructor, Kernel
from metal_kernels.machine import Store
from metal_kernels.proofs import Ledger
from metal_kernels.recorded import find
from tests.compare import to_numpy
from tests.metal_sim import MetalRunError, metal_kernel, why_unavailable

# A thread of an M1 or M2 may take 256 registers of 16 bits, and a core has room for 384 such threads: no pipeline's
# maxTotalThreadsPerThreadgroup is lower there (the table in Mesa's compiler for these GPUs, agx_occupancy_for_register_count,
# ends 208 registers: 512 threads, 232: 448, 256: 384; newer GPUs divide their registers as they go). MLX raises above that number,
# as it did on an M2 Ultra where a kernel of mlx-vlm asked for 1,024 and had 896 (its pull request 1799).
PIPELINE_THREADS = 384


@functools.cache
def simulated(mode: str = "check", order: int = 0, strict: bool = True) -> Backend:
    """The simulator as a backend; every run type-checks, "check" checks each access, "fast" is for larger shapes.

    Each schedule has another placement of threadgroup arrays, and pipelines allow as few threads as any Apple GPU's.
    """
    return Backend(
        "simulator", functools.partial(metal_kernel, mode=mode, order=order, threads=PIPELINE_THREADS, strict=strict)
    )


def proving(constructor: Constructor, name: str = "metal", store: Store | None = None) -> Backend:
    """A backend whose kernels have everything to prove; verdicts are kept in memory by default."""
    return Backend(name, constructor, Ledger(store or Store(None, {})))


def backends(mode: str = "check") -> list[Any]:
    """Parameters for a test's argument ``backend``: the GPU if there is one, else the simulator (skipped if absent).

    Mode "check" is simulated in two schedules, "fast" in one; a GPU has no modes.
    """
    here = launch.backend()
    if here is not None:  # without its ledger, which would serve the plain form where a kernel is wrong
        return [pytest.param(Backend(here.name, here.constructor), id=here.name)]
    missing = why_unavailable()
    if missing:
        return [pytest.param(None, marks=pytest.mark.skip(reason=missing), id="none")]
    orders = (0, 1) if mode == "check" else (0,)
    return [pytest.param(simulated(mode, order), id=f"{mode}{order}") for order in orders]


def simulator(mode: str = "check", order: int = 0, strict: bool = True) -> Any:
    """A context in which kernels run in the simulator; skips the test where it cannot run."""
    missing = why_unavailable()
    if missing:
        pytest.skip(missing)
    return launch.use(simulated(mode, order, strict))


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def barriers(kernel: Kernel) -> range:
    """Numbers of the barriers in a kernel's body, or else in its functions, for `mutated`."""
    functions, body = kernel.source()
    return range(body.count(BARRIER) or functions.count(BARRIER))


@contextmanager
def mutated(kernel: Kernel, *changes: tuple[str, str], occurrence: int = 0) -> Iterator[None]:
    """Run a kernel with planted faults as long as the context lasts.

    Each change (old, new) replaces one place of ``old``, counted from 0, in the body, else in the functions.
    """
    header, body = kernel.source()
    for old, new in changes:
        if old in body:
            body = _replaced(body, old, new, occurrence)
        else:
            header = _replaced(header, old, new, occurrence)
    kept, digest = dict(kernel._built), kernel._digest
    kernel._built.clear()
    kernel._digest = ""
    kernel.__dict__["source"] = lambda: (header, body)
    try:
        yield
    finally:
        del kernel.__dict__["source"]
        kernel._built.clear()
        kernel._built.update(kept)
        kernel._digest = digest


def _replaced(text: str, old: str, new: str, occurrence: int) -> str:
    parts = text.split(old)
    assert len(parts) > occurrence + 1, f"{old!r} is not there {occurrence + 1} times"
    return old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :])


def is_caught(run: Callable[[], Sequence[mx.array]], right: Sequence[mx.array]) -> bool:
    """Whether the fault of `mutated` shows: ``run`` fails in check mode, or its results are far from the right ones."""
    for order in (0, 1):
        with simulator("check", order, strict=False):  # types are for the kernel without the fault to prove
            try:
                results = [to_numpy(x) for x in run()]
            except MetalRunError:
                return True
        if any(not np.allclose(a, to_numpy(b), rtol=0.05, atol=0.05) for a, b in zip(results, right, strict=True)):
            return True
    return False


def takes(wrapper, *arguments):
    """Whether the wrapper's kernel takes these arguments."""
    return find(wrapper, arguments)[0] is not None
