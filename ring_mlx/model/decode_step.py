"""One decode step of the layers as a few compiled pieces, so that Python builds its graph once and not for every token.

A step is one token a row, or the 2 to 8 that `tentative` reads. At Ring-mini shapes it is some 160 dispatches; naming each
from Python takes longer than running it on a fast GPU.
A piece goes from one softmax layer's queries to the next one's; keys and values, which grow, are handled between pieces.
Weights are constants of a piece, since MLX would gather hundreds of inputs at every step. If a weight or module was replaced,
added or removed, the pieces are compiled again; a change in place (``w[0] = 1``, ``w *= 2``) is not seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import eq, getitem, is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import choices, few_queries, launch, proofs, resident
from metal_kernels.few_queries.fused import UNSPLIT_KEYS
from ring_mlx.model.attention import first_of
from ring_mlx.model.layer import DecoderLayer

# The simulator computes at once and cannot be traced; on the CPU compiling takes a C++ compiler and seconds a shape.
COMPILED_ON = ("metal", "cuda")
# Of a step.
MOST_TOKENS = 8


def is_worthwhile() -> bool:
    """Whether steps are compiled on the backend that runs kernels now."""
    backend = launch.backend()
    return backend is not None and backend.name in COMPILED_ON


class DecodeStep:
    """All layers of a model for one new token a row or a few, compiled with the choices ``chosen``."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.layers, self.chosen = layers, dict(choices.active())
        self._linear = [i for i, layer in enumerate(layers) if layer.is_linear]
        # Experts that are read on demand are chosen in Python, which a compiled piece does not run.
        self._can_compile = not any(getattr(layer.mlp, "is_streamed", False) for layer in layers)
        self._pieces: list[tuple[list[int], int | None, Callable[..., Any]]] = []
        self._fold: Callable[..., list[mx.array]] | None = None
        self._few: Callable[..., mx.array | None] = few_queries
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
        self._few = _attention()
        self._fold = compiled(partial(_fold, [self.layers[i].attention for i in self._linear]))

    def accepts(self, x: mx.array, caches: Sequence[Any]) -> bool:
        """Whether `__call__` takes these: one token a row, or a few tentative ones, after others that the caches hold."""
        if not self._can_compile or x.shape[1] > MOST_TOKENS or any(c is None for c in caches):
            return False
        linear = [caches[i] for i in self._linear]
        is_taken = x.shape[1] == 1 or all(hasattr(c, "tentative") for c in linear)
        return is_taken and all(c[0] is not None for c in linear)

    def __call__(self, x: mx.array, caches: Sequence[Any], masks: dict[bool, Any], offset: int | mx.array) -> mx.array:
        """Run all layers on the residual stream x [B, T, hidden], as they would run one by one.

        Args:
            caches: One a layer; updated in place.
            masks: Of softmax (False) and linear (True) layers.
            offset: Position of the first token, one for all rows or [B].
        """
        where = launch.backend()
        compiled_for = where, where and where.ledger and where.ledger.turned_off
        if not self._pieces or compiled_for != self._compiled_for or self._weights.have_changed():
            self._compile()
            self._compiled_for = compiled_for
        position = mx.array([offset], mx.int32) if isinstance(offset, int) else offset
        if position.size <= 2:  # of more rows the device itself counts them, in memory of its own
            position = resident(position)
        o: mx.array | None = None
        is_tentative = bool(self._linear) and hasattr(caches[self._linear[0]], "tentative")
        folded = self._folded(caches, position, masks[True]) if is_tentative else None
        for linear, softmax, piece in self._pieces:
            states = [caches[i][0] for i in linear]
            x, opened, after, written = piece(x, o, states, position, masks[True], is_tentative)
            for i, state in zip(linear, after, strict=True):
                caches[i][0] = state
            if folded is not None:
                folded.before += states
                folded.written += written
            if softmax is not None:
                q, k, v = opened
                o = self.layers[softmax].attention.attend(q, k, v, masks[False], caches[softmax], position, self._few)
                if is_tentative:  # which is waited for: the device is to begin while the rest is built
                    mx.async_eval(o)
        return x

    def _folded(self, caches: Sequence[Any], position: mx.array, mask: mx.array | None) -> FoldedLayers:
        """What can take back the tokens of the step, for the `Tentative` that reads them."""
        assert self._fold is not None
        linear = [caches[i] for i in self._linear]
        for c in linear:
            c.is_part = True
        folded = FoldedLayers(self._fold, linear, position, mask)
        linear[0].tentative.append(folded)
        return folded


