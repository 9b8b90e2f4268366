"""Sources and results on the hub: headers without shards, single shards, uploads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils.tqdm import tqdm

from ring_mlx.checkpoint.hub import NEEDED_FILES, REPO_ID, hub_errors
from ring_mlx.checkpoint.safetensors_header import Tensor, check_entries
from ring_mlx.checkpoint.shards import add_tensors
from ring_mlx.errors import HubError, OptionError
from ring_mlx.system.terminal_text import harmless

SMALL_FILES = [pattern for pattern in NEEDED_FILES if not pattern.endswith(".safetensors")]


def is_repo(name: str) -> bool:
    """Whether this names a repository rather than a folder."""
    return not os.path.exists(os.path.expanduser(name)) and REPO_ID.match(name) is not None


def fetch_small_files(repo: str, revision: str | None) -> Path:
    """Config, tokenizer and templates of a repository, in the hub's cache, in a folder named by the commit."""
    with hub_errors(repo, revision):
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=SMALL_FILES))
    if not (folder / "config.json").is_file():
        raise HubError(f"{repo} has no config.json, so it is not a checkpoint for MLX; check the name.")
    return folder


def tensors(repo: str, revision: str | None) -> dict[str, Tensor]:
    """Every tensor of a repository, from the headers of its shards; a HubError if they cannot be had."""
    with hub_errors(repo, revision):
        try:
            metadata = huggingface_hub.HfApi().get_safetensors_metadata(repo, revision=revision)
        except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as e:
            raise HubError(f"{repo} has no readable .safetensors ({e}); check the name.") from None
        except errors.HfHubHTTPError:
            raise
        except _transport_error() as e:
            raise HubError(
                f"the hub cannot be reached ({type(e).__name__}); check the network and try again."
            ) from None
    found: dict[str, Tensor] = {}
    for file, part in metadata.files_metadata.items():
        header = {
            name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
            for name, t in part.tensors.items()
        }
        add_tensors(found, check_entries(Path(file), header), Path(repo, file))
    return found


class FileBar(tqdm):
    """The hub's bar, which shows the name of a file."""

    def __init__(self, *args: Any, desc: str = "", **kwargs: Any) -> None:
        super().__init__(*args, desc=harmless(desc), **kwargs)


def fetcher(repo: tuple[str, str | None] | None, folder: Path) -> Callable[[str], Path] | None:
    """A function that fetches a shard of (owner/name, revision) into a folder; None without a repository.

    An interrupted download goes on where it stopped. The function raises a HubError if the shard cannot be had.
    """
    if repo is None:
        return None
    name, revision = repo

    def fetch(file: str) -> Path:
        with hub_errors(name, revision):
            return Path(
                huggingface_hub.hf_hub_download(name, file, revision=revision, local_dir=folder, tqdm_class=FileBar)
            )

    return fetch


def check_repo_name(repo: str) -> None:
    """Raises OptionError if this is not owner/name."""
    if not REPO_ID.match(repo):
        raise OptionError(f"--upload-repo {repo!r} is not owner/name of a hub repository; give one.")


def upload(folder: Path, repo: str) -> str:
    """Upload a folder to a repository, made if it does not exist; returns the commit's address."""
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Upload converted model"))
    except (OSError, ValueError, RuntimeError, _transport_error()) as e:
        status = getattr(getattr(e, "response", None), "status_code", None)
        seen = f"the hub answered {status}" if status else str(e) or type(e).__name__
        remedy = "log in with `hf auth login`" if status in (401, 403, 404) else "check the network"
        raise HubError(f"uploading to {repo} failed ({seen}); {remedy} and run again with --resume.") from None


def _transport_error() -> type[Exception]:
    """What the client under huggingface_hub raises without a connection; the client depends on its version."""
    classes = errors.HfHubHTTPError.__mro__
    return next(c for c in classes if c.__name__ == "HTTPError" or c is OSError)
