"""One decode step of the layers as a few compiled pieces, so that Python builds its graph once and not for every token.

A step at Ring-mini shapes is some 160 dispatches; naming each from Python takes longer than running it on a fast GPU.
A piece goes from one softmax layer's queries to the next one's; keys and values, which grow, are handled between pieces.
Weights are constants of a piece, since MLX would gather hundreds of inputs at every step. If a weight or module was replaced,
added or removed, the pieces are compiled again; a change in place (``w[0] = 1``, ``w *= 2``) is not seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from operator import eq, getitem, is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import choices, launch, proofs, resident
from ring_mlx.model.layer import DecoderLayer

# The simulator computes at once and cannot be traced; on the CPU compiling takes a C++ compiler and seconds a shape.
COMPILED_ON = ("metal", "cuda")


def is_worthwhile() -> bool:
    """Whether steps are compiled on the backend that runs kernels now."""
    backend = launch.backend()
    return backend is not None and backend.name in COMPILED_ON


class DecodeStep:
    """All layers of a model for one new token a row, compiled with the choices ``chosen``."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.layers, self.chosen = layers, dict(choices.active())
        # Experts that are read on demand are chosen in Python, which a compiled piece does not run.
        self._can_compile = not any(getattr(layer.mlp, "is_streamed", False) for layer in layers)
        self._pieces: list[tuple[list[int], int | None, Callable[..., Any]]] = []
        self._weights = _Weights([])
        self._compiled_for: object = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeStep:
        """A step of the copied layers; what is compiled cannot be copied."""
        return DecodeStep(copy.deepcopy(self.layers, memo))

    def _compile(self) -> None:
        """Make the pieces for the present weights, which must be in memory to be constants."""
        self._weights = _Weights(self.layers)
        mx.eval(self._weights.arrays())
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
        """Run all layers on the residual stream x [B, 1, hidden], as they would run one by one.

        Args:
            caches: One a layer; updated in place.
            masks: Of softmax (False) and linear (True) layers.
            offset: Position of the token, one for all rows or [B].
        """
        where = launch.backend()
        compiled_for = where, where and where.ledger and where.ledger.turned_off
        if not self._pieces or compiled_for != self._compiled_for or self._weights.have_changed():
            self._compile()
            self._compiled_for = compiled_for
        position = resident(mx.array([offset], mx.int32)) if isinstance(offset, int) else offset
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

    def traced(*arguments: Any) -> Any:
        with proofs.tracing():
            return run(*arguments)

    compiled = mx.compile(traced)

    def call(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except proofs.Unproven:  # tried now, with what there is to compute; then it can be compiled
            return run(*arguments)

    return call


class _Weights:
    """All that modules, lists and dicts hold at any depth, to tell whether it has been replaced."""

    def __init__(self, root: Any) -> None:
        self._containers: list[Any] = []
        self._places: tuple[list[Any], list[Any], list[Any]] = [], [], []  # container, key or index, what is there
        self._visit(root)
        self._lengths = [len(c) for c in self._containers]

    def _visit(self, within: Any) -> None:
        self._containers.append(within)
        for at, found in within.items() if isinstance(within, dict) else enumerate(within):
            if isinstance(found, mx.array | nn.Module | dict | list | tuple):
                for column, value in zip(self._places, (within, at, found), strict=True):
                    column.append(value)
                if not isinstance(found, mx.array):
                    self._visit(found)

    def arrays(self) -> list[mx.array]:
        return [found for found in self._places[2] if isinstance(found, mx.array)]

    def have_changed(self) -> bool:
        """Whether anything was replaced, added or taken away; some 0.04 ms for 800 places."""
        within, at, found = self._places
        if not all(map(eq, map(len, self._containers), self._lengths)):
            return True
        try:
            return not all(map(is_, map(getitem, within, at), found))
        except (KeyError, IndexError):
            return True
