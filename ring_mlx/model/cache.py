"""The model's cache of one sequence, and its file form."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache

from metal_kernels import launch
from ring_mlx.errors import CacheFileError
from ring_mlx.model.cache_files import UNSEALED, array_checksum, check_seal, read_arrays, seal
from ring_mlx.model.cache_shapes import Shapes
from ring_mlx.system.files import behind_links, write_atomically

# Version 2 added a checksum of the arrays, version 3 one of every byte; older ones are read and checked as far as it goes.
FORMAT, FORMAT_VERSION, READABLE_VERSIONS = "ring-mlx-cache", 3, ("1", "2", "3")

# Of each kind of layer: its arrays, and what else stands in the header.
PARTS: dict[str, tuple[str, ...]] = {
    "linear": ("state",),
    "softmax": ("keys", "values"),
    "quantized": tuple(f"{name}.{i}" for name in ("keys", "values") for i in range(3)),
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "softmax": ("offset",),
    "quantized": ("bits", "group_size", "offset"),
}

# Tokens by which keys and values of one sequence grow, where mlx-lm's 256 does not do. MLX's CUDA backend gives a decode
# step to cuDNN if the buffer holds a multiple of 256 tokens; cuDNN makes a new plan for each such length and costs more to call
# than MLX's kernel. With 257 that is seldom so.
GROWTH = {"cuda": 257}


class HybridCache(list[Any]):
    """One mlx-lm cache a layer: keys and values of softmax layers, the state of linear ones.

    It is a list, so every mlx-lm tool that takes a prompt cache takes it; a plain list of the same caches serves the
    model as well. The state of a linear layer (item 0 of its ``ArraysCache``) is [B, H, K, V] float32. Nothing here
    can be trimmed: a linear state does not know its past. Take a `copy` before what may have to be undone.
    """

    @property
    def offset(self) -> int | mx.array:
        """Tokens read: an int for one sequence, [B] for rows of different lengths."""
        offset: int | mx.array = next(c.offset for c in self if not isinstance(c, ArraysCache))
        return offset

    @property
    def state(self) -> list[Any]:
        """The arrays of every layer, for ``mx.eval``."""
        return [c.state for c in self]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, with the room that keys and values grow into."""
        return sum(0 if c.empty() else c.nbytes for c in self)

    def copy(self) -> HybridCache:
        """An independent copy; arrays are shared until one side writes."""
        return HybridCache(_copy_layer(c) for c in self)

    def prepare(self, lengths: Sequence[int], width: int) -> None:
        """Announce ``width`` tokens padded on the right, ``lengths`` real ones a row; `finalize` must follow. Batches only."""
        for c in self:
            c.prepare(lengths=list(lengths), right_padding=[width - n for n in lengths])

    def finalize(self) -> None:
        """Put the rows flush right again after right-padded tokens, so that the next token of each can be fed."""
        for c in self:
            c.finalize()

    def save(self, path: str | os.PathLike[str], tokens: Sequence[int], fingerprint: str, **notes: str) -> None:
        """Write the cache of one sequence to a safetensors file, whole or not at all.

        Args:
            path: Replaced if it exists.
            tokens: The ids that the cache has seen, in order.
            fingerprint: The model's, which `load` checks.
            notes: Further text to keep in the file.

        Raises:
            CacheFileError: If ``tokens`` do not match the cache or the file cannot be written.
        """
        if not isinstance(self.offset, int) or len(tokens) != self.offset:
            raise CacheFileError(
                f"{len(tokens)} tokens do not match a cache at offset {self.offset}; save one sequence."
            )
        arrays: dict[str, mx.array] = {"tokens": mx.array(list(tokens), dtype=mx.int32)}
        layers = []
        for i, c in enumerate(self):
            kind, parts, options = _dump_layer(c)
            layers.append({"kind": kind, **options})
            arrays |= {f"layers.{i}.{name}": array for name, array in parts.items()}
        header = {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "fingerprint": fingerprint,
            "layers": json.dumps(layers),
            "notes": json.dumps(notes),
            "checksum": UNSEALED,
        }

        def write(name: str) -> None:
            mx.save_safetensors(name, arrays, header)
            seal(Path(name))

        try:
            write_atomically(behind_links(path), write)
        except (OSError, RuntimeError) as e:
            raise CacheFileError(f"{path} could not be written ({e}); check space and permissions.") from None

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], fingerprint: str, shapes: Shapes | None = None
    ) -> tuple[HybridCache, list[int], dict[str, str]]:
        """Read what `save` wrote: the cache, the tokens it has seen, and the notes.

        Args:
            path: The file.
            fingerprint: The model's; a cache of another model is refused.
            shapes: The model's `cache_shapes`, which every array must have.

        Raises:
            CacheFileError: If the file is missing, damaged, of another format or version, or of another model.
        """
        arrays, header = _read(Path(path))
        version = header.get("version")
        if header.get("format") != FORMAT or version not in READABLE_VERSIONS:
            raise CacheFileError(
                f"{path} is not a cache of this version ({header.get('format')} {version}, "
                f"not {FORMAT} {FORMAT_VERSION}); make it again."
            )
        if header.get("fingerprint") != fingerprint:
            raise CacheFileError(f"{path} belongs to another model; make it again with this one.")
        try:
            # Shapes come first, so that no terabyte of nothing is read for its checksum.
            count = _count(arrays["tokens"])
            if shapes is not None:
                shapes.check_count(count)
            cache = cls(_load_layers(json.loads(header["layers"]), arrays, count, shapes))
            _check_sum(Path(path), arrays, header)
            tokens = _tokens(arrays["tokens"], shapes)
            notes = json.loads(header["notes"])
            if not isinstance(notes, dict):
                raise TypeError("its notes are not an object")
        except (KeyError, ValueError, TypeError, IndexError, OSError, RuntimeError) as e:
            raise CacheFileError(f"{path} is damaged ({e}); make it again.") from None
        return cache, tokens, notes


