"""What the model remembers of one sequence, and its file form; knows layers' caches, not the model or text."""

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
from safetensors import SafetensorError, safe_open

from metal_kernels import launch
from ring_mlx.errors import CacheFileError
from ring_mlx.files import write_atomically
from ring_mlx.snapshots.files import array_checksum

# Version 2 added the checksum; version 1 is read as it was.
FORMAT, FORMAT_VERSION, READABLE_VERSIONS = "ring-mlx-cache", 2, ("1", "2")

# Tokens by which keys and values of one sequence grow, where mlx-lm's 256 does not do. MLX's CUDA backend gives a decode
# step to cuDNN if the buffer holds a multiple of 256 tokens; cuDNN plans each such length anew and costs more to call
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
        """Tokens seen: an int for one sequence, [B] for rows of different lengths."""
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
        """A cache that can go its own way; arrays are shared until one side writes."""
        return HybridCache(_copy_layer(c) for c in self)

    def prepare(self, lengths: Sequence[int], width: int) -> None:
        """Announce tokens that are padded on the right; `finalize` must follow them. Batch caches only.

        Args:
            lengths: Real tokens of each row among the next ``width`` tokens.
            width: How many tokens, padding included, will be fed before `finalize`, in one call or several.
        """
        for c in self:
            c.prepare(lengths=list(lengths), right_padding=[width - n for n in lengths])

    def finalize(self) -> None:
        """Put the rows flush right again after right-padded tokens, so that the next token of each can be fed."""
        for c in self:
            c.finalize()

    def save(self, path: str | os.PathLike[str], tokens: Sequence[int], fingerprint: str, **notes: str) -> None:
        """Write the cache of one sequence to a safetensors file, whole or not at all.

        Args:
            path: The file to write, replaced if it exists.
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
            "checksum": array_checksum(arrays),
        }
        try:
            write_atomically(Path(path), lambda name: mx.save_safetensors(name, arrays, header))
        except (OSError, RuntimeError) as e:
            raise CacheFileError(f"{path} could not be written ({e}); check space and permissions.") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str) -> tuple[HybridCache, list[int], dict[str, str]]:
        """Read what `save` wrote.

        Args:
            path: The file.
            fingerprint: The model's; a cache of another model is refused.

        Returns:
            The cache, the tokens it has seen, and the notes.

        Raises:
            CacheFileError: If the file is missing, damaged, of another format or version, or of another model.
        """
        header = _read_header(Path(path))
        if header.get("format") != FORMAT or header.get("version") not in READABLE_VERSIONS:
            raise CacheFileError(
                f"{path} is not a cache of this version ({header.get('format')} {header.get('version')}, "
                f"not {FORMAT} {FORMAT_VERSION}); make it again."
            )
        if header.get("fingerprint") != fingerprint:
            raise CacheFileError(f"{path} belongs to another model; make it again with this one.")
        try:
            arrays = mx.load(str(path), format="safetensors")
            assert isinstance(arrays, dict)
            if header["version"] != "1" and header["checksum"] != array_checksum(arrays):
                raise ValueError("it does not match its checksum")
            cache = cls(_load_layer(i, spec, arrays) for i, spec in enumerate(json.loads(header["layers"])))
            tokens: list[int] = arrays["tokens"].tolist()  # type: ignore[assignment]
            notes = json.loads(header["notes"])
        except (KeyError, ValueError, TypeError, RuntimeError) as e:
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


def _load_layer(i: int, spec: dict[str, Any], arrays: dict[str, mx.array]) -> Any:
    prefix = f"layers.{i}."
    if spec["kind"] == "linear":
        linear = ArraysCache(size=1)
        linear[0] = arrays.get(prefix + "state")
        return linear
    if spec["kind"] == "softmax":
        c = make_kv_cache()
        if "offset" in spec:
            c.keys, c.values, c.offset = arrays[prefix + "keys"], arrays[prefix + "values"], spec["offset"]
        return c
    quantized = QuantizedKVCache(spec["group_size"], spec["bits"])
    quantized.keys, quantized.values = (
        tuple(arrays[f"{prefix}{name}.{j}"] for j in range(3)) for name in ("keys", "values")
    )
    quantized.offset = spec["offset"]
    return quantized


def _read_header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="numpy") as f:
            return dict(f.metadata() or {})
    except FileNotFoundError:
        raise CacheFileError(f"no file {path}; make it with `ring-mlx cache-prompt`.") from None
    except (OSError, SafetensorError) as e:
        raise CacheFileError(f"{path} is damaged or not a cache ({e}); make it again.") from None
