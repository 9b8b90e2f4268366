"""Functions that replace mlx-lm's own in its loader: they check our checkpoints first, and errors are one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lm import utils
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from transformers import dynamic_module_utils

from ring_mlx.checkpoint.hub import REPO_ID, hub_errors
from ring_mlx.checkpoint.loading import assemble
from ring_mlx.checkpoint.shards import read_headers
from ring_mlx.checkpoint.tokenizer import make_tokenizer
from ring_mlx.errors import ConfigError, HubError, OptionError, RingError, TokenizerError, WeightsError
from ring_mlx.generation.templates import render_text
from ring_mlx.mlx_lm_plugin.architecture import Model
from ring_mlx.model import memory
from ring_mlx.model.config_values import shown
from ring_mlx.system.regular_files import check_small_files, read_json

NEVER_RUN, NO_CODE = "the checkpoint asks to run code of its own, which is never done", {"trust_remote_code": False}
READ_BY_MLX_LM = "model*.safetensors"  # whatever the index says

# Whether other models' code may run: in a script of a user's, but not in a process of ours.
trusts_others = True

_load_model, _load_config, _download = utils.load_model, utils.load_config, utils._download


def checked_tokenizer(
    model_path: Path,
    tokenizer_config_extra: dict[str, Any] | None = None,
    eos_token_ids: list[int] | int | None = None,
    defaults: dict[str, Any] | None = None,
) -> Any:
    """Same contract as `mlx_lm.tokenizer_utils.load`; our chat templates run in a process that can be ended."""
    if not _is_ours(model_path):
        options = tokenizer_config_extra if trusts_others else {**(tokenizer_config_extra or {}), **NO_CODE}
        return load(model_path, options, eos_token_ids, defaults)
    tokenizer = make_tokenizer(model_path, tokenizer_config_extra, eos_token_ids, defaults)
    if tokenizer.has_chat_template and tokenizer._chat_template is None:
        tokenizer._chat_template = _renderer(tokenizer)
    return tokenizer


def load_model(model_path: Path, *args: Any, **kwargs: Any) -> Any:
    """Same contract as `mlx_lm.utils.load_model`; a checkpoint of ours must fit its config and this machine's memory."""
    is_ours = _is_ours(model_path)
    if trusts_others and not is_ours:
        return _load_model(model_path, *args, **kwargs)
    try:
        if is_ours:
            # A machine of several may have only its own part, which mlx-lm loads without ``strict``.
            is_whole = kwargs.get("strict", True) and False not in args[1:2]
            _check_weights(model_path, is_whole, is_lazy=kwargs.get("lazy", False) or True in args[:1])
        return _load_model(model_path, *args, **kwargs)
    except RingError:
        raise
    except Exception as e:
        seen = shown(f"{type(e).__name__}: {e}", 1000)
        raise WeightsError(f"mlx-lm cannot load {model_path} ({seen}); download it again.") from e


def load_config(folder: Path) -> dict[str, Any]:
    """Same contract as `mlx_lm.utils.load_config`, but a ``model_file`` is refused."""
    if not trusts_others:
        _check_configs(folder)
    config = _load_config(folder)
    file = config.get("model_file")
    if file is not None and (not trusts_others or _is_our_config(config)):
        raise ConfigError(
            f"config.json in {folder} asks to run {str(file)!r} (model_file), and code in a checkpoint is never run; "
            "remove that key."
        )
    return config


def download(name: str, revision: str | None = None, *args: Any, **kwargs: Any) -> Path:
    """Same contract as `mlx_lm.utils._download`; a HubError if the folder or repository cannot be found or fetched."""
    if trusts_others or Path(name).exists():
        return _download(name, revision, *args, **kwargs)
    if "/" in name and not REPO_ID.match(name):
        raise HubError(f"no such folder {name!r}, and it is not owner/name of a hub repository; check the spelling.")
    with hub_errors(name, revision):
        return _download(name, revision, *args, **kwargs)


def trust_no_code() -> None:
    """Close, for good, every way in which this process could import code of a checkpoint or ask whether to."""
    global trusts_others

    def refuse(name: object, *_: Any, **__: Any) -> Any:
        raise TokenizerError(f"{NEVER_RUN} ({name}); use a checkpoint without it.")

    trusts_others = False
    # Without a time to wait for an answer, transformers does not ask. Whatever it runs, it first fetches by the second.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    dynamic_module_utils.get_cached_module_file = refuse
    dynamic_module_utils.get_class_in_module = refuse


def in_a_line(command: str, error: Exception) -> OptionError:
    """The error of a command of mlx-lm in one line."""
    # mlx-lm knows its commands only inside main, and names them in this message.
    _, found, known = str(error).partition("CLI requires a subcommand in ")
    if found:
        return OptionError(f"mlx-lm has no command {command!r}; give one of {known.strip('()')}.")
    if "trust_remote_code" in str(error):
        return OptionError(f"{NEVER_RUN} ({error}); use a checkpoint without it.")
    seen = shown(f"{type(error).__name__}: {error}", 1000)
    return OptionError(f"mlx-lm {command} failed ({seen}); check its arguments and the files that they name.")


def _is_ours(folder: Path) -> bool:
    try:
        return _is_our_config(utils.load_config(folder))
    except (OSError, ValueError, AttributeError):
        return False


def _is_our_config(config: dict[str, Any]) -> bool:
    try:
        return utils._get_classes(config)[0] is Model
    except (KeyError, ValueError, TypeError):
        return False


def _check_configs(folder: Path) -> None:
    """Refuse settings that are no JSON object or too long, in a ConfigError that names the file."""
    check_small_files(folder)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            read_json(folder / name)


def _check_weights(folder: Path, is_whole: bool, is_lazy: bool) -> None:
    """Check the files of a checkpoint of ours against each other, and against the memory if all will be read."""
    _check_configs(folder)
    if read_headers(sorted(folder.glob(READ_BY_MLX_LM))) and is_whole:
        model, arrays, _, _ = assemble(folder)
        if not is_lazy:
            memory.claim(model.config, memory.weight_bytes(model, arrays), folder.name)


def _renderer(tokenizer: TokenizerWrapper) -> Callable[..., str]:
    def render(
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = False,
        **options: Any,
    ) -> str:
        """The text of a conversation: same contract as a tokenizer's ``apply_chat_template`` without its tokens."""
        return render_text(tokenizer, messages, tools, options, continue_final_message, add_generation_prompt)

    return render
