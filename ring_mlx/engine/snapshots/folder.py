"""The folder of one model's snapshots: what belongs there, and nothing else is touched.

Only plain files with names of ours are read or removed, and only in folders that are no links and belong to this user.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ring_mlx.engine.snapshots.files import blob_path, checksum
from ring_mlx.engine.snapshots.manifest import VERSION, read_manifest
from ring_mlx.system.files import PRIVATE_FILE, TEMPORARY, check_private, is_plain, locked, make_folder

MANIFEST_NAME = re.compile(r"([0-9]{7,10})-([0-9a-f]{64})\.json")
BLOB_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")
MODEL_NAME = re.compile(r"\w[\w .+-]{0,199}", re.ASCII)

KERNELS = "twin"  # compiled ones, beside the snapshots in the system's folder

# What snapshots leave free, for a chat that is still to be written down; a twentieth of a disk smaller than 10 GiB.
RESERVE_BYTES = 512 << 20


class ModelFolder:
    """Where the snapshots of one model lie.

    Args:
        root: The folder of all models' snapshots.
        name: The model's fingerprint.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.path = root, root / f"v{VERSION}" / name
        self.manifests, self.blobs = self.path / "snapshots", self.path / "blobs"
        self._tightened = False

    def check(self) -> None:
        """Hold that every folder is one, is ours and is closed to others.

        Raises:
            FileNotFoundError: If there are no snapshots.
            OSError: If a folder is a link, something else, or another user's.
        """
        _check_root(self.root)
        check_private(self.path.parent)
        check_private(self.path)
        for folder in (self.manifests, self.blobs):
            with suppress(FileNotFoundError):
                check_private(folder)
        if not self._tightened:
            self._tightened = True
            for entry in (*_entries(self.path), *_entries(self.manifests), *_entries(self.blobs)):
                with suppress(OSError):
                    if _is_plain(entry) and stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode) != PRIVATE_FILE:
                        os.chmod(entry.path, PRIVATE_FILE)

    @contextmanager
    def locked(self, make: bool = True) -> Iterator[None]:
        """Hold the folder's lock; readers do not need it.

        Args:
            make: Make what is missing.

        Raises:
            OSError: As `check`; or if the lock cannot be had.
        """
        if make:
            for folder in (self.path.parent, self.path, self.manifests, self.blobs):
                make_folder(folder)
        self.check()
        with locked(self.path / ".lock"):
            yield

    def snapshots(self) -> list[tuple[int, str]]:
        """Tokens and hash of every snapshot, as the names of the manifests say."""
        found = (MANIFEST_NAME.fullmatch(e.name) for e in _entries(self.manifests) if _is_plain(e))
        return [(int(m[1]), m[2]) for m in found if m]

    def manifest(self, offset: int, digest: str) -> Path:
        """Where the manifest of a snapshot is."""
        return self.manifests / f"{offset:07d}-{digest}.json"

    def paths(self) -> list[Path]:
        """The manifest of every snapshot."""
        return [self.manifest(*found) for found in sorted(self.snapshots())]

    def strangers(self) -> list[Path]:
        """What lies among the files and is none of ours; names that begin with a dot are the system's."""
        kinds = ((self.manifests, MANIFEST_NAME), (self.blobs, BLOB_NAME))
        return [
            Path(e.path)
            for folder, name in kinds
            for e in _entries(folder)
            if not e.name.startswith(".") and not (name.fullmatch(e.name) and _is_plain(e))
        ]

    def sweep(self, named: set[str]) -> int:
        """Remove blobs that are not named and what killed writers left; returns the bytes. Needs the lock."""
        freed = 0
        for entry in (*_entries(self.blobs), *_entries(self.manifests)):
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
        """Remove a damaged manifest, or one that names damaged blobs, and those; larger ones are not even read."""
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
        """Whether there is a file for it."""
        return is_plain(blob_path(self.blobs, name))

    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(map(_bytes, (self.path, self.manifests, self.blobs)))

    def blob_bytes(self) -> int:
        """Bytes of the blobs."""
        return _bytes(self.blobs)


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
