"""Snapshots on disk: found by a prompt's hash, checked before they are believed; knows no model and no text.

One folder a model (and form of keys and values)::

    v1/<fingerprint>/snapshots/<offset>-<SHA-256 of the tokens>.json   a manifest: parent, blobs, layers, checksum
    v1/<fingerprint>/blobs/<SHA-256 of the file>.safetensors           a block, or a snapshot's states and tail

A manifest is written last, so a process that is killed leaves at worst blobs that nothing names, which the next
`Store.collect` removes. Writers hold the folder's lock; readers do not, and treat what vanishes as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ring_mlx.errors import CacheFileError
from ring_mlx.snapshots.blocks import Block, Form, Snapshot, Tokens
from ring_mlx.snapshots.files import TEMPORARY, blob_path, checksum, locked, read_blob, write_blob
from ring_mlx.snapshots.manifest import VERSION, read_manifest, write_manifest
from ring_mlx.snapshots.packing import form_of, pack_block, pack_rest, unpack, unpack_block


def default_folder() -> Path:
    """Where the system wants an application's caches; ``RING_MLX_CACHE`` overrides it."""
    from platformdirs import user_cache_path

    named = os.environ.get("RING_MLX_CACHE")
    return Path(named).expanduser() if named else user_cache_path("ring-mlx", appauthor=False)


def stores(root: Path) -> list[Store]:
    """Every model's snapshots in a folder."""
    return [Store(root, f.name, 1 << 62) for f in sorted((root / f"v{VERSION}").glob("*")) if f.is_dir()]


