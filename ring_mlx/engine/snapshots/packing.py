"""Arrays of a snapshot to named arrays and back, with keys and values in fewer bits if wanted, and to files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ring_mlx.engine.snapshots.blocks import Block, Form, Snapshot, Tokens
from ring_mlx.engine.stored.folder import blob_path, checksum
from ring_mlx.engine.stored.manifest import BLOCK_TOKENS
from ring_mlx.model.cache_files import read_arrays
from ring_mlx.system.files import is_plain, sync_path, unfinished

Named = dict[str, mx.array]
QUANTIZED_PARTS = ("", ".scales", ".biases")


def pack_block(block: Block, form: Form, kv_bits: int | None) -> tuple[Named, dict[str, str]]:
    """A block as named arrays, and what `unpack_block` must know of them.

    Args:
        form: Of each softmax layer; one that is quantized stays as it is.
        kv_bits: Quantize the others to 8 or 4 bits, where a group size divides their heads.
    """
    slots = [(name, parts) for i, layer in enumerate(form) for name, parts in _slots(i, layer)]
    arrays: Named = {"tokens": mx.array(block.tokens)}
    at, header = 0, {}
    for name, parts in slots:
        held = block.arrays[at : at + len(parts)]
        at += len(parts)
        group = next((g for g in (64, 32) if held[0].shape[-1] % g == 0), None)
        if len(parts) == 1 and kv_bits and group:
            held, parts = list(mx.quantize(held[0], group_size=group, bits=kv_bits)), QUANTIZED_PARTS
            header[name] = f"{kv_bits} {group}"
        arrays |= {name + part: a for part, a in zip(parts, held, strict=True)}
    return arrays, header


def unpack_block(arrays: Mapping[str, mx.array], header: Mapping[str, str], form: Form) -> Block:
    """What `pack_block` packed. Raises KeyError or ValueError if something is missing or wrong."""
    held: list[mx.array] = []
    names = {"tokens"}
    for i, layer in enumerate(form):
        for name, parts in _slots(i, layer):
            stored = QUANTIZED_PARTS if name in header else parts
            names |= {name + part for part in stored}
            found = [arrays[name + part] for part in stored]
            if name in header:
                bits, group = map(int, header[name].split())
                w, scales, biases = found
                found = [mx.dequantize(w, scales, biases, group_size=group, bits=bits)]
            held += found
    if names != set(arrays):
        raise ValueError("it holds other arrays than its form has")
    if arrays["tokens"].ndim != 1 or arrays["tokens"].dtype != mx.int32:
        raise ValueError("its tokens are not a list of ids")
    tokens = np.array(arrays["tokens"], dtype=np.int32)
    if any(a.shape[-2] != len(tokens) for a in held):
        raise ValueError("keys and values do not match the tokens")
    return Block(tokens, held)


def pack_rest(s: Snapshot, kv_bits: int | None) -> tuple[Named, dict[str, str]]:
    """States, logits and tail, which no other snapshot shares."""
    arrays: Named = {f"states.{i}": a for i, a in enumerate(s.states) if a is not None}
    header: dict[str, str] = {}
    if s.logits is not None:
        arrays["logits"] = s.logits
    if s.tail is not None:
        tail, header = pack_block(s.tail, s.form, kv_bits)
        arrays |= {f"tail.{name}": a for name, a in tail.items()}
    return arrays or {"nothing": mx.zeros(1)}, header


def unpack(
    manifest: Mapping[str, Any],
    rest: Mapping[str, mx.array],
    header: Mapping[str, str],
    blocks: list[Block],
    ids: Tokens,
) -> Snapshot:
    """A snapshot from its manifest, its own arrays and the shared blocks.

    Raises KeyError or ValueError if something is missing, or the parts hold other tokens than ``ids``.
    """
    form = form_of(manifest)
    tail = {name[5:]: a for name, a in rest.items() if name.startswith("tail.")}
    snapshot = Snapshot(
        tokens=ids,
        states=[rest[f"states.{i}"] for i in range(manifest["states"])],
        blocks=blocks,
        tail=unpack_block(tail, header, form) if tail else None,
        form=form,
        logits=rest.get("logits"),
        kind=manifest["kind"],
        saved=True,
    )
    held = [p.tokens for p in snapshot.parts]
    if any(len(tokens) != BLOCK_TOKENS for tokens in held[: len(blocks)]):
        raise ValueError("a block has another length than all have")
    if not np.array_equal(np.concatenate(held), ids):
        raise ValueError("its blocks hold other tokens")
    return snapshot


def form_of(manifest: Mapping[str, Any]) -> Form:
    return tuple((int(layer[0]), int(layer[1])) if layer else None for layer in manifest["form"])


def write_blob(folder: Path, arrays: Mapping[str, mx.array], header: Mapping[str, str]) -> tuple[str, int]:
    """Write arrays to a safetensors file whose name is its SHA-256; the same content is written once.

    Many are written at a time: `sync_path` of the folder must follow before anything on the disk names them. Returns
    the name and the size in bytes.
    """
    with unfinished(folder) as new:
        mx.save_safetensors(str(new), dict(arrays), dict(header))
        name, size = checksum(new), new.stat().st_size
        path = blob_path(folder, name)
        if not is_plain(path) or path.stat().st_size != size:
            sync_path(new)
            os.replace(new, path)
    return name, size


def read_blob(folder: Path, name: str, size: int, most_bytes: int) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and the header of a blob of ``size`` bytes; more than ``most_bytes`` are not read, even for the checksum.

    Raises ValueError if the content is not what the name says; OSError if the file is missing or unreadable.
    """
    path = blob_path(folder, name)
    found = path.lstat().st_size
    if found != size or found > most_bytes:
        raise ValueError(f"{path.name} has {found} bytes")
    if checksum(path) != name:
        raise ValueError(f"{path.name} does not hold what its name says")
    arrays, header = read_arrays(path)
    mx.eval(arrays)
    return arrays, header


def _slots(i: int, layer: tuple[int, int] | None) -> list[tuple[str, tuple[str, ...]]]:
    parts = ("",) if layer is None else QUANTIZED_PARTS
    return [(f"{i}.keys", parts), (f"{i}.values", parts)]
