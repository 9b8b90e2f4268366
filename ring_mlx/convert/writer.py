"""The partial folder of a conversion and its manifest; the target folder appears only when it is whole.

The work lies in ``.NAME.partial`` beside the target. A shard is written under another name, synced and renamed; then the
manifest names it. The manifest is replaced as a whole, so whatever stops the process, all shards that it names are there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ring_mlx.errors import ConvertError
from ring_mlx.system.files import TEMPORARY, place, sync_path, write_text, write_together
from ring_mlx.system.progress import Progress
from ring_mlx.system.regular_files import MAX_JSON_BYTES, is_inside, parse_object, read_bounded

FORMAT = 1
MANIFEST = "conversion.json"
UNFINISHED = ".tmp"
GRID_STEPS = "grid_steps"
# Only while the work is unfinished: a finished folder names no time.
TIMES = "source_times"


class PartialFolder:
    """The folder that becomes the target, locked for this process.

    Args:
        target: The folder to make.
        job: Source identity and options; a started conversion is continued only with the same.
        resume: Whether to go on with finished shards. A shard whose hash is not the manifest's is made again.

    Raises:
        ConvertError: If the target exists, or there is a partial folder that may not be continued.
    """

    def __init__(self, target: Path, job: Mapping[str, Any], resume: bool) -> None:
        self.target, self.folder = target, partial_folder(target)
        if target.exists() or target.is_symlink():
            raise ConvertError(f"{target} exists already; name a folder that does not, or remove it.")
        self._job = dict(job)
        self.done: dict[str, str] = {}
        self.grid_steps: dict[str, float] = {}
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
        return shard in self.done and (self.folder / shard).is_file()

    def finish_shard(self, shard: str, unfinished: Path) -> None:
        """Rename a written shard and note its hash."""
        digest = sha256(unfinished)
        place(unfinished, self.folder / shard)
        self.done[shard] = digest
        self._save({})

    def finish(self, keep: set[str]) -> Path:
        """Hash the other files, remove what is not named, and turn the folder into the target."""
        gone = [shard for shard in self.done if not self.has(shard)]
        if gone:
            raise ConvertError(f"{', '.join(gone[:6])} vanished from {self.folder}; run again with --resume.")
        kept = {Path(name).parts[0] for name in keep} | set(self.done) | {MANIFEST}
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in keep:
            sync_path(self.folder / name)
        self._job.pop(TIMES, None)
        self._save({name: sha256(self.folder / name) for name in sorted(keep)})
        try:
            place(self.folder, self.target)
        except OSError as e:
            raise ConvertError(f"{self.folder} could not become {self.target} ({e}); rename it by hand.") from None
        return self.target

    def close(self) -> None:
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
        changed = differing(manifest, {"format": FORMAT, **self._job})
        if changed:
            raise ConvertError(
                f"{self.folder} was started with another {' and '.join(changed)}; give the same again, or remove it."
            )
        for shard, digest in manifest["shards"].items():
            with suppress(OSError):
                if (self.folder / shard).is_file() and sha256(self.folder / shard) == digest:
                    self.done[shard] = digest
                    if (steps := manifest.get(GRID_STEPS, {}).get(shard)) is not None:
                        self.grid_steps[shard] = steps

    def _save(self, files: Mapping[str, str]) -> None:
        steps = {GRID_STEPS: dict(sorted(self.grid_steps.items()))} if self.grid_steps else {}
        done = dict(sorted(self.done.items()))
        whole = {"format": FORMAT, **self._job, **steps, "shards": done, "files": dict(files)}
        write_text(self.folder / MANIFEST, _text(whole))


def differing(manifest: Mapping[str, Any], job: Mapping[str, Any]) -> list[str]:
    """The keys of a job that a manifest has otherwise; keys that older versions did not write say nothing."""
    newer = ("source_samples", TIMES)
    return [key for key, value in job.items() if manifest.get(key, value if key in newer else None) != value]


def partial_folder(target: Path) -> Path:
    """The folder in which the conversion to ``target`` is made."""
    return target.parent / f".{target.name}.partial"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a converted or partial folder; a ConvertError if there is none or it is damaged."""
    path = folder / MANIFEST

    def damaged(seen: str) -> ConvertError:
        return ConvertError(f"{path} is damaged ({seen.partition('; ')[0]}); remove the folder and convert again.")

    try:
        manifest = parse_object(read_bounded(path, MAX_JSON_BYTES, damaged), MANIFEST, damaged)
    except FileNotFoundError:
        raise ConvertError(f"no {MANIFEST} in {folder}; it was not written by ring-mlx convert.") from None
    for part in ("shards", "files"):
        hashes = manifest.get(part)
        if not isinstance(hashes, dict) or not all(_is_below(n) and isinstance(h, str) for n, h in hashes.items()):
            raise damaged(f"{part} is no list of files with their hashes")
    if not isinstance(manifest.get(GRID_STEPS, {}), dict):
        raise damaged(f"{GRID_STEPS} is no object")
    return manifest


def _is_below(name: str) -> bool:
    """Whether a name is that of a file in the folder, or in one within it, as further chat templates are."""
    return all(is_inside(part) for part in name.split("/"))


def verify(folder: Path, progress: Progress | None = None) -> int:
    """Check the hash of every file of a converted folder, else raise a ConvertError; returns how many there are."""
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
    """Change or add text files of a finished folder, and their hashes; if they cannot be written, none is changed."""
    manifest = read_manifest(folder)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    manifest["files"] = dict(sorted((manifest["files"] | hashes).items()))
    write_together(folder, {**texts, MANIFEST: _text(manifest)})


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn errors of the file system into one line, a ConvertError."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            seen = "the disk is full"
        elif e.errno == errno.EFBIG:
            seen = "a file may not grow that large here"
        else:
            seen = str(e)
        raise ConvertError(f"{target} could not be written ({seen}); fix that and run again with --resume.") from None
