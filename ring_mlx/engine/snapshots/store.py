"""Snapshots on disk: found by a prompt's hash, checked before they are believed.

One folder a model (and form of keys and values)::

    v1/<fingerprint>/snapshots/<offset>-<SHA-256 of the tokens>.json   a manifest: parent, blobs, layers, checksum
    v1/<fingerprint>/blobs/<SHA-256 of the file>.safetensors           a block, or a snapshot's states and tail

A manifest is written last, so a process that is killed leaves at worst blobs that nothing names, which the next
`Store.collect` removes. Writers hold the folder's lock; readers do not, and treat what vanishes as absent.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path

from ring_mlx.engine.snapshots.blocks import BLOCK_TOKENS, Block, Form, Snapshot, Tokens
from ring_mlx.engine.snapshots.files import MOST_HEADER_BYTES, blob_path, read_blob, write_blob
from ring_mlx.engine.snapshots.folder import ModelFolder, remove, room_bytes
from ring_mlx.engine.snapshots.keeping import Keeping
from ring_mlx.engine.snapshots.manifest import MOST_FILE_BYTES, Manifests, read_manifest, write_manifest
from ring_mlx.engine.snapshots.packing import form_of, pack_block, pack_rest, unpack, unpack_block
from ring_mlx.engine.snapshots.shapes import Shapes
from ring_mlx.errors import CacheFileError
from ring_mlx.system.files import is_plain, sync_path


def default_folder() -> Path:
    """Where the system wants an application's caches; ``RING_MLX_CACHE`` overrides it."""
    named = os.environ.get("RING_MLX_CACHE")
    return Path(os.path.expanduser(named)) if named else user_cache_path("ring-mlx", appauthor=False)


