"""Writes shards and the manifest; the target folder appears only when it is whole.

The work lies in ``.NAME.partial`` beside the target. A shard is written under another name, its tensors at their
offsets, synced, and renamed; then the manifest says so. The manifest is replaced as a whole, so whatever stops the
process, it never names a shard that is not there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint.regular_files import MAX_JSON_BYTES, is_inside, parse_object, read_bounded
from ring_mlx.checkpoint.safetensors_header import BITS, TensorSpec, header_bytes
from ring_mlx.errors import ConvertError
from ring_mlx.system.files import TEMPORARY, place, sync_path, write_text, write_together
from ring_mlx.system.pace import Progress

FORMAT = 1
MANIFEST = "conversion.json"
UNFINISHED = ".tmp"


class Workplace:
    """The partial folder of one target.

    Args:
        target: What it becomes.
        job: Source identity and options; a started conversion is continued only with the same.
        resume: Whether to go on with one that has finished shards; one without any is begun again in any case. A shard
            that is not what the manifest says is made again.

    Raises:
        ConvertError: If the target exists, or there is a partial folder that may not be continued.
    """

    def __init__(self, target: Path, job: Mapping[str, Any], resume: bool) -> None:
        self.target, self.folder = target, partial_folder(target)
        if target.exists() or target.is_symlink():
            raise ConvertError(f"{target} exists already; name a folder that does not, or remove it.")
        self._job = dict(job)
        self.done: dict[str, str] = {}
        if self.folder.exists():
            self._adopt(resume)
        else:
            self.folder.mkdir(parents=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConvertError(f"{self.folder} is being written by another process; wait for it.") from None
        self._save({})

    def has(self, shard: str) -> bool:
        """Whether this shard is finished."""
        return shard in self.done and (self.folder / shard).is_file()

    def finish_shard(self, shard: str, unfinished: Path) -> None:
        """Give a written shard its name and note its hash."""
        digest = sha256(unfinished)
        place(unfinished, self.folder / shard)
        self.done[shard] = digest
        self._save({})

    def finish(self, keep: set[str]) -> Path:
        """Hash the other files, remove what is not named, and turn the folder into the target.

        Raises:
            ConvertError: If something has taken the target's place, or a shard is gone.
        """
        gone = [shard for shard in self.done if not self.has(shard)]
        if gone:
            raise ConvertError(f"{', '.join(gone[:6])} vanished from {self.folder}; run again with --resume.")
        kept = {Path(name).parts[0] for name in keep} | set(self.done) | {MANIFEST}
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in keep:
            sync_path(self.folder / name)
        self._save({name: sha256(self.folder / name) for name in sorted(keep)})
        try:
            place(self.folder, self.target)
        except OSError as e:
            raise ConvertError(f"{self.folder} could not become {self.target} ({e}); rename it by hand.") from None
        return self.target

    def close(self) -> None:
        """Let another process go on."""
        os.close(self._lock)

    def _adopt(self, resume: bool) -> None:
        path = self.folder / MANIFEST
        if not path.is_file():
            if all(name.startswith(TEMPORARY) for name in os.listdir(self.folder)) and resume:
                return
            raise ConvertError(f"{self.folder} is in the way and not an unfinished conversion; remove it.")
        manifest = read_manifest(self.folder)
        if not manifest["shards"]:
            return  # Ours, and no work would be lost.
        if not resume:
            raise ConvertError(
                f"{self.folder} holds an unfinished conversion; add --resume to go on, or remove it to start again."
            )
        changed = [key for key in ("format", *self._job) if manifest.get(key) != {"format": FORMAT, **self._job}[key]]
        if changed:
            raise ConvertError(
                f"{self.folder} was started with another {' and '.join(changed)}; give the same again, or remove it."
            )
        self.done = {name: digest for name, digest in manifest["shards"].items() if self._is_whole(name, digest)}

    def _is_whole(self, shard: str, digest: str) -> bool:
        path = self.folder / shard
        try:
            return path.is_file() and sha256(path) == digest
        except OSError:
            return False

    def _save(self, files: Mapping[str, str]) -> None:
        whole = {"format": FORMAT, **self._job, "shards": dict(sorted(self.done.items())), "files": dict(files)}
        write_text(self.folder / MANIFEST, _text(whole))


class ShardFile:
    """A safetensors file whose tensors are written piece by piece, in any order.

    Args:
        path: Where; what is there is replaced.
        tensors: All tensors that it will hold.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]) -> None:
        # Wide types first, so that every tensor is aligned.
        ordered = sorted(tensors, key=lambda t: (-BITS[t.dtype], t.name))
        entries: dict[str, Any] = {}
        self._starts: dict[str, int] = {}
        at = 0
        for t in ordered:
            entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
            self._starts[t.name] = at
            at += t.nbytes
        header = header_bytes(entries, {"format": "mlx"})
        self._base, self._file = len(header), path.open("wb")
        self._left = dict.fromkeys(self._starts, 0) | {t.name: t.nbytes for t in ordered}
        self._file.write(header)

    def write(self, name: str, at_byte: int, array: mx.array) -> int:
        """Put an array's bytes into a tensor, ``at_byte`` bytes from its start; returns how many there were."""
        plain: Any = mx.contiguous(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
        data = memoryview(plain).cast("B")
        self._file.seek(self._base + self._starts[name] + at_byte)
        self._file.write(data)
        self._left[name] -= data.nbytes
        return data.nbytes

    def close(self) -> None:
        """End a file that is written whole; `Workplace.finish_shard` brings it to the disk."""
        assert not any(self._left.values()), "a tensor was not written whole"
        self._file.close()

    def abandon(self) -> None:
        """Close an unfinished file, whatever state it is in."""
        with suppress(OSError):
            self._file.close()


def partial_folder(target: Path) -> Path:
    """Where the conversion to ``target`` is worked on."""
    return target.parent / f".{target.name}.partial"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a converted or partial folder.

    Raises:
        ConvertError: If there is none or it is damaged.
    """
    path = folder / MANIFEST

    def damaged(seen: str) -> ConvertError:
        return ConvertError(f"{path} is damaged ({seen.partition('; ')[0]}); remove the folder and convert again.")

    try:
        manifest = parse_object(read_bounded(path, MAX_JSON_BYTES, damaged), MANIFEST, damaged)
    except FileNotFoundError:
        raise ConvertError(f"no {MANIFEST} in {folder}; it was not written by ring-mlx convert.") from None
    for part in ("shards", "files"):
        hashes = manifest.get(part)
        if not isinstance(hashes, dict) or not all(is_inside(n) and isinstance(h, str) for n, h in hashes.items()):
            raise damaged(f"{part} is no list of files with their hashes")
    return manifest


def verify(folder: Path, progress: Progress | None = None) -> int:
    """Hold every file of a converted folder against its manifest.

    Args:
        folder: The folder.
        progress: Called with (bytes read, all, file).

    Returns:
        How many files were checked.

    Raises:
        ConvertError: If a file is missing or was changed, naming it.
    """
    manifest = read_manifest(folder)
    hashes = manifest["shards"] | manifest["files"]
    missing = [name for name in hashes if not (folder / name).is_file()]
    if missing:
        raise ConvertError(f"{folder} lacks {', '.join(missing[:6])}; convert again.")
    try:
        sizes = {name: (folder / name).stat().st_size for name in hashes}
        changed, read = [], 0
        for name, digest in hashes.items():
            if progress:
                progress(read, sum(sizes.values()), name)
            changed += [name] * (sha256(folder / name) != digest)
            read += sizes[name]
    except OSError as e:
        raise ConvertError(f"{folder} cannot be checked ({e}); check the disk, or convert again.") from None
    if changed:
        raise ConvertError(f"{', '.join(changed[:6])} in {folder} changed since the conversion; convert again.")
    return len(hashes)


def amend(folder: Path, texts: Mapping[str, str]) -> None:
    """Add text files to a finished folder, or change them on purpose, together with their hashes.

    Raises:
        ConvertError: If the manifest is damaged.
        OSError: If they cannot be written; none is changed then.
    """
    manifest = read_manifest(folder)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    manifest["files"] = dict(sorted((manifest["files"] | hashes).items()))
    write_together(folder, {**texts, MANIFEST: _text(manifest)})


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line.

    Raises:
        ConvertError: Naming the cause and the remedy.
    """
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            seen = "the disk is full"
        elif e.errno == errno.EFBIG:
            seen = "a file may not grow that large here"
        else:
            seen = str(e)
        raise ConvertError(f"{target} could not be written ({seen}); mend that and run again with --resume.") from None
