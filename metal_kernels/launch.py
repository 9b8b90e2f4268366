"""Builds and launches kernels on the backend that runs them; only this module calls MLX's kernel constructors.

A backend is a callable with the contract of ``mx.fast.metal_kernel``: Metal itself, the CUDA twin of the same source
on an NVIDIA GPU, or the simulator of the tests. ``RING_MLX_KERNELS=off`` selects none, and so does a default device
that is the CPU; the plain forms then do all the work.
"""

from __future__ import annotations

import hashlib
import os
import re
from binascii import crc_hqx
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels import machine
from metal_kernels.constants import ints
from metal_kernels.proofs import Ledger, trial
from metal_kernels.variants import Variant, variant_of

Constructor = Callable[..., Any]
Template = Sequence[tuple[str, "int | bool | mx.Dtype"]]
BODY = "\n// ---- kernel ----\n"
SWITCH = "RING_MLX_KERNELS"


@dataclass(frozen=True)
class Backend:
    """What runs kernels: "metal", "cuda" or "simulator".

    ``constructor`` is as ``mx.fast.metal_kernel``; ``ledger`` says which kernels are proven, None lets all of them run.
    """

    name: str
    constructor: Constructor
    ledger: Ledger | None = field(default=None, compare=False)


_AUTOMATIC = Backend("automatic", mx.fast.metal_kernel)
_chosen: ContextVar[Backend | None] = ContextVar("backend", default=_AUTOMATIC)
# Notes what `Kernel.launch` is given, and what stands for the outputs; None launches it.
recorder: ContextVar[Callable[[Kernel, Sequence[Any], dict[str, Any]], list[Any]] | None] = ContextVar(
    "recorder", default=None
)


def backend() -> Backend | None:
    """The backend that kernels run on now, or None where only the plain forms run."""
    chosen = _chosen.get()
    if chosen is not _AUTOMATIC:
        return chosen
    return _detected() if mx.default_device() == mx.gpu else None


@contextmanager
def use(chosen: Backend | None) -> Iterator[None]:
    """Run kernels on ``chosen`` instead, None for the plain forms, as long as the context lasts."""
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


def resident(x: mx.array) -> mx.array:
    """A small array [n] of the host's numbers, where the threadgroups that read it need not wait for the host's memory.

    MLX's CUDA backend keeps what Python's numbers fill, and any array of up to 8 bytes, in memory shared with the host; a
    kernel of 128 threadgroups that read one number there took 20 us on an H100, and 4 without. What the GPU itself
    writes in more bytes is its own. Elsewhere x is returned as it is.
    """
    where = backend()
    if where is None or where.name != "cuda":
        return x
    return (x + _zeros(x.size, x.dtype))[0]


@lru_cache(maxsize=16)
def _zeros(size: int, dtype: mx.Dtype) -> mx.array:
    """[4, size], more than 8 bytes; computed at once, for whatever thread comes first."""
    zeros = mx.zeros((4, size), dtype)
    mx.eval(zeros)
    return zeros


def positions(offset: int | mx.array) -> mx.array:
    """Positions of the first tokens as a kernel reads them: [1] or [B] int32."""
    if isinstance(offset, int):
        return ints(offset)
    offset = offset if offset.ndim else offset.reshape(1)
    return offset if offset.dtype == mx.int32 else offset.astype(mx.int32)


@contextmanager
def doubting() -> Iterator[None]:
    """Let all kernels prove themselves again if what runs within fails.

    A compiled step fails when it is computed, which does not tell the kernel: one that was proven by another process may
    not build in this one.
    """
    try:
        yield
    except RuntimeError:
        where = backend()
        if where is not None and where.ledger is not None:
            where.ledger.doubt()
        raise


def is_off() -> bool:
    """Whether the environment does without kernels."""
    return os.environ.get(SWITCH, "").lower() in ("off", "0")


