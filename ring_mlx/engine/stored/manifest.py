"""The small JSON file that makes blobs a snapshot; it carries its own checksum, and every name in it is a checksum."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ring_mlx.system.files import read_bounded, write_atomically

FORMAT, VERSION = "ring-mlx-snapshot", 1
BLOCK_TOKENS = 256  # in each of a snapshot's blocks
MOST_BYTES, MOST_LAYERS, MOST_TOKENS, MOST_FILE_BYTES = 8 << 20, 10_000, 1 << 31, 1 << 50
# Two ticks of the coarsest clock of a file system, and about 70 MB of names.
SETTLED_NS, MOST_KNOWN_NAMES = 2_000_000_000, 500_000

_DIGEST = re.compile(r"[0-9a-f]{64}")
_STEM = re.compile(r"[0-9]{7,10}-[0-9a-f]{64}")


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest, whole or not at all."""
    text = _text({"format": FORMAT, "version": VERSION} | manifest)
    write_atomically(path, lambda name: Path(name).write_bytes(text.encode()))


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a file of `write_manifest`, and check its bytes and every entry.

    Raises ValueError if it is not that; OSError if it cannot be read.
    """
    data = read_bounded(path, MOST_BYTES)
    try:
        manifest = json.loads(data.decode())
        if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
            raise ValueError("not a manifest of this version")
        manifest.pop("checksum", None)
        if _text(manifest).encode() != data:
            raise ValueError("the manifest does not match its checksum")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    wrong = [name for name, holds in _CHECKS.items() if name not in manifest or not holds(manifest[name])]
    if wrong:
        raise ValueError(f"its {wrong[0]} is impossible")
    if path.stem != f"{manifest['offset']:07d}-{manifest['tokens']}":
        raise ValueError("it is of other tokens")
    if set(manifest["sizes"]) != {*manifest["blocks"], manifest["rest"]}:
        raise ValueError("its sizes are of other files")
    if len(manifest["blocks"]) != manifest["offset"] // BLOCK_TOKENS:
        raise ValueError("it does not have as many blocks as its tokens need")
    return manifest


class Manifests:
    """Manifests that were read and are good; each is read again only if its file changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], dict[str, Any]]] = {}
        self._names = 0

    def read(self, path: Path) -> dict[str, Any]:
        """Same contract as `read_manifest`; the result is shared and must not be changed."""
        stamp, now = _stamp(path), time.time_ns()
        known, manifest = self._known.get(path, ((), {}))
        if known == stamp:
            return manifest
        self._forget(path)
        manifest = read_manifest(path)
        # A later change within the clock's tick would leave the stamp as it is.
        if now - stamp[-1] > SETTLED_NS and _stamp(path) == stamp:
            self._remember(path, stamp, manifest)
        return manifest

    def keep_only(self, paths: Iterable[Path]) -> None:
        """Forget all others."""
        for path in self._known.keys() - set(paths):
            self._forget(path)

    def _remember(self, path: Path, stamp: tuple[int, ...], manifest: dict[str, Any]) -> None:
        if self._names + len(manifest["sizes"]) > MOST_KNOWN_NAMES:
            return
        # Snapshots of a conversation share most of their blocks, and so the names.
        manifest["blocks"] = [sys.intern(name) for name in manifest["blocks"]]
        manifest["sizes"] = {sys.intern(name): size for name, size in manifest["sizes"].items()}
        self._names += len(manifest["sizes"])
        self._known[path] = stamp, manifest

    def _forget(self, path: Path) -> None:
        _, manifest = self._known.pop(path, ((), {"sizes": ()}))
        self._names -= len(manifest["sizes"])


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes whenever a file's content does; its last part is a time that no program can set."""
    found = path.lstat()
    return found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns


def _text(manifest: dict[str, Any]) -> str:
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"checksum": checksum}, indent=1)


def _is_digest(x: object) -> bool:
    return isinstance(x, str) and _DIGEST.fullmatch(x) is not None


def _is_count(x: object, least: int, most: int) -> bool:
    return type(x) is int and least <= x <= most


def _is_layer(x: object) -> bool:
    return x is None or (isinstance(x, list) and len(x) == 2 and all(_is_count(n, 1, 1024) for n in x))


_CHECKS = {
    "version": lambda x: _is_count(x, VERSION, VERSION),
    "fingerprint": lambda x: isinstance(x, str),
    "model": lambda x: isinstance(x, str),
    "kind": lambda x: isinstance(x, str),
    "offset": lambda x: _is_count(x, 1, MOST_TOKENS),
    "tokens": _is_digest,
    "form": lambda x: isinstance(x, list) and len(x) <= MOST_LAYERS and all(map(_is_layer, x)),
    "states": lambda x: _is_count(x, 0, MOST_LAYERS),
    "parent": lambda x: x is None or (isinstance(x, str) and _STEM.fullmatch(x) is not None),
    "blocks": lambda x: isinstance(x, list) and all(map(_is_digest, x)),
    "rest": _is_digest,
    "sizes": lambda x: (
        isinstance(x, dict) and all(_is_digest(k) and _is_count(v, 0, MOST_FILE_BYTES) for k, v in x.items())
    ),
}
