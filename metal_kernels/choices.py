"""A machine's choices: MLX's operation or our kernel, and how work is cut; the table of defaults, and present choices.

A choice is named by an operation and how many tokens it takes, such as ``norm_qmv/1``. What holds is the first of: what
is tried (`use`), what was chosen on this machine for this kind of model (`apply`), the table.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from metal_kernels import launch

SWITCH = "RING_MLX_TUNE"
Value = str | int
Chosen = Mapping[str, Value]
# MLX's own operation; our kernel with the sizes that its module has; the same with half or twice of them.
MLX, KERNEL, HALF, DOUBLE = "mlx", "kernel", "half", "double"
OTHER_WIDTH, UNSPLIT, BY_HEAD, WITHIN, TALL = "other width", "unsplit", "by head", "within", "tall"
SCALES = {HALF: 0.5, DOUBLE: 2.0}
# Where nothing runs kernels: MLX's CPU backend, and a GPU without them.
CPU, PLAIN = "cpu", "plain"
ONE, FEW, EIGHT, MANY = "1", "2-4", "5-8", "9+"


class Entry(NamedTuple):
    """One thing to choose.

    Attributes:
        about: What it is, for people.
        values: What may be chosen, by backend; "" stands for those that are not named. None: nothing to choose there.
        default: What holds where nobody chose, alike.
    """

    about: str
    values: Mapping[str, tuple[Value, ...]]
    default: Mapping[str, Value]

    def values_on(self, where: str) -> tuple[Value, ...]:
        """The values that may be chosen on a backend."""
        return self.values.get(where, self.values.get("", ()))

    def default_on(self, where: str) -> Value:
        return self.default.get(where, self.default[""])


def _ours(about: str, *sizes: Value, default: Mapping[str, Value] | None = None) -> Entry:
    """MLX's operation or our kernel, perhaps with other sizes."""
    return Entry(about, {CPU: (), PLAIN: (), "": (MLX, KERNEL, *sizes)}, {"": KERNEL} | dict(default or {}))


# On an H100 in a compiled chain, against MLX's operations: one token of the norm's product 1.02 times as fast (mini) and
# 1.03 (flash), four 1.46 and 1.38; of the gate's 1.27 and 1.21, 1.45 and 1.19. All kernels have become faster since, their
# numbers being constants: the residual's takes the GPU 3.2 us where MLX's product and sum take 8. Several tokens
# take the H200 as long as one on matrix units (TALL; fused_qmv/README.md has the times).
# Attention of a token over 33,000 took MLX 62 us on an H200 and ours 25; of several tokens cuDNN plans 46 ms a length there.
# gather_qmm was seen at 4.6 TFLOP/s where a dense product of the same work ran at 194, so ours takes the experts of many
# tokens on CUDA; on Metal MLX's is tuned for the chip. Nothing was timed on Metal: there the machine itself has to.
_TALL_ON_CUDA = {"cuda": TALL}
_EXPERTS = ("half first", "double first", "half second", "double second")
TABLE: dict[str, Entry] = {
    "experts/1": _ours("experts of a token; rows a simdgroup", *_EXPERTS),
    "norm_qmv/1": _ours("norm and product of a token; rows a team", HALF, DOUBLE),
    "gate_qmv/1": _ours("gate, product and residual of a token; rows a team", HALF, DOUBLE),
    "add_qmv/1": _ours("product and residual of a token; rows a team", HALF, DOUBLE),
    "norm_router/1": _ours("norm and router's product of a token; rows a threadgroup", HALF, DOUBLE),
    "head/1": _ours("last norm and head of a token; tiles a threadgroup", HALF, DOUBLE, default={"metal": MLX}),
    "recurrent/1": _ours("linear attention of a token; columns of the state a threadgroup", OTHER_WIDTH),
    "qk_norm_rope/1": _ours("norms and rotation of a token"),
    "route/1": _ours(
        "choice of experts of a token; apart or within their first kernel", WITHIN, default={"cuda": WITHIN}
    ),
    "few_queries/1": _ours("attention of a token", default={"metal": MLX, "cuda": MLX}),
    "many_keys/1": _ours("attention of a token over more than 1,024", default={"metal": MLX}),
    "experts/9+": _ours("experts of a prompt; tokens a tile", HALF, DOUBLE, default={"metal": MLX}),
    "lightning_attn/9+": _ours("linear attention of a prompt; parts in which time is split", HALF, DOUBLE, UNSPLIT),
    "linear_gate/9+": _ours("gate of a prompt"),
    "qk_norm_rope/9+": _ours("norms and rotation of a prompt"),
    "route/9+": _ours("choice of experts of a prompt"),
    "add_norm/9+": _ours("residual and norm of a prompt"),
    "chunk_tokens/9+": Entry(
        "tokens a chunk of linear attention in MLX's operations", {"": (BY_HEAD, 16, 32, 64, 128)}, {"": BY_HEAD}
    ),
    # A CPU reads the toy 1.25 and a tiny model 1.6 times as fast in steps of 128 as of 2,048 (two cores of an AMD EPYC):
    # what a step computes stays in its caches. Nothing was timed on Metal.
    "prefill_step": Entry(
        "prompt tokens a step", {CPU: (64, 128, 256), "": (512, 1024, 2048, 4096)}, {CPU: 128, "": 2048}
    ),
}
for _size, _words in ((FEW, "2 to 4 tokens"), (EIGHT, "5 to 8 tokens")):
    TABLE[f"experts/{_size}"] = _ours(f"experts of {_words}", *_EXPERTS)
    TABLE[f"norm_qmv/{_size}"] = _ours(f"norm and product of {_words}", HALF, DOUBLE, TALL, default=_TALL_ON_CUDA)
    TABLE[f"gate_qmv/{_size}"] = _ours(
        f"gate, product and residual of {_words}", HALF, DOUBLE, TALL, default=_TALL_ON_CUDA
    )
    TABLE[f"add_qmv/{_size}"] = _ours(f"product and residual of {_words}", HALF, DOUBLE, TALL, default=_TALL_ON_CUDA)
    TABLE[f"norm_router/{_size}"] = _ours(f"norm and router's product of {_words}", HALF, DOUBLE)
    _about = f"last norm and head of {_words}; tiles a threadgroup"
    TABLE[f"head/{_size}"] = _ours(_about, HALF, DOUBLE, default={"metal": MLX})
    TABLE[f"few_queries/{_size}"] = _ours(f"attention of {_words}", default={"metal": MLX})
    TABLE[f"many_keys/{_size}"] = _ours(f"attention of {_words} over more than 1,024", default={"metal": MLX})