@cache
def sources() -> str:
    """A hash of all kernels' texts: what was seen of others says nothing of these."""
    files = sorted(Path(__file__).parent.rglob("*.metal"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


@cache
def _detected() -> Backend | None:
    if is_off():
        return None
    if mx.metal.is_available():
        return proving("metal", mx.fast.metal_kernel)
    if mx.cuda.is_available():
        from metal_kernels.twin import metal_kernel

        return proving("cuda", metal_kernel)
    return None


def proving(name: str, constructor: Constructor) -> Backend:
    """A backend on which each kernel must prove itself, with this machine's verdicts."""
    return Backend(name, constructor, Ledger(machine.store(name)))


@dataclass
class Kernel:
    """One kernel in a ``.metal`` file: functions first, then after a line ``// ---- kernel ----`` the body.

    The body uses the names of inputs, outputs and template arguments, and Metal's attributes such as
    ``thread_position_in_grid``; MLX writes the signature. Nothing is built before the first call. An array that a call
    passes twice is bound once: the later name becomes another one for the earlier. So a caller fills an input that a
    template argument switches off with one that is there anyway, and pays nothing for it.

    Args:
        file: The ``.metal`` file.
        inputs: Names of the input arrays; a 0-d or short array arrives in constant memory.
        outputs: Names of the output arrays.
        headers: Further ``.metal`` files of functions, put before this one's.
    """

    file: Path
    inputs: Sequence[str]
    outputs: Sequence[str]
    headers: Sequence[Path] = ()
    _built: dict[tuple[str, tuple[int, ...]], Any] = field(default_factory=dict, repr=False)
    _digest: str = field(default="", repr=False)

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Template,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Launch: ``grid`` counts threads, as in Metal's dispatchThreads; returns the outputs.

        Raises RuntimeError if no backend runs kernels here; Unproven or TurnedOff if the backend's ledger does not
        admit it; see `proofs`.
        """
        where = backend()
        if where is None:
            raise RuntimeError(f"[{self.name}] no backend runs kernels here; call the plain form.")
        first: dict[int, int] = {}
        same = tuple([first.setdefault(id(x), i) for i, x in enumerate(inputs)])
        if where.ledger is not None:
            # A template's values follow from the types of all arrays but the first one.
            launch = id(self), id(template), grid, same, inputs[0].dtype, shapes[0]
            if trial.get() is not None or launch not in where.ledger.passing:
                arguments = template, inputs, same, dtypes, shapes, grid, threadgroup
                where.ledger.admit(launch, template, lambda: self._variant(*arguments), inputs)
        built = self._built.get((where.name, same))
        if built is None or built[0] is not where.constructor:
            built = self._built[where.name, same] = self._prepare(where.constructor, same)
        out: list[mx.array] = built[1](
            inputs=[inputs[i] for i in first.values()],
            template=[*template, *built[2]],
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
        )
        return out

    def launch(self, inputs: Sequence[mx.array], **how: Any) -> list[mx.array]:
        """As `__call__`; where a wrapper is recorded (see `recorded`) it is only noted."""
        note = recorder.get()
        return self(inputs, **how) if note is None else note(self, inputs, how)

    @property
    def name(self) -> str:
        return f"ring_{self.file.stem}"

    def source(self) -> tuple[str, str]:
        """The functions and the body, as the constructors take them. Raises ValueError if the file has no body."""
        functions, found, body = self.file.read_text(encoding="utf-8").partition(BODY)
        if not found:
            raise ValueError(f"[{self.name}] {self.file.name} has no line {BODY.strip()!r}.")
        return "".join(h.read_text(encoding="utf-8") for h in self.headers) + functions + "\n", body

    def _variant(self, *arguments: Any) -> Variant:
        if not self._digest:
            self._digest = hashlib.sha256(repr(self.source()).encode()).hexdigest()
        return variant_of(self.name, self._digest, *arguments)

    def _prepare(self, constructor: Constructor, same: Sequence[int]) -> tuple[Constructor, Any, Template]:
        """The kernel for arrays that are the same so, and what its template takes besides."""
        # MLX keeps one library a name and template, and compiles again where another text has the same ones.
        mark = [] if len(set(same)) == len(same) else [("SAME", crc_hqx(bytes(same), 0))]
        return constructor, self._build(constructor, same), mark

    def _build(self, constructor: Constructor, same: Sequence[int]) -> Any:
        """For inputs of which number i is the array of number ``same[i]``."""
        header, body = self.source()
        names = {name: self.inputs[i] for name, i in zip(self.inputs, same, strict=True)}
        body = re.sub(r"\b(?:" + "|".join(names) + r")\b", lambda found: names[found[0]], body)
        return constructor(
            name=self.name,
            input_names=list(dict.fromkeys(names.values())),
            output_names=list(self.outputs),
            source=body,
            header=header,
        )
