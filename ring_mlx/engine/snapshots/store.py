"""Snapshots on disk: found by a prompt's hash, checked before they are used.

One folder a model (and form of keys and values)::

    v1/<fingerprint>/snapshots/<offset>-<SHA-256 of the tokens>.json   a manifest: parent, blobs, layers, checksum
    v1/<fingerprint>/blobs/<SHA-256 of the file>.safetensors           a block, or a snapshot's states and tail

A manifest is written last, so a process that is killed leaves at worst blobs that nothing names, which the next
`Store.collect` removes. Writers hold the folder's lock; readers do not, and treat what vanishes as absent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import warnings
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ring_mlx.engine.snapshots.blocks import Block, Form, Snapshot, Tokens, keys_of
from ring_mlx.engine.snapshots.packing import (
    form_of,
    pack_block,
    pack_rest,
    read_blob,
    unpack,
    unpack_block,
    write_blob,
)
from ring_mlx.engine.stored.folder import ModelFolder, blob_path, damage, room_bytes
from ring_mlx.engine.stored.keeping import Stored, kept
from ring_mlx.engine.stored.manifest import BLOCK_TOKENS, MOST_FILE_BYTES, read_manifest, write_manifest
from ring_mlx.engine.stored.stores import default_folder
from ring_mlx.errors import CacheFileError
from ring_mlx.model.cache_files import MOST_HEADER_BYTES
from ring_mlx.model.cache_shapes import Shapes
from ring_mlx.system.files import is_plain, sync_path

if TYPE_CHECKING:
    from ring_mlx.engine.events import SessionOptions
    from ring_mlx.model.model import Model

HEADER_BYTES = 128  # of each array in its file


class Store(ModelFolder):
    """The snapshots of one model on disk, written and read.

    Args:
        root, fingerprint, budget_bytes: As for `ModelFolder`.
        name: What to call the model in lists.
        kv_bits: Keep keys and values in 8 bits (or 4); None keeps them as they are. Those that are quantized already
            stay as they are.
        shapes: The model's `cache_shapes`, against which snapshots are held.
    """

    def __init__(
        self,
        root: Path,
        fingerprint: str,
        budget_bytes: int,
        kv_bits: int | None = None,
        name: str = "",
        shapes: Shapes | None = None,
    ) -> None:
        super().__init__(root, fingerprint, budget_bytes)
        self._kv_bits, self._name, self._shapes = kv_bits, name, shapes
        self._most_bytes = MOST_FILE_BYTES if shapes is None else shapes.most_bytes(BLOCK_TOKENS) + MOST_HEADER_BYTES
        self._loaded: dict[str, weakref.ref[Block]] = {}
        self._warned = self._has_looked = False

    def deepest(self, tokens: Sequence[int] | Tokens, longer_than: int = -1) -> Snapshot | None:
        """The longest good snapshot that is a prefix of ``tokens`` and more than ``longer_than`` tokens long.

        Without logits it must be shorter than ``tokens``. A damaged one is named in one warning, removed and passed
        over.
        """
        ids = np.asarray(tokens, dtype=np.int32)
        try:
            self.check()
            candidates = self._candidates(ids, longer_than)
            if not self._has_looked:
                self._has_looked = True
                for text in self.strangers()[:1]:
                    self._warn(text)
        except FileNotFoundError:
            return None
        except OSError as e:
            self._warn(f"{self.folder} is not used ({_reason(e)}); repair or remove it.")
            return None
        for path in candidates:
            try:
                snapshot = self._load(path, ids)
            except FileNotFoundError:
                self.discard_incomplete(path)
                continue
            except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as e:
                self._discard(path, e)
                continue
            if snapshot.offset < len(ids) or snapshot.logits is not None:
                _touch(path)
                return snapshot
        return None

    def save(self, snapshots: Iterable[Snapshot]) -> int:
        """Write what is not there yet, parents first, then collect what exceeds the budget; returns how many were written.

        ``snapshots`` are in the order of their use. One that would be removed at once is not written, and is not durable
        any more. Raises CacheFileError if the folder cannot be written.
        """
        written = 0
        try:
            with self.locked():
                for s, used in self._worth_saving(snapshots):
                    written += self._save_in_room(s)
                    os.utime(self._path(s), (used, used))
                    s.saved = True
                self.collect_locked(self.budget_bytes)
        except (OSError, RuntimeError) as e:
            raise CacheFileError(
                f"{self.folder} could not be written ({_reason(e)}); check space and permissions."
            ) from None
        return written

    def save_dropped(self, s: Snapshot) -> bool:
        """As `save` for a snapshot that memory has no room for; returns False where that failed, of which `save` tells."""
        try:
            self.save([s])
        except CacheFileError:
            return False
        return True

    def note_use(self, s: Snapshot) -> None:
        """Note on disk that a saved snapshot was used from memory."""
        _touch(self._path(s))

    def _candidates(self, ids: Tokens, longer_than: int) -> list[Path]:
        """Manifests whose name says that they are a prefix, the deepest first; nothing is read."""
        there = {key for key in self.snapshots() if key[0] > longer_than}
        found = [key for key in keys_of(ids, {at for at, _ in there}) if key in there]
        return [self.manifest_path(*key) for key in found[::-1]]

    def _load(self, path: Path, ids: Tokens) -> Snapshot:
        manifest = read_manifest(path)
        if manifest["fingerprint"] != self.folder.name:
            raise ValueError("it belongs to another model")
        form, sizes, rest = form_of(manifest), manifest["sizes"], manifest["rest"]
        blocks = [self._block(name, sizes[name], form) for name in manifest["blocks"]]
        read = read_blob(self.blobs, rest, sizes[rest], self._most_bytes)
        snapshot = unpack(manifest, *read, blocks, ids[: manifest["offset"]])
        if self._shapes is not None:
            snapshot.check(self._shapes)
        return snapshot

    def _block(self, name: str, size: int, form: Form) -> Block:
        if name not in self._loaded or (block := self._loaded[name]()) is None:
            block = unpack_block(*read_blob(self.blobs, name, size, self._most_bytes), form)
            block.blob = name
            self._loaded[name] = weakref.ref(block)
        return block

    def _save_in_room(self, s: Snapshot) -> bool:
        """Write a snapshot if the disk then still has its reserve; older ones are removed for it."""
        needed = s.own_bytes + sum(b.nbytes for b in s.blocks if not self._has(b))
        missing = needed - room_bytes(self.blobs)
        if missing > 0 and not self._make_room(missing):
            raise OSError(errno.ENOSPC, "the disk is nearly full, and the rest is left for chats")
        try:
            return self._save(s)
        except (OSError, RuntimeError) as e:  # MLX says the latter, without a number.
            # A quota does not show in what a disk has left.
            is_full = not isinstance(e, OSError) or e.errno in (errno.ENOSPC, errno.EDQUOT)
            if not is_full or not self._make_room(needed):
                raise
        return self._save(s)

    def _make_room(self, nbytes: int) -> bool:
        """Remove so many bytes if there are as many; otherwise nothing."""
        return nbytes <= self.blob_bytes() and self.give_way_locked(nbytes) >= nbytes

    def _save(self, s: Snapshot) -> bool:
        path = self._path(s)
        if is_plain(path):
            return False
        sizes: dict[str, int] = {}
        for block in s.blocks:
            if not self._has(block):
                block.blob, _ = write_blob(self.blobs, *pack_block(block, s.form, self._kv_bits))
            assert block.blob is not None
            sizes[block.blob] = blob_path(self.blobs, block.blob).stat().st_size
        rest, size = write_blob(self.blobs, *pack_rest(s, self._kv_bits))
        parent = next(iter(self._candidates(s.tokens[:-1], -1)), None)
        manifest = {
            "fingerprint": self.folder.name,
            "model": self._name,
            "offset": s.offset,
            "tokens": s.key[1],
            "kind": s.kind,
            "form": list(s.form),
            "states": len(s.states),
            "parent": parent.stem if parent else None,
            "blocks": [b.blob for b in s.blocks],
            "rest": rest,
            "sizes": sizes | {rest: size},
        }
        sync_path(self.blobs)
        write_manifest(path, manifest)
        return True

    def _worth_saving(self, snapshots: Iterable[Snapshot]) -> list[tuple[Snapshot, float]]:
        """Those that will stay once they are written, parents first, with the times of their use.

        The others are not durable from now on.
        """
        there = {s.name: s for s in self.stored().values()}
        planned: dict[str, tuple[Snapshot, Stored]] = {}
        now = time.time()
        for n, s in enumerate(snapshots):
            planned[self._path(s).stem] = s, self._plan(s, [p for p, _ in planned.values()], now + n * 1e-6)
        all_of_them = {name: plan for name, (_, plan) in planned.items()} | there
        stay = kept(all_of_them.values(), self.budget_bytes)
        for name, (s, _) in planned.items():
            s.durable = name in stay or name in there
        return sorted(((s, o.used) for s, o in planned.values() if s.durable), key=lambda found: found[0].offset)

    def _plan(self, s: Snapshot, others: Iterable[Snapshot], used: float) -> Stored:
        """What a snapshot will be on disk; nothing is computed, as MLX knows sizes before."""
        name = self._path(s).stem
        sizes: dict[Hashable, int] = {name: _bytes(pack_rest(s, self._kv_bits)[0])}
        for b in s.blocks:
            if self._has(b):
                sizes[b.blob] = blob_path(self.blobs, str(b.blob)).stat().st_size
            else:
                sizes[id(b)] = _bytes(pack_block(b, s.form, self._kv_bits)[0])
        before = [
            self._path(p) for p in others if p.offset < s.offset and np.array_equal(p.tokens, s.tokens[: p.offset])
        ]
        parent = max((path.stem for path in [*before, *self._candidates(s.tokens[:-1], -1)[:1]]), default=None)
        return Stored(name, parent, s.offset, s.kind, used, sizes)

    def _path(self, s: Snapshot) -> Path:
        return self.manifest_path(*s.key)

    def _has(self, block: Block) -> bool:
        return block.blob is not None and self.has_blob(block.blob)

    def _discard(self, path: Path, reason: Exception) -> None:
        """Remove a snapshot that is certainly damaged; a lack of memory, file handles or permissions may be temporary."""
        self._warn(damage(path, reason))
        number = getattr(reason, "errno", errno.EINVAL)
        if not isinstance(reason, RuntimeError) and number in (errno.EINVAL, errno.EFBIG):
            self.discard(path, self._most_bytes)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"[cache] {' '.join(text.split())}", stacklevel=2)


def open_store(options: SessionOptions, model: Model) -> Store | None:
    """The snapshots of a model on disk, which its sessions and servers share; None where none are kept.

    Those whose keys and values have another form are kept apart.
    """
    if options.store is False or not model.fingerprint:
        return None
    kv, bits = options.kv_quantization, options.store_kv_bits
    form = f"-kv{kv.bits}x{kv.group_size}from{kv.start}" if kv else ""
    form += f"-disk{bits}" if bits else ""
    root = default_folder() if options.store is True else Path(os.path.expanduser(options.store))
    name, shapes = Path(options.model).name, model.cache_shapes
    return Store(root, model.fingerprint + form, options.store_budget_bytes, bits, name, shapes)


def _bytes(arrays: Mapping[str, Any]) -> int:
    return sum(a.nbytes + HEADER_BYTES for a in arrays.values())


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)


def _reason(error: Exception) -> str:
    """In words, without a number, and the file where the system names one."""
    words, file = getattr(error, "strerror", None), getattr(error, "filename", None)
    return f"{words}: {file}" if words and file else words or str(error)
