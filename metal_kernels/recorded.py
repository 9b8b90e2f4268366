"""A kernel's wrapper runs once for each kind of arguments; from then on its launches are repeated.

A wrapper checks its arguments, chooses sizes, and launches kernels on the arguments' arrays and on constants. All of it follows
from shapes, dtypes and numbers. So it is run with a `Place` for each array, and what it launches is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from metal_kernels import choices, launch
from metal_kernels.launch import Kernel
from metal_kernels.packed import Weights

MOST_KEPT = 1024

Wrapper = Callable[..., Any]


class NoKernelError(ValueError):
    """A wrapper's kernel does not take these arguments."""


@dataclass(frozen=True)
class Place:
    """Stands for an array in a recording: the array of this number among the arguments' and all results so far."""

    number: int
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Launch(NamedTuple):
    """A kernel, the numbers of its inputs or the constants themselves, and the other arguments of `Kernel.__call__`."""

    kernel: Kernel
    inputs: list[int | mx.array]
    how: dict[str, Any]


@dataclass(frozen=True)
class Call:
    """What a wrapper launched, and the numbers of its results."""

    launches: list[Launch]
    results: tuple[int, ...]
    is_single: bool

    def __call__(self, arrays: Sequence[mx.array]) -> Any:
        """The wrapper's results for the arrays of other arguments of the same kinds."""
        found = [*arrays]
        for kernel, inputs, how in self.launches:
            found += kernel([found[i] if isinstance(i, int) else i for i in inputs], **how)
        return found[self.results[0]] if self.is_single else tuple([found[i] for i in self.results])


def find(wrapper: Wrapper, arguments: Sequence[Any], choice: str = "") -> tuple[Call | None, list[mx.array]]:
    """The call for these arguments and their arrays; no call where the kernel does not take them, or MLX is preferred.

    Args:
        wrapper: Takes arrays, weights and hashable values.
        arguments: Its arguments, tokens [..., D] first.
        choice: By which `choices` may prefer MLX; "" always takes the kernel.
    """
    where, arrays, kinds = launch.backend(), list[mx.array](), list[Any]()
    for a in arguments:
        if isinstance(a, mx.array):
            arrays.append(a)
            kinds.append((a.shape, a.dtype))
        elif isinstance(a, Weights):
            arrays += a.leaves
            kinds.append(a.kind)
        else:
            kinds.append(a)
    name = "" if where is None else where.name
    held = choices.tried.get()
    if held is None:
        held = choices.applied.get(name, choices.NOTHING)
    key = wrapper, choice, name, *kinds
    found = held.calls.get(key)
    if found is None:
        if len(held.calls) >= MOST_KEPT:
            held.calls.clear()
        with choices.noting() as names:
            is_ours = not choice or choices.ours(choice, choices.tokens(choice, arguments[0]))
            found = held.calls[key] = (_record(wrapper, arguments) if is_ours else None), names
    asked = choices.asked.get()
    if asked is not None:
        asked |= found[1]
    return found[0], arrays


def run(wrapper: Wrapper, *arguments: Any) -> Any:
    """What the wrapper returns; raises what it raises."""
    call, arrays = find(wrapper, arguments)
    return wrapper(*arguments) if call is None else call(arrays)


def _record(wrapper: Wrapper, arguments: Sequence[Any]) -> Call | None:
    launches: list[Launch] = []
    count = 0

    def place(shape: tuple[int, ...], dtype: mx.Dtype) -> Place:
        nonlocal count
        count += 1
        return Place(count - 1, shape, dtype)

    def note(kernel: Kernel, inputs: Sequence[mx.array | Place], how: dict[str, Any]) -> list[Place]:
        launches.append(Launch(kernel, [x.number if isinstance(x, Place) else x for x in inputs], how))
        return list(map(place, how["shapes"], how["dtypes"]))

    def stand_in(a: Any) -> Any:
        if isinstance(a, mx.array):
            return place(a.shape, a.dtype)
        return a.map(stand_in) if isinstance(a, Weights) else a

    token = launch.recorder.set(note)
    try:
        found = wrapper(*map(stand_in, arguments))
    except NoKernelError:
        return None
    finally:
        launch.recorder.reset(token)
    results = [found] if isinstance(found, Place) else found
    return Call(launches, tuple(x.number for x in results), isinstance(found, Place))
