"""The folder of one model's snapshots: what belongs there, and nothing else is touched.

Only plain files with names of ours are read or removed, and only in folders that are no links and belong to this user.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from ring_mlx.engine.stored.keeping import Stored, kept
from ring_mlx.engine.stored.manifest import VERSION, Manifests, read_manifest
from ring_mlx.system.files import PRIVATE_FILE, TEMPORARY, check_private, is_plain, locked, make_folder, open_plain

MANIFEST_NAME = re.compile(r"([0-9]{7,10})-([0-9a-f]{64})\.json")
BLOB_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")
MODEL_NAME = re.compile(r"\w[\w .+-]{0,199}", re.ASCII)

KERNELS = "twin"  # compiled ones, beside the snapshots in the system's folder

# What snapshots leave free, for a chat that is still to be written down; a twentieth of a disk smaller than 10 GiB.
RESERVE_BYTES = 512 << 20


class ModelFolder:
    """The stored snapshots of one model, in a folder that several processes may share.

    Args:
        root: The folder of all models' snapshots.
        fingerprint: The model's; others' snapshots are never seen.
        budget_bytes: Most bytes for this model; what was used longest ago goes first.
    """

    def __init__(self, root: Path, fingerprint: str, budget_bytes: int = 1 << 62) -> None:
        self.root, self.folder, self.budget_bytes = root, root / f"v{VERSION}" / fingerprint, budget_bytes
        self.blobs, self._named = self.folder / "blobs", self.folder / "snapshots"
        self._manifests = Manifests()
        self._tightened = False

    def check(self) -> None:
        """Check that every folder is a folder of this user, and close it to others.

        Raises FileNotFoundError if there are no snapshots; OSError if a folder is a link, something else, or another
        user's.
        """
        _check_root(self.root)
        check_private(self.folder.parent)
        check_private(self.folder)
        for folder in (self._named, self.blobs):
            with suppress(FileNotFoundError):
                check_private(folder)
        if not self._tightened:
            self._tightened = True
            for entry in (*_entries(self.folder), *_entries(self._named), *_entries(self.blobs)):
                with suppress(OSError):
                    if _is_plain(entry) and stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode) != PRIVATE_FILE:
                        os.chmod(entry.path, PRIVATE_FILE)

    @contextmanager
    def locked(self, make: bool = True) -> Iterator[None]:
        """Hold the folder's lock, which readers do not need; ``make`` makes missing folders. Raises OSError."""
        if make:
            for folder in (self.folder.parent, self.folder, self._named, self.blobs):
                make_folder(folder)
        self.check()
        with locked(self.folder / ".lock"):
            yield

    def snapshots(self) -> list[tuple[int, str]]:
        """Tokens and hash of every snapshot, as the names of the manifests say."""
        found = (MANIFEST_NAME.fullmatch(e.name) for e in _entries(self._named) if _is_plain(e))
        return [(int(m[1]), m[2]) for m in found if m]

    def manifest_path(self, offset: int, digest: str) -> Path:
        return self._named / f"{offset:07d}-{digest}.json"

    def paths(self) -> list[Path]:
        return [self.manifest_path(*found) for found in sorted(self.snapshots())]

    def manifests(self, say: Callable[[str], object] | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every good manifest; ``say`` gets a line about each of the others."""
        paths = self.paths()
        self._manifests.keep_only(paths)
        for path in paths:
            try:
                yield path, self._manifests.read(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as e:
                if say is not None:
                    say(damage(path, e))

    def stored(self) -> dict[Path, Stored]:
        """What `kept` chooses from, by the path of the manifest."""
        return {
            path: Stored(path.stem, m["parent"], m["offset"], m["kind"], path.stat().st_mtime, m["sizes"])
            for path, m in self.manifests()
        }

    def last_used(self) -> float:
        return max((path.lstat().st_mtime for path in self.paths()), default=0.0)

    def collect(self, budget_bytes: int | None = None, unused_for_s: float | None = None) -> int:
        """Remove what exceeds the budget, was not used for so long, or has no manifest; returns the bytes freed."""
        if not self.folder.exists():
            return 0
        with self.locked(make=False):
            if unused_for_s is not None:
                for path in self.paths():
                    if time.time() - path.lstat().st_mtime > unused_for_s:
                        remove(path)
            return self.collect_locked(self.budget_bytes if budget_bytes is None else budget_bytes)

    def collect_locked(self, budget_bytes: int) -> int:
        """`collect` under the lock that the caller holds."""
        found = self.stored()
        stay = kept(found.values(), budget_bytes)
        for path, stored in found.items():
            if stored.name not in stay:
                remove(path)
        freed = self._sweep({str(blob) for s in found.values() if s.name in stay for blob in s.sizes})
        if not budget_bytes:  # nothing shall stay, not even what cannot be read
            for path in self.paths():
                remove(path)
        return freed

    def give_way(self, nbytes: int) -> int:
        """Remove what was used longest ago, so many bytes of it or all; returns the bytes freed."""
        with self.locked(make=False):
            return self.give_way_locked(nbytes)

    def give_way_locked(self, nbytes: int) -> int:
        """`give_way` under the lock that the caller holds."""
        return self.collect_locked(max(0, self.blob_bytes() - nbytes))

    def strangers(self) -> list[str]:
        """A line for each foreign file; names that begin with a dot are the system's."""
        kinds = ((self._named, MANIFEST_NAME), (self.blobs, BLOB_NAME))
        return [
            f"{e.path} is no file of a snapshot; ignored."
            for folder, name in kinds
            for e in _entries(folder)
            if not e.name.startswith(".") and not (name.fullmatch(e.name) and _is_plain(e))
        ]

    def _sweep(self, named: set[str]) -> int:
        """Remove blobs that are not named and what killed writers left; returns the bytes. Needs the lock."""
        freed = 0
        for entry in (*_entries(self.blobs), *_entries(self._named)):
            blob = BLOB_NAME.fullmatch(entry.name)
            if entry.name.startswith(TEMPORARY) or (blob and blob[1] not in named):
                freed += remove(Path(entry.path))
        return freed

    def discard_incomplete(self, path: Path) -> None:
        """Remove a manifest whose blobs are gone for good, and not only from under this reader."""
        with suppress(OSError, ValueError), self.locked(make=False):
            if not all(self.has_blob(name) for name in read_manifest(path)["sizes"]):
                remove(path)

    def discard(self, path: Path, most_bytes: int) -> None:
        """Remove a damaged manifest, or one that names damaged blobs, and these blobs; too large ones are not even read."""
        with suppress(OSError), self.locked(make=False):
            try:
                names = list(read_manifest(path)["sizes"])
            except (OSError, ValueError):
                names = []
            remove(path)
            for name in names:
                blob = blob_path(self.blobs, name)
                if is_plain(blob) and (blob.lstat().st_size > most_bytes or checksum(blob) != name):
                    remove(blob)

    def has_blob(self, name: str) -> bool:
        return is_plain(blob_path(self.blobs, name))

    def nbytes(self) -> int:
        return sum(map(_bytes, (self.folder, self._named, self.blobs)))

    def blob_bytes(self) -> int:
        return _bytes(self.blobs)


def damage(path: Path, reason: Exception) -> str:
    """A line about a manifest that cannot be used."""
    return f"{path} is damaged or foreign ({reason}); ignored, the prompt is read again."


def blob_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def checksum(path: Path) -> str:
    """SHA-256 of a file that is no link, in hexadecimal."""
    with open_plain(path) as f:
        return hashlib.file_digest(cast(Any, f), "sha256").hexdigest()


def room_bytes(folder: Path) -> int:
    """Bytes of the disk that snapshots may still take."""
    disk = shutil.disk_usage(folder)
    return disk.free - min(RESERVE_BYTES, disk.total // 20)


def remove(path: Path) -> int:
    """Remove a plain file; returns its bytes."""
    if not is_plain(path):
        return 0
    with suppress(FileNotFoundError):
        size = path.lstat().st_size
        path.unlink()
        return size
    return 0


def _check_root(root: Path) -> None:
    """The root may be a link of this user's to this user's folder, and other files may lie in it."""
    if not root.is_dir():
        raise FileNotFoundError(root)
    for found in (root.lstat(), root.stat()):
        if found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"it belongs to user {found.st_uid}", str(root))
    if not root.is_symlink() and set(os.listdir(root)) <= {f"v{VERSION}", KERNELS}:
        check_private(root)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda e: e.name)
    except FileNotFoundError:
        return []


def _bytes(folder: Path) -> int:
    return sum(e.stat(follow_symlinks=False).st_size for e in _entries(folder) if _is_plain(e))


def _is_plain(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False)