class Held(dict[str, Value]):
    """Values used instead of the table's, and what was computed with them (see `recorded`)."""

    def __init__(self, values: Chosen) -> None:
        super().__init__(values)
        self.calls: dict[Any, Any] = {}


NOTHING = Held({})
applied: dict[str, Held] = {}  # by backend
tried: ContextVar[Held | None] = ContextVar("tried", default=None)
asked: ContextVar[set[str] | None] = ContextVar("asked", default=None)


def where() -> str:
    """The present backend."""
    backend = launch.backend()
    if backend is not None:
        return backend.name
    return PLAIN if mx.default_device() == mx.gpu else CPU


def is_off() -> bool:
    """Whether the environment demands the tables: nothing is timed, and kept choices are not used."""
    return os.environ.get(SWITCH, "").lower() in ("off", "0")


def size_class(tokens: int) -> str:
    """The last part of a choice's name."""
    return ONE if tokens == 1 else FEW if tokens <= 4 else EIGHT if tokens <= 8 else MANY


def tokens(operation: str, x: mx.array) -> int:
    """Tokens of x [..., D] that count for a choice: of attention, x [B, T, ...] or [B, heads, T, D], those of a row."""
    if operation in ("few_queries", "many_keys"):
        return x.shape[2]
    return x.shape[1] if operation in ("recurrent", "lightning_attn") else math.prod(x.shape[:-1])


def active(on: str | None = None) -> Chosen:
    """Present differences from the table on a backend, by default the present one."""
    held = tried.get()
    return applied.get(on or where(), NOTHING) if held is None else held


def chosen(name: str, on: str | None = None) -> Value:
    on = on or where()
    names = asked.get()
    if names is not None:
        names.add(name)
    return active(on).get(name, TABLE[name].default_on(on))


def ours(operation: str, tokens: int) -> bool:
    """Whether our kernel is chosen, rather than MLX's operation."""
    backend = launch.backend()
    return backend is not None and _of(operation, tokens, backend.name) != MLX


def variant(operation: str, tokens: int) -> Value:
    """How our kernel's work is cut: KERNEL, as its module says, or one of the other values."""
    found = _of(operation, tokens, where())
    return KERNEL if found == MLX else found


def scaled(size: int, operation: str, tokens: int) -> int:
    """``size`` as chosen: as it is, or half or twice of it."""
    return max(1, int(size * SCALES.get(str(variant(operation, tokens)), 1.0)))


def _of(operation: str, tokens: int, on: str) -> Value:
    name = f"{operation}/{size_class(tokens)}"
    return chosen(name, on) if name in TABLE else KERNEL


def valid(found: object, on: str) -> dict[str, Value]:
    """The entries of ``found`` that are in the table, with a value that it allows on a backend."""
    if not isinstance(found, Mapping):
        return {}
    return {
        name: value
        for name, value in found.items()
        if name in TABLE and any(type(value) is type(v) and value == v for v in TABLE[name].values_on(on))
    }


def apply(found: object, on: str | None = None) -> None:
    """Use these values from now on, on a backend, instead of earlier ones; values that the table does not have are dropped."""
    on = on or where()
    applied[on] = Held(valid(found, on))


@contextmanager
def use(values: Chosen | None) -> Iterator[set[str]]:
    """Use only these values within the context, which gives the names that are looked up meanwhile."""
    token = tried.set(None if values is None else _held(tuple(sorted(values.items()))))
    try:
        with noting() as names:
            yield names
    finally:
        tried.reset(token)


@lru_cache(maxsize=64)
def _held(values: tuple[tuple[str, Value], ...]) -> Held:
    """The same object for equal values, so that its computed parts are found when they are tried again."""
    return Held(dict(values))


@contextmanager
def noting() -> Iterator[set[str]]:
    """Collects the names that are looked up within the context."""
    names: set[str] = set()
    token = asked.set(names)
    try:
        yield names
    finally:
        asked.reset(token)
        around = asked.get()
        if around is not None:
            around |= names