class Store:
    """The snapshots of one model in a folder that several processes may share.

    Args:
        root: The folder of all models' snapshots.
        fingerprint: The model's; others' snapshots are never seen.
        budget_bytes: Most bytes for this model; what was used longest ago goes first.
        name: What to call the model in lists.
        kv_bits: Keep keys and values in 8 bits (or 4); None keeps them as they are. Those that are quantised already
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
        self.budget_bytes, self._kv_bits, self._name, self._shapes = budget_bytes, kv_bits, name, shapes
        self._most_bytes = MOST_FILE_BYTES if shapes is None else shapes.most_bytes(BLOCK_TOKENS) + MOST_HEADER_BYTES
        self._files = ModelFolder(root, fingerprint)
        self.folder, self._blobs = self._files.path, self._files.blobs
        self._fingerprint = fingerprint
        self._manifests = Manifests()
        self._keeping = Keeping(self._files, kv_bits, self.manifests, lambda ids: self._candidates(ids, -1))
        self._loaded: dict[str, weakref.ref[Block]] = {}
        self._warned = self._has_looked = False

    def deepest(self, tokens: Sequence[int] | Tokens, longer_than: int = -1) -> Snapshot | None:
        """The longest good snapshot that is a prefix of ``tokens`` and more than ``longer_than`` tokens long.

        Without logits it must be shorter than ``tokens``. A damaged one is named in one warning, removed and passed
        over.
        """
        ids = np.asarray(tokens, dtype=np.int32)
        try:
            self._files.check()
            candidates = self._candidates(ids, longer_than)
            if not self._has_looked:
                self._has_looked = True
                for text in self.strangers()[:1]:
                    self._warn(text)
        except FileNotFoundError:
            return None
        except OSError as e:
            self._warn(f"{self.folder} is not used ({e}); mend or remove it.")
            return None
        for path in candidates:
            try:
                snapshot = self._load(path, ids)
            except FileNotFoundError:
                self._files.discard_incomplete(path)
                continue
            except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as e:
                self._discard(path, e)
                continue
            if snapshot.offset < len(ids) or snapshot.logits is not None:
                _touch(path)
                return snapshot
        return None

    def save(self, snapshots: Iterable[Snapshot]) -> int:
        """Write what is not there yet, parents first, then collect what exceeds the budget.

        What would be collected at once is not written, and not durable any more.

        Args:
            snapshots: In the order of their use.

        Returns:
            How many were written.

        Raises:
            CacheFileError: If the folder cannot be written.
        """
        written = 0
        try:
            with self._files.locked():
                for s, used in self._keeping.worth_saving(snapshots, self.budget_bytes):
                    written += self._save_in_room(s)
                    os.utime(self._keeping.path(s), (used, used))
                    s.saved = True
                self._collect(self.budget_bytes)
        except (OSError, RuntimeError) as e:
            raise CacheFileError(f"{self.folder} could not be written ({e}); check space and permissions.") from None
        return written

    def note_use(self, s: Snapshot) -> None:
        """Say that a saved snapshot was used from memory."""
        _touch(self._keeping.path(s))

    def check(self) -> None:
        """As `ModelFolder.check`."""
        self._files.check()

    def strangers(self) -> list[str]:
        """A line for each file among the snapshots' that is none of ours."""
        return [f"{path} is no file of a snapshot; ignored." for path in self._files.strangers()]

    def last_used(self) -> float:
        """When a snapshot was used last."""
        return max((path.lstat().st_mtime for path in self._files.paths()), default=0.0)

    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._files.nbytes()

    def give_way(self, nbytes: int) -> int:
        """Remove what was used longest ago, so many bytes of it or all; returns the bytes freed."""
        with self._files.locked(make=False):
            return self._give_way(nbytes)

    def collect(self, budget_bytes: int | None = None, unused_for_s: float | None = None) -> int:
        """Remove what exceeds the budget, what was not used for so long, and what nothing names.

        Returns:
            The bytes freed.
        """
        if not self.folder.exists():
            return 0
        with self._files.locked(make=False):
            if unused_for_s is not None:
                for path in self._files.paths():
                    if time.time() - path.lstat().st_mtime > unused_for_s:
                        remove(path)
            return self._collect(self.budget_bytes if budget_bytes is None else budget_bytes)

    def manifests(self, say: Callable[[str], object] | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every good manifest; ``say`` is told of those that are not."""
        paths = self._files.paths()
        self._manifests.keep_only(paths)
        for path in paths:
            try:
                yield path, self._manifests.read(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as e:
                if say is not None:
                    say(_damage(path, e))

    def _candidates(self, ids: Tokens, longer_than: int) -> list[Path]:
        """Manifests whose name says that they are a prefix, the deepest first; nothing is read."""
        names: dict[int, set[str]] = {}
        for offset, digest in self._files.snapshots():
            if longer_than < offset <= len(ids):
                names.setdefault(offset, set()).add(digest)
        found, running, at = [], hashlib.sha256(), 0
        for offset in sorted(names):
            running.update(ids[at:offset].tobytes())
            at = offset
            if running.hexdigest() in names[offset]:
                found.append(self._files.manifest(offset, running.hexdigest()))
        return found[::-1]

    def _load(self, path: Path, ids: Tokens) -> Snapshot:
        manifest = read_manifest(path)
        if manifest["fingerprint"] != self._fingerprint:
            raise ValueError("it belongs to another model")
        form, sizes, rest = form_of(manifest), manifest["sizes"], manifest["rest"]
        blocks = [self._block(name, sizes[name], form) for name in manifest["blocks"]]
        read = read_blob(self._blobs, rest, sizes[rest], self._most_bytes)
        snapshot = unpack(manifest, *read, blocks, ids[: manifest["offset"]])
        if self._shapes is not None:
            self._shapes.check(snapshot)
        return snapshot

    def _block(self, name: str, size: int, form: Form) -> Block:
        if name not in self._loaded or (block := self._loaded[name]()) is None:
            block = unpack_block(*read_blob(self._blobs, name, size, self._most_bytes), form)
            block.blob = name
            self._loaded[name] = weakref.ref(block)
        return block

    def _save_in_room(self, s: Snapshot) -> bool:
        """Write a snapshot if the disk then still has its reserve; older ones give way to it."""
        needed = s.own_bytes + sum(b.nbytes for b in s.blocks if not self._keeping.has(b))
        missing = needed - room_bytes(self._blobs)
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
        """Remove so many bytes if that can be; otherwise nothing."""
        return nbytes <= self._files.blob_bytes() and self._give_way(nbytes) >= nbytes

    def _give_way(self, nbytes: int) -> int:
        return self._collect(max(0, self._files.blob_bytes() - nbytes))

    def _save(self, s: Snapshot) -> bool:
        path = self._keeping.path(s)
        if is_plain(path):
            return False
        sizes: dict[str, int] = {}
        for block in s.blocks:
            if not self._keeping.has(block):
                block.blob, _ = write_blob(self._blobs, *pack_block(block, s.form, self._kv_bits))
            assert block.blob is not None
            sizes[block.blob] = blob_path(self._blobs, block.blob).stat().st_size
        rest, size = write_blob(self._blobs, *pack_rest(s, self._kv_bits))
        parent = next(iter(self._candidates(s.tokens[:-1], -1)), None)
        manifest = {
            "fingerprint": self._fingerprint,
            "model": self._name,
            "offset": s.offset,
            "tokens": path.stem.partition("-")[2],
            "kind": s.kind,
            "form": list(s.form),
            "states": len(s.states),
            "parent": parent.stem if parent else None,
            "blocks": [b.blob for b in s.blocks],
            "rest": rest,
            "sizes": sizes | {rest: size},
        }
        sync_path(self._blobs)
        write_manifest(path, manifest)
        return True

    def _collect(self, budget_bytes: int) -> int:
        freed = self._keeping.collect(budget_bytes)
        if not budget_bytes:  # nothing shall stay, not even what cannot be read
            for path in self._files.paths():
                remove(path)
        return freed

    def _discard(self, path: Path, reason: Exception) -> None:
        """Remove a snapshot that is damaged for certain; a lack of memory, files or rights may pass."""
        self._warn(_damage(path, reason))
        number = getattr(reason, "errno", errno.EINVAL)
        if not isinstance(reason, RuntimeError) and number in (errno.EINVAL, errno.EFBIG):
            self._files.discard(path, self._most_bytes)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"[cache] {' '.join(text.split())}", stacklevel=2)


def _damage(path: Path, reason: Exception) -> str:
    return f"{path} is damaged or foreign ({reason}); ignored, the prompt is read again."


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)