class Store:
    """The snapshots of one model in a folder that several processes may share.

    Args:
        root: The folder of all models' snapshots.
        fingerprint: The model's; others' snapshots are never seen.
        budget_bytes: Most bytes for this model; what was used longest ago goes first.
        name: What to call the model in lists.
        kv_bits: Keep keys and values in 8 bits (or 4); None keeps them as they are. Those that are quantised already
            stay as they are.
    """

    def __init__(
        self, root: Path, fingerprint: str, budget_bytes: int, kv_bits: int | None = None, name: str = ""
    ) -> None:
        self.budget_bytes, self._kv_bits, self._name = budget_bytes, kv_bits, name
        self.folder = root / f"v{VERSION}" / fingerprint
        self._fingerprint = fingerprint
        self._manifests, self._blobs = self.folder / "snapshots", self.folder / "blobs"
        self._loaded: dict[str, weakref.ref[Block]] = {}
        self._warned = False

    def deepest(self, tokens: Sequence[int] | Tokens, longer_than: int = -1) -> Snapshot | None:
        """The longest good snapshot that is a prefix of ``tokens`` and more than ``longer_than`` tokens long.

        Without logits it must be shorter than ``tokens``. A damaged one is named in one warning, removed and passed
        over.
        """
        ids = np.asarray(tokens, dtype=np.int32)
        for path in self._candidates(ids, longer_than):
            try:
                snapshot = self._load(path, ids)
            except FileNotFoundError:
                self._discard_incomplete(path)
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

        Returns:
            How many were written.

        Raises:
            CacheFileError: If the folder cannot be written.
        """
        written = 0
        try:
            with locked(self.folder / ".lock"):
                for s in sorted(snapshots, key=lambda s: s.offset):
                    written += self._save(s)
                    s.saved = True
                self._collect(self.budget_bytes)
        except (OSError, RuntimeError) as e:
            raise CacheFileError(f"{self.folder} could not be written ({e}); check space and permissions.") from None
        return written

    def collect(self, budget_bytes: int | None = None, unused_for_s: float | None = None) -> int:
        """Remove what exceeds the budget, what was not used for so long, and what nothing names.

        Returns:
            The bytes freed.
        """
        with locked(self.folder / ".lock"):
            if unused_for_s is not None:
                for path in list(self._manifests.glob("*.json")):
                    if time.time() - path.stat().st_mtime > unused_for_s:
                        path.unlink(missing_ok=True)
            return self._collect(self.budget_bytes if budget_bytes is None else budget_bytes)

    def manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every readable manifest."""
        for path in sorted(self._manifests.glob("*.json")):
            try:
                yield path, read_manifest(path)
            except (OSError, ValueError, KeyError, TypeError):
                continue

    def _candidates(self, ids: Tokens, longer_than: int) -> list[Path]:
        """Manifests whose name says that they are a prefix, the deepest first; nothing is read."""
        names: dict[int, set[str]] = {}
        for path in self._manifests.glob("*.json"):
            number, _, digest = path.stem.partition("-")
            if number.isdigit() and longer_than < int(number) <= len(ids):
                names.setdefault(int(number), set()).add(digest)
        found, running, at = [], hashlib.sha256(), 0
        for offset in sorted(names):
            running.update(ids[at:offset].tobytes())
            at = offset
            if running.hexdigest() in names[offset]:
                found.append(self._manifest_path(offset, running.hexdigest()))
        return found[::-1]

    def _manifest_path(self, offset: int, digest: str) -> Path:
        return self._manifests / f"{offset:07d}-{digest}.json"

    def _load(self, path: Path, ids: Tokens) -> Snapshot:
        manifest = read_manifest(path)
        if manifest["fingerprint"] != self._fingerprint:
            raise ValueError("it belongs to another model")
        form = form_of(manifest)
        blocks = [self._block(name, form) for name in manifest["blocks"]]
        return unpack(manifest, *read_blob(self._blobs, manifest["rest"]), blocks, ids[: manifest["offset"]])

    def _block(self, name: str, form: Form) -> Block:
        if name not in self._loaded or (block := self._loaded[name]()) is None:
            block = unpack_block(*read_blob(self._blobs, name), form)
            block.blob = name
            self._loaded[name] = weakref.ref(block)
        return block

    def _save(self, s: Snapshot) -> bool:
        digest = hashlib.sha256(s.tokens.tobytes()).hexdigest()
        path = self._manifest_path(s.offset, digest)
        if path.exists():
            return False
        sizes: dict[str, int] = {}
        for block in s.blocks:
            if block.blob is None or not blob_path(self._blobs, block.blob).exists():
                block.blob, _ = write_blob(self._blobs, *pack_block(block, s.form, self._kv_bits))
            sizes[block.blob] = blob_path(self._blobs, block.blob).stat().st_size
        rest, size = write_blob(self._blobs, *pack_rest(s, self._kv_bits))
        parent = next(iter(self._candidates(s.tokens[:-1], -1)), None)
        manifest = {
            "fingerprint": self._fingerprint,
            "model": self._name,
            "offset": s.offset,
            "tokens": digest,
            "kind": s.kind,
            "form": list(s.form),
            "states": len(s.states),
            "parent": parent.stem if parent else None,
            "blocks": [b.blob for b in s.blocks],
            "rest": rest,
            "sizes": sizes | {rest: size},
        }
        write_manifest(path, manifest)
        return True

    def _collect(self, budget_bytes: int) -> int:
        found = {path.stem: (path, m, path.stat().st_mtime) for path, m in self.manifests()}
        named: dict[str, int] = {}
        for _, m, _ in found.values():
            for blob in m["sizes"]:
                named[blob] = named.get(blob, 0) + 1
        total = sum({b: n for _, m, _ in found.values() for b, n in m["sizes"].items()}.values())
        # What was used last goes last, though it is the one leaf of a single long conversation.
        newest = max(found, key=lambda s: (found[s][2], found[s][1]["offset"]), default=None)
        while total > budget_bytes and found:
            parents = {m["parent"] for _, m, _ in found.values()}
            stem = min(found, key=lambda s: (s == newest, s in parents, found[s][2]))
            path, m, _ = found.pop(stem)
            path.unlink(missing_ok=True)
            for blob, size in m["sizes"].items():
                named[blob] -= 1
                total -= 0 if named[blob] else size
        freed = 0
        if not budget_bytes:  # nothing shall stay, not even what cannot be read
            for path in self._manifests.glob("*.json"):
                path.unlink(missing_ok=True)
        for path in [*self._blobs.glob("*"), *self._manifests.glob(f"{TEMPORARY}*")]:
            if not named.get(path.stem):
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        return freed

    def _discard_incomplete(self, path: Path) -> None:
        """Remove a manifest whose blobs are gone for good, and not only from under this reader."""
        with contextlib.suppress(OSError, ValueError, KeyError), locked(self.folder / ".lock"):
            if not all(blob_path(self._blobs, name).exists() for name in read_manifest(path)["sizes"]):
                path.unlink(missing_ok=True)

    def _discard(self, path: Path, reason: Exception) -> None:
        if not self._warned:
            self._warned = True
            text = f"[cache] {path} is damaged or foreign ({reason}); ignored, the prompt is read again."
            warnings.warn(text, stacklevel=2)
        try:
            with locked(self.folder / ".lock"):
                manifest = read_manifest(path)
                path.unlink(missing_ok=True)
                for name in (*manifest["blocks"], manifest["rest"]):
                    _unlink_if_damaged(self._blobs, name)
        except (OSError, ValueError, KeyError, TypeError):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _unlink_if_damaged(folder: Path, name: str) -> None:
    path = blob_path(folder, name)
    if path.exists() and checksum(path) != name:
        path.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)