@dataclass
class FoldedLayers:
    """Tokens that a step has folded into the states of all linear layers, or of the first of them.

    Of one sequence the states after each token were written, and one of them is kept: no launch, nothing read again, and n - 1
    more states written. Of rows, of which each may keep another number, the projections stay and are folded again.
    """

    fold: Callable[..., list[mx.array]]
    caches: Sequence[Any]
    position: mx.array
    mask: mx.array | None
    before: list[mx.array] = field(default_factory=list)
    written: list[mx.array] = field(default_factory=list)

    def keep(self, counts: tuple[int, ...]) -> None:
        """Keep the first so many tokens of each row; folded, the rest counts as padding, so that one compiled function does."""
        states = self.before
        if any(counts) and states[0].shape[0] == 1:
            states = [each[counts[0] - 1] for each in self.written]
        elif any(counts):
            counted = first_of(counts, self.written[0].shape[1])
            mask = counted if self.mask is None else self.mask & counted
            states = self.fold(self.written, states, self.position, mask)
            mx.async_eval(states)
        for c, state in zip(self.caches, states, strict=False):
            c[0] = state


def _attention() -> Callable[..., mx.array | None]:
    """`few_queries`, compiled; what is chosen is asked once for each number of tokens."""
    attend = compiled(few_queries)
    ours: dict[tuple[int, str], bool] = {}

    def call(q: mx.array, k: mx.array, *others: Any) -> mx.array | None:
        wanted = q.shape[2], "few_queries" if k.shape[2] <= UNSPLIT_KEYS else "many_keys"
        if wanted not in ours:
            ours[wanted] = choices.ours(wanted[1], wanted[0])
        found: mx.array | None = attend(q, k, *others) if ours[wanted] else None
        return found

    return call


def _fold(
    attentions: Sequence[Any], projected: list[mx.array], states: list[mx.array], offset: mx.array, mask: mx.array
) -> list[mx.array]:
    """The states of all linear layers after tokens that are projected already."""
    each = zip(attentions, projected, states, strict=True)
    return [attention.fold(qkv, state, mask, offset)[1] for attention, qkv, state in each]


def _piece(
    layers: Sequence[DecoderLayer], last: int | None, linear: Sequence[int], softmax: int | None
) -> Callable[..., Any]:
    """From the output of softmax layer ``last`` through the linear layers to the queries of layer ``softmax``."""

    def run(
        x: mx.array,
        o: mx.array | None,
        states: list[mx.array],
        offset: mx.array,
        mask: mx.array | None,
        is_tentative: bool,
    ) -> Any:
        if last is not None:
            assert o is not None
            x = layers[last].close(x, o)
        after, written = [], []
        each = is_tentative and x.shape[0] == 1
        for i, state in zip(linear, states, strict=True):
            x, state, qkv = layers[i].recur(x, state, offset, mask, each)
            after.append(state[-1] if each else state)
            written.append(state if each else qkv)
        opened = () if softmax is None else layers[softmax].open(x, offset)
        return x, opened, after, written if is_tentative else []

    return compiled(run)


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same compiled, or as it is where a kernel in it is still to be proven."""

    def traced(*arguments: Any) -> Any:
        with proofs.tracing():
            return run(*arguments)

    replay = mx.compile(traced)

    def call(*arguments: Any) -> Any:
        try:
            return replay(*arguments)
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