def make_kv_cache() -> KVCache:
    """An empty cache of one softmax layer's keys and values."""
    c, backend = KVCache(), launch.backend()
    if backend is not None and backend.name in GROWTH:
        c.step = GROWTH[backend.name]
    return c


def _copy_layer(c: Any) -> Any:
    twin = copy.copy(c)
    for name, value in vars(c).items():
        if isinstance(value, (mx.array, list, tuple)):
            setattr(twin, name, tree_map(lambda x: copy.copy(x) if isinstance(x, mx.array) else x, value))
    if getattr(c, "is_part", False):  # of the states after each token of a step, all of which would stay in memory
        twin.cache, twin.is_part = [x * 1 for x in c.cache], False
        mx.eval(twin.cache)
    return twin


def _dump_layer(c: Any) -> tuple[str, dict[str, mx.array], dict[str, int]]:
    if isinstance(c, ArraysCache):
        return "linear", {} if c.empty() else {"state": c[0]}, {}
    if c.empty():
        return "softmax", {}, {}
    keys, values = c.keys_and_values()
    if isinstance(c, QuantizedKVCache):
        parts = {f"{n}.{i}": a for n, arrays in (("keys", keys), ("values", values)) for i, a in enumerate(arrays)}
        return "quantized", parts, {"bits": c.bits, "group_size": c.group_size, "offset": c.offset}
    return "softmax", {"keys": keys, "values": values}, {"offset": c.offset}


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    if os.path.exists(path) and not os.path.isfile(path):
        raise CacheFileError(f"{path} is not a file; give one of `ring-mlx cache-prompt`.")
    try:
        return read_arrays(path)
    except FileNotFoundError:
        raise CacheFileError(f"no file {path}; make it with `ring-mlx cache-prompt`.") from None
    except (OSError, ValueError) as e:
        raise CacheFileError(f"{path} is damaged or not a cache ({e}); make it again.") from None


def _check_sum(path: Path, arrays: dict[str, mx.array], header: dict[str, str]) -> None:
    if header["version"] == "3":
        check_seal(path, header["checksum"])
    elif header["version"] == "2":
        if header["checksum"] != array_checksum(arrays):
            raise ValueError("it does not match its checksum")
    elif "checksum" in header:
        raise ValueError("a file of version 1 has no checksum")


def _count(tokens: mx.array) -> int:
    if tokens.ndim != 1 or tokens.dtype != mx.int32:
        raise ValueError("its tokens are not a list of ids")
    return tokens.size


def _tokens(tokens: mx.array, shapes: Shapes | None) -> list[int]:
    ids: list[int] = tokens.tolist()  # type: ignore[assignment]
    if shapes is not None and any(not 0 <= i < shapes.vocab_size for i in ids):
        raise ValueError("some of its tokens are not in the model's vocabulary")
    return ids


def _load_layers(
    specs: list[dict[str, Any]], arrays: dict[str, mx.array], count: int, shapes: Shapes | None
) -> list[Any]:
    """Every layer's cache of ``count`` tokens; all arrays but the tokens must belong to one."""
    linear = tuple(spec["kind"] == "linear" for spec in specs)
    if all(linear) or (shapes is not None and linear != shapes.linear):
        raise ValueError("it has other layers than the model")
    held: dict[str, dict[str, mx.array]] = {f"layers.{i}": {} for i in range(len(specs))}
    for name, array in arrays.items():
        if name != "tokens":
            layer, number, part = name.split(".", 2)
            held[f"{layer}.{number}"][part] = array
    return [_load_layer(*pair, count, shapes) for pair in zip(specs, held.values(), strict=True)]


def _load_layer(spec: dict[str, Any], held: dict[str, mx.array], count: int, shapes: Shapes | None) -> Any:
    kind = spec["kind"]
    names, options = PARTS[kind], OPTIONS[kind]
    if spec.get("offset", count) != count:
        raise ValueError(f"offset {spec['offset']} for {count} tokens")
    if not count:
        names = options = ()
    if set(held) != set(names) or set(spec) != {"kind", *options}:
        raise ValueError("a layer lacks an array or has one too many")
    if kind == "linear":
        state = ArraysCache(size=1)
        state[0] = held.get("state")
        if shapes is not None and count:
            shapes.check_state(state[0])
        return state
    c = make_kv_cache() if kind == "softmax" or not count else QuantizedKVCache(spec["group_size"], spec["bits"])
    if count:
        _load_keys_and_values(c, [held[name] for name in names], count, shapes)
    return c


def _load_keys_and_values(c: Any, parts: list[mx.array], count: int, shapes: Shapes | None) -> None:
    is_quantized = isinstance(c, QuantizedKVCache)
    keys, values = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    for side in (keys, values):
        if shapes is not None:
            shapes.check_kv(side, (c.bits, c.group_size) if is_quantized else None, count)
        elif any(a.ndim != 4 or a.shape[2] != count for a in side):
            raise ValueError(f"keys and values of another number than {count} tokens")
    c.keys, c.values = (tuple(keys), tuple(values)) if is_quantized else (keys[0], values[0])
    c.offset = count
