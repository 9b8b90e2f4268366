"""Snapshots as values: linear states by reference, keys and values in shared blocks.

A linear state cannot be taken back, but an MLX array never changes: keeping the array is the copy. Keys and values
grow in place in the live cache's buffer, so a snapshot cuts them into blocks of `BLOCK_TOKENS` tokens that never
change. Every snapshot that continues another shares its full blocks; only the last, partial block (the tail) is its
own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import ArraysCache, QuantizedKVCache

from ring_mlx.engine.stored.manifest import BLOCK_TOKENS
from ring_mlx.model.cache_shapes import Shapes

PLACE_KINDS = ("system", "user", "answer")

Tokens = npt.NDArray[np.int32]
Form = tuple[tuple[int, int] | None, ...]
Key = tuple[int, str]


@dataclass(eq=False)
class Block:
    """Keys and values of all softmax layers for some tokens; never changes.

    Args:
        tokens: The ids [n], which with those before them determine the arrays.
        arrays: Layer by layer, keys then values, [1, Hkv, n, D] or the three parts of a quantized one.
        blob: Its name in a store, once it has one.
    """

    tokens: Tokens
    arrays: list[mx.array]
    blob: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)


@dataclass(eq=False)
class Snapshot:
    """The model's whole state after ``tokens``.

    Args:
        tokens: The whole prefix [T].
        states: Of the linear layers, [1, H, K, V] float32, or None before the first token.
        blocks: The full blocks of the softmax layers, shared with other snapshots.
        tail: The rest, fewer than `BLOCK_TOKENS` tokens, or None.
        form: Of each softmax layer, (bits, group size), or None where it is not quantized.
        logits: Of the next token [1, vocab] float32; without them at least one token must be read again.
        kind: Why it was taken; for people.
        durable: Whether it is worth a place on disk.
        saved: Whether it has one.
    """

    tokens: Tokens
    states: list[mx.array | None]
    blocks: list[Block]
    tail: Block | None
    form: Form
    logits: mx.array | None = None
    kind: str = ""
    durable: bool = True
    saved: bool = field(default=False, compare=False)

    @property
    def offset(self) -> int:
        """How many tokens it has seen."""
        return len(self.tokens)

    @cached_property
    def key(self) -> Key:
        """Its number of tokens and their SHA-256, by which it is found."""
        return next(keys_of(self.tokens, [self.offset]))

    @property
    def own_bytes(self) -> int:
        """Bytes that no other snapshot shares."""
        arrays = [a for a in (*self.states, self.logits) if a is not None]
        return sum(a.nbytes for a in arrays) + (self.tail.nbytes if self.tail else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays, shared or not."""
        return self.own_bytes + sum(b.nbytes for b in self.blocks)

    @property
    def parts(self) -> list[Block]:
        """Blocks and tail, which together hold every token."""
        return [*self.blocks, *([self.tail] if self.tail else [])]

    def check(self, shapes: Shapes) -> None:
        """Check it against the model; ValueError if the model could not have made it."""
        shapes.check_count(self.offset)
        if (len(self.states), len(self.form)) != (sum(shapes.linear), len(shapes.linear) - sum(shapes.linear)):
            raise ValueError("it has another number of layers than the model")
        for state in self.states:
            if state is not None:
                shapes.check_state(state)
        for part in self.parts:
            at = 0
            for layer in self.form:
                count = 1 if layer is None else 3
                for start in (at, at + count):
                    shapes.check_kv(part.arrays[start : start + count], layer, len(part.tokens))
                at += 2 * count
        if self.logits is not None:
            shapes.check_logits(self.logits)

    def learn(self, other: Snapshot) -> None:
        """Take over the logits and the purpose of another snapshot of the same tokens."""
        self.durable = self.durable or other.durable
        self.logits = other.logits if self.logits is None else self.logits
        if other.kind in PLACE_KINDS and self.kind not in PLACE_KINDS:
            self.kind = other.kind


def keys_of(tokens: Tokens, offsets: Iterable[int]) -> Iterator[Key]:
    """The keys that snapshots after so many of the tokens have, the shortest first; offsets beyond them have none."""
    running, at = hashlib.sha256(), 0
    for offset in sorted(n for n in offsets if n <= len(tokens)):
        running.update(tokens[at:offset].tobytes())
        at = offset
        yield offset, running.hexdigest()


def softmax_layers(cache: Iterable[Any]) -> list[Any]:
    """The layers' caches that hold keys and values."""
    return [c for c in cache if not isinstance(c, ArraysCache)]


def linear_layers(cache: Iterable[Any]) -> list[Any]:
    """The layers' caches that hold a state."""
    return [c for c in cache if isinstance(c, ArraysCache)]


def form_of(cache: Iterable[Any]) -> Form:
    """How each softmax layer holds its keys and values."""
    return tuple((c.bits, c.group_size) if isinstance(c, QuantizedKVCache) else None for c in softmax_layers(cache))


def cut(cache: Iterable[Any], tokens: Tokens, start: int, end: int) -> Block:
    """A block with a copy of the keys and values of tokens ``start`` to ``end`` of a live cache."""
    arrays = [mx.contiguous(a[..., start:end, :]) for c in softmax_layers(cache) for a in buffers(c)]
    return Block(np.array(tokens[start:end], dtype=np.int32), arrays)


def paste(cache: Iterable[Any], keep: int, parts: Sequence[Block], end: int) -> None:
    """Make the softmax layers hold ``end`` tokens: the first ``keep`` that they hold, then those of ``parts``.

    Args:
        cache: The live cache, of the parts' form.
        keep: Tokens that stay as they are; only offsets move where this is all.
        parts: Blocks that hold every token from 0 to ``end``; those before ``keep`` are not read.
        end: The new offset.
    """
    layers, at = softmax_layers(cache), 0
    for c in layers:
        c.offset = keep
    if keep == end:
        return
    fresh: list[Block] = []
    for part in parts:
        n = len(part.tokens)
        if at + n > keep:
            cutoff = max(0, keep - at)
            fresh.append(Block(part.tokens[cutoff:], [a[..., cutoff:, :] for a in part.arrays]))
        at += n
    index = 0
    for c in layers:
        old = buffers(c)
        count = 2 * (1 if not isinstance(c, QuantizedKVCache) else 3)
        joined = [_join(old[j] if old else None, keep, [f.arrays[index + j] for f in fresh]) for j in range(count)]
        index += count
        half = count // 2
        if isinstance(c, QuantizedKVCache):
            c.keys, c.values = tuple(joined[:half]), tuple(joined[half:])
        else:
            c.keys, c.values = joined
        c.offset = end


def buffers(c: Any) -> list[mx.array]:
    """The arrays in which a softmax layer's cache keeps keys, then values; empty before the first token."""
    if c.keys is None:
        return []
    return [*c.keys, *c.values] if isinstance(c, QuantizedKVCache) else [c.keys, c.values]


def _join(old: mx.array | None, keep: int, fresh: list[mx.array]) -> mx.array:
    """One buffer with room to grow, so that the next token is written in place."""
    shape = list(fresh[0].shape)
    shape[-2] = BLOCK_TOKENS
    before = [old[..., :keep, :]] if old is not None and keep else []
    return mx.concatenate([*before, *fresh, mx.zeros(shape, fresh[0].dtype)], axis=-2)
