"""A folder or a hub repository to a local folder, through huggingface_hub."""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import huggingface_hub  # It imports what is large when that is first used.
from huggingface_hub import constants
from tqdm import tqdm

from ring_mlx.checkpoint.shards import look_up
from ring_mlx.errors import HubError, RingError
from ring_mlx.system.progress import Progress
from ring_mlx.system.regular_files import check_small_files, is_inside, read_bounded

# All that a checkpoint needs; weights in other formats, code and pictures are never fetched.
NEEDED_FILES = [
    *("config.json", "generation_config.json", "model*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "chat_template*.jinja", "additional_chat_templates/*.jinja"),
]
REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def resolve_model(
    path_or_repo: str | os.PathLike[str], revision: str | None = None, progress: Progress | None = None
) -> Path:
    """Find a checkpoint: a folder as it is, or a hub repository, whose needed files are downloaded to the hub's cache.

    What is there is not fetched again, and an interrupted download goes on where it stopped. The standard variables
    (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE) hold.

    Args:
        path_or_repo: A folder, which may be a repository's in a hub's cache, or ``owner/name``.
        revision: Branch, tag or commit of a repository.
        progress: Called with (bytes there, all) during a download; None shows the hub's own bars at a terminal.

    Raises:
        HubError: Naming why the folder or repository cannot be found or fetched.
    """
    name = os.fspath(path_or_repo)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir() and is_cached_repo(folder):
        return cached_snapshot(folder, revision)
    if folder.is_dir():
        if revision is not None:
            raise HubError(f"revision {revision!r} is for hub repositories, but {name} is a folder; leave it out.")
        return folder
    if folder.exists():
        raise HubError(f"{name} is a file, not a folder; give the folder of a checkpoint.")
    if not REPO_ID.match(name):
        raise HubError(f"no such folder {name!r}, and it is not owner/name of a hub repository; check the spelling.")
    return _download(name, revision, progress)


def is_cached_repo(folder: Path) -> bool:
    """Whether a folder is a repository in huggingface_hub's cache, whose files lie in its snapshots."""
    return (folder / "snapshots").is_dir() and not (folder / "config.json").exists()


def cached_snapshot(folder: Path, revision: str | None = None) -> Path:
    """The snapshot of a revision in a cached repository, by default main, or the newest complete one if main is not.

    Raises a HubError if there is no such revision, or no snapshot is complete.
    """
    if revision is not None:
        wanted = _snapshot_of(folder, revision)
        if wanted is None:
            raise HubError(f"{folder} has no revision {revision!r}; leave it out, or download that revision.")
        return wanted
    found = _complete_snapshot(folder)
    if found is None:
        raise HubError(f"{folder} holds no complete snapshot of a checkpoint; download it again.")
    if (folder / "refs" / "main").exists() and found != _snapshot_of(folder, "main"):
        warnings.warn(f"[hub] main in {folder} is not complete; {found.name} is read instead.", stacklevel=3)
    return found


def cached_models(is_whole: bool = True) -> dict[str, Path]:
    """The complete snapshots in the hub's cache by owner/name, as `cached_snapshot` chooses them.

    Repositories without one are left out, unless ``is_whole`` is false, which gives their newest one.
    """
    return dict(each_cached_model(is_whole))


def each_cached_model(is_whole: bool = True) -> Iterator[tuple[str, Path]]:
    """`cached_models`, one after the other as they are found; what cannot be read is left out."""
    for repo in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        try:
            folders = (
                [_complete_snapshot(repo), *([] if is_whole else _snapshots(repo))] if is_cached_repo(repo) else []
            )
        except OSError:
            continue
        if (folder := next(filter(None, folders), None)) is not None:
            yield repo.name.removeprefix("models--").replace("--", "/", 1), folder


def _snapshots(repo: Path) -> list[Path]:
    """The newest first."""
    found = (p for p in (repo / "snapshots").iterdir() if p.is_dir())
    return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)


def _complete_snapshot(folder: Path) -> Path | None:
    """Main if it is complete, else the newest complete snapshot."""
    main = _snapshot_of(folder, "main")
    return next((s for s in (*filter(None, [main]), *_snapshots(folder)) if _is_complete(s)), None)


def _snapshot_of(folder: Path, revision: str) -> Path | None:
    if not is_inside(revision.replace("/", "-")) or ".." in revision:
        return None
    try:
        commit = read_bounded(folder / "refs" / revision, 100, HubError).decode("ascii").strip()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        commit = revision
    found = folder / "snapshots" / commit
    return found if is_inside(commit) and found.is_dir() else None


def _is_complete(snapshot: Path) -> bool:
    """Whether config.json and all shards that the index names are there, and no link is broken."""
    try:
        check_small_files(snapshot)
        shards, missing, _ = look_up(snapshot)
    except RingError:
        return False
    return (snapshot / "config.json").is_file() and bool(shards) and not missing and all(s.exists() for s in shards)


def _download(repo: str, revision: str | None, progress: Progress | None) -> Path:
    class SilentBar(tqdm):
        """Shows nothing, and passes the bytes on to ``progress``."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})
            self._is_bytes = kwargs.get("unit") == "B"  # others count files

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if progress and self._is_bytes and self.n < (self.total or 0):
                progress(self.n, self.total)

    SilentBar.set_lock(RLock())
    bar = SilentBar if progress else None
    with hub_errors(repo, revision):
        folder = Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=NEEDED_FILES, tqdm_class=bar)
        )
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise HubError(f"{repo} has no {pattern}, so it is not a checkpoint for MLX; check the name.")
    return folder


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises while it fetches from ``repo`` into one line, a HubError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as e:
        raise HubError(_named_error(repo, revision, e) or _failed(repo, e)) from None


def _named_error(repo: str, revision: str | None, error: Exception) -> str | None:
    errors = huggingface_hub.errors
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; accept its licence on the hub's page and log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no folder and no hub repository {repo!r}; check the spelling, or log in with `hf auth login` if it is "
            "private."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; check branches and tags on its page."
    if not isinstance(error, errors.LocalEntryNotFoundError):
        return None
    if constants.HF_HUB_OFFLINE:
        return f"{repo} is not complete in the cache and HF_HUB_OFFLINE is set; unset it to download."
    cause = error.__cause__
    if isinstance(cause, errors.HfHubHTTPError) and getattr(cause, "response", None) is not None:
        return f"the hub answered {cause.response.status_code} for {repo}; try again later."
    seen = type(cause or error).__name__
    return f"the hub cannot be reached ({seen}) and {repo} is not in the cache; check the network and try again."


def _failed(repo: str, error: Exception) -> str:
    code = getattr(error, "errno", None)
    again = "run again, it goes on where it stopped."
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full while downloading {repo}; free some space and {again}"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the download folder of {repo} is not writable ({error}); check HF_HOME and its permissions."
    status = getattr(getattr(error, "response", None), "status_code", None)
    seen = f"the hub answered {status} for {repo}" if status is not None else f"downloading {repo} failed ({error})"
    return f"{seen}; {again}"
