"""The small JSON file that makes blobs a snapshot; it carries its own checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ring_mlx.snapshots.files import write_atomically

FORMAT, VERSION = "ring-mlx-snapshot", 1


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest, whole or not at all."""
    named = {"format": FORMAT, "version": VERSION} | manifest
    text = json.dumps(named | {"checksum": _checksum(named)}, indent=1)
    write_atomically(path, lambda name: _write_text(name, text))


def read_manifest(path: Path) -> dict[str, Any]:
    """Read what `write_manifest` wrote.

    Raises:
        ValueError: If it is not that.
        OSError: If it cannot be read.
    """
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError("not a manifest of this version")
    if manifest.pop("checksum", None) != _checksum(manifest):
        raise ValueError("the manifest does not match its checksum")
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_text(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")
