"""A disk that can lose power: it notes what has been brought to it, and finds names that could outlive their content."""

from __future__ import annotations

import os
from pathlib import Path

# Of these nobody expects that they are whole after a power cut.
PASSING = (".writing-", ".lock", ".tmp")


class Disk:
    """Watches syncs and renames below a folder; ``faults`` says in words what a power cut could have spoilt.

    Args:
        monkeypatch: pytest's.
        root: The folder.
    """

    def __init__(self, monkeypatch, root: Path) -> None:
        self.root, self.faults, self.order = root, [], []
        self._content: dict[int, bytes] = {}
        self._names: dict[int, set[str]] = {}
        fsync, replace = os.fsync, os.replace

        def watched_sync(handle: int) -> None:
            fsync(handle)
            self._note(handle)

        def watched_replace(source, target) -> None:
            source, target = Path(source), Path(target)
            if self._below(target):
                if source.is_file() and not self.has_content(source):
                    self.faults.append(f"{target.name} was renamed before its content was on the disk")
                self.order.append(target)
                self._check_named(target)
            replace(source, target)

        monkeypatch.setattr(os, "fsync", watched_sync)
        monkeypatch.setattr(os, "replace", watched_replace)
        monkeypatch.setattr(os, "rename", watched_replace)

    def has_content(self, path: Path) -> bool:
        """Whether a file is on the disk as it is now."""
        return self._content.get(path.stat().st_ino) == path.read_bytes()

    def has_name(self, path: Path) -> bool:
        """Whether the name of a file or folder is on the disk."""
        return path.name in self._names.get(path.parent.stat().st_ino, ())

    def check(self) -> list[str]:
        """All faults: those noted, and what is still not on the disk."""
        for path in self.root.rglob("*"):
            if not path.name.startswith(PASSING) and not path.name.endswith(PASSING):
                if path.is_file() and not self.has_content(path):
                    self.faults.append(f"the content of {path.name} is not on the disk")
                if not self.has_name(path):
                    self.faults.append(f"the name of {path.name} is not on the disk")
        return self.faults

    def _note(self, handle: int) -> None:
        found = os.fstat(handle)
        if os.path.isdir(f"/proc/self/fd/{handle}") or os.path.isdir(f"/dev/fd/{handle}"):
            self._names[found.st_ino] = set(os.listdir(handle))
        else:
            self._content[found.st_ino] = os.pread(handle, found.st_size, 0)

    def _below(self, path: Path) -> bool:
        return self.root in path.parents

    def _check_named(self, target: Path) -> None:
        """A manifest of snapshots may only appear once all blobs are on the disk."""
        if target.parent.name == "snapshots":
            for blob in (target.parent.parent / "blobs").glob("[!.]*"):
                if not self.has_content(blob) or not self.has_name(blob):
                    self.faults.append(f"{target.name} names {blob.name}, which is not on the disk")
