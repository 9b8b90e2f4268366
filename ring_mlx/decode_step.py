"""One decode step as a few compiled pieces, so that Python builds its graph once and not for every token.

A step at Ring-mini shapes is some 160 dispatches; naming each from Python takes longer than running it on a fast GPU.
What only moves arrays, from one softmax layer's queries to the next one's, is compiled as one piece; keys and values,
which grow, are handled between the pieces. Weights are constants of a piece: some 400 inputs would take MLX as long to
gather as a third of what building a step takes in all. A weight or module that was put in the place of another is seen,
and the pieces are compiled anew; what is written into an array (``w[0] = 1``) is not. Knows layers and their caches, not
the embedding and the head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from operator import getitem, is_
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import launch

if TYPE_CHECKING:
    from ring_mlx.model import DecoderLayer

# The simulator computes at once and cannot be traced; on the CPU compiling takes a C++ compiler and seconds a shape.
COMPILED_ON = ("metal", "cuda")
# A container of a layer's weights, where in it, and what was there when the pieces were compiled.
Place = tuple[Any, Any, Any]


def is_worthwhile() -> bool:
    """Whether steps are compiled on the backend that runs kernels now."""
    backend = launch.backend()
    return backend is not None and backend.name in COMPILED_ON


class DecodeStep:
    """The layers of a model for one new token a row.

    Attributes:
        layers: All of them, in order.
    """

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.layers = layers
        # Experts that are read on demand are chosen in Python, which a compiled piece does not run.
        self._can_compile = not any(getattr(layer.mlp, "is_streamed", False) for layer in layers)
        self._pieces: list[tuple[list[int], int | None, Callable[..., Any]]] = []
        self._places: list[list[Any]] = [[], [], []]

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeStep:
        """A step of the copied layers; what is compiled cannot be copied."""
        return DecodeStep(copy.deepcopy(self.layers, memo))

    def _compile(self) -> None:
        """Make the pieces for the weights as they are now, which must be in memory to be constants."""
        self._places = [list(column) for column in zip(*_places(self.layers), strict=True)]
        mx.eval([found for found in self._places[2] if isinstance(found, mx.array)])
        self._pieces = []
        last: int | None = None
        linear: list[int] = []
        for i, layer in enumerate([*self.layers, None]):
            if layer is not None and layer.is_linear:
                linear.append(i)
                continue
            softmax = None if layer is None else i
            self._pieces.append((linear, softmax, _piece(self.layers, last, linear, softmax)))
            last, linear = softmax, []

    def accepts(self, x: mx.array, caches: Sequence[Any]) -> bool:
        """Whether `__call__` takes these: one token a row, after others that the caches hold."""
        if not self._can_compile or x.shape[1] != 1 or any(c is None for c in caches):
            return False
        return all(c[0] is not None for layer, c in zip(self.layers, caches, strict=True) if layer.is_linear)

    def __call__(self, x: mx.array, caches: Sequence[Any], masks: dict[bool, Any], offset: int | mx.array) -> mx.array:
        """Run all layers, as they would run one by one.

        Args:
            x: The residual stream [B, 1, hidden].
            caches: One a layer; updated in place.
            masks: Of softmax (False) and linear (True) layers.
            offset: Position of the token, one for all rows or [B].

        Returns:
            The residual stream [B, 1, hidden].
        """
        within, at, found = self._places
        if not self._pieces or not all(map(is_, map(getitem, within, at), found)):
            self._compile()
        position = mx.array([offset], mx.int32) if isinstance(offset, int) else offset
        o: mx.array | None = None
        for linear, softmax, piece in self._pieces:
            states = [caches[i][0] for i in linear]
            x, opened, states = piece(x, o, states, position, masks[True])
            for i, state in zip(linear, states, strict=True):
                caches[i][0] = state
            if softmax is not None:
                q, k, v = opened
                o = self.layers[softmax].attention.attend(q, k, v, masks[False], caches[softmax])
        return x


def _piece(
    layers: Sequence[DecoderLayer], last: int | None, linear: Sequence[int], softmax: int | None
) -> Callable[..., Any]:
    """From the output of softmax layer ``last`` through the linear layers to the queries of layer ``softmax``."""

    def run(x: mx.array, o: mx.array | None, states: list[mx.array], offset: mx.array, mask: mx.array | None) -> Any:
        if last is not None:
            assert o is not None
            x = layers[last].close(x, o)
        after = []
        for i, state in zip(linear, states, strict=True):
            x, state = layers[i].recur(x, state, offset, mask)
            after.append(state)
        return x, () if softmax is None else layers[softmax].open(x, offset), after

    return mx.compile(run)


def _places(within: Any) -> Iterator[Place]:
    """Where arrays and modules stand in these modules, lists and dicts, at any depth."""
    for at, found in within.items() if isinstance(within, dict) else enumerate(within):
        if isinstance(found, mx.array | nn.Module | dict | list | tuple):
            yield within, at, found
            if not isinstance(found, mx.array):
                yield from _places(found)
