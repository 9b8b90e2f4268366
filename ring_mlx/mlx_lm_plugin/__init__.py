"""mlx-lm with our model: after `register` its commands and functions build it.

mlx-lm finds a model's classes by the name ``mlx_lm.models.<type>``, after two tables of other names. `register` changes
seven things, and `unregister` takes them back:

- ``sys.modules["mlx_lm.models.ring_linear"]`` is `ring_mlx.mlx_lm_plugin.architecture`. mlx-lm's own
  ``bailing_moe_linear`` can still be imported.
- ``MODEL_REMAPPING`` leads ``bailing_moe_linear`` and ``bailing_moe_v2`` there. - ``MODEL_ARCHITECTURE_REMAPPING``
leads ``bailing_moe`` there if the config names the 2.0 architecture; Ling 1.x has
  the same type and stays with mlx-lm.
- ``mlx_lm.utils._load_tokenizer`` makes our models' tokenizers by `ring_mlx.checkpoint.tokenizer.make_tokenizer`, and
  their chat templates run in a process that can be ended.
- ``mlx_lm.utils.load_model`` checks the files of our models before anything is built of them. -
``mlx_lm.utils.load_config`` refuses a ``model_file``, which mlx-lm would run as the architecture. -
``mlx_lm.utils._download`` says in one line what went wrong.

mlx-lm is imported when it is first used: a script names `ring_mlx.register` before it has it. Other models go through
mlx-lm as before; in `run`, whose process is ours, their code is refused as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ring_mlx.checkpoint.hub import REPO_ID, hub_errors
from ring_mlx.errors import ConfigError, HubError, OptionError, RingError, TokenizerError
from ring_mlx.model.config import LINEAR_TYPES
from ring_mlx.model.config_values import shown

NAME = "ring_linear"
MODULE = f"mlx_lm.models.{NAME}"
TYPES = dict.fromkeys((*LINEAR_TYPES, "bailing_moe_v2"), NAME)
ARCHITECTURES = {("bailing_moe", "BailingMoeV2ForCausalLM"): NAME}
TRUST = "--trust-remote-code"
NEVER_RUN = "the checkpoint asks to run code of its own, which is never done"

_replaced: list[tuple[dict[Any, Any], Any, Any]] = []
_trusts_others = True


def register() -> None:
    """Let mlx-lm build our model; a second call changes nothing."""
    from mlx_lm import utils

    from ring_mlx.mlx_lm_plugin import architecture

    if _replaced:
        return
    _put(sys.modules, MODULE, architecture)
    for model_type, name in TYPES.items():
        _put(utils.MODEL_REMAPPING, model_type, name)
    for pair, name in ARCHITECTURES.items():
        _put(utils.MODEL_ARCHITECTURE_REMAPPING, pair, name)
    _put(vars(utils), "_load_tokenizer", _load_tokenizer)
    _put(vars(utils), "load_model", _model_loader(utils.load_model))
    _put(vars(utils), "load_config", _config_loader(utils.load_config))
    _put(vars(utils), "_download", _downloader(utils._download))


def unregister() -> None:
    """Put mlx-lm back as it was; models that are loaded stay ours."""
    while _replaced:
        where, key, before = _replaced.pop()
        if before is None:
            del where[key]
        else:
            where[key] = before


def run(command: str, arguments: Sequence[str]) -> None:
    """Run a command of mlx-lm, such as ``generate``, with its own arguments, and without code of checkpoints.

    Raises an OptionError if there is no such command, it fails, or a checkpoint's code would have to be run.
    """
    from mlx_lm import cli

    if any(len(a) > len("--t") and TRUST.startswith(a.partition("=")[0]) for a in arguments):
        raise OptionError(f"{TRUST}: code in a checkpoint is never run; leave it out.")
    register()
    _trust_no_code()
    before = sys.argv
    sys.argv = [f"mlx_lm {command}", command, *arguments]
    try:
        if command == "server":
            _load_before_serving()
        cli.main()
    except (RingError, BrokenPipeError, ImportError):
        raise
    except Exception as e:
        raise _in_a_line(command, e) from e
    finally:
        sys.argv = before


def _load_before_serving() -> None:
    """Let mlx-lm's server load its models before it listens: its thread that does so hides a failure."""
    from mlx_lm import server
    from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

    provider: Any = server.ModelProvider

    class Loaded(provider):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.load_default()
            if self.draft_model is not None and not can_trim_prompt_cache(make_prompt_cache(self.model)):
                raise OptionError("--draft-model: this model cannot take tokens back; leave the draft out.")

    _put(vars(server), "ModelProvider", Loaded)


def _in_a_line(command: str, error: Exception) -> OptionError:
    # mlx-lm knows its commands only inside main, and names them in this message.
    _, found, known = str(error).partition("CLI requires a subcommand in ")
    if found:
        return OptionError(f"mlx-lm has no command {command!r}; give one of {known.strip('()')}.")
    if "trust_remote_code" in str(error):
        return OptionError(f"{NEVER_RUN} ({error}); use a checkpoint without it.")
    seen = shown(f"{type(error).__name__}: {error}", 1000)
    return OptionError(f"mlx-lm {command} failed ({seen}); check its arguments and the files that they name.")


def _put(where: dict[Any, Any], key: Any, value: Any) -> None:
    _replaced.append((where, key, where.get(key)))
    where[key] = value


def _load_tokenizer(
    model_path: Path,
    tokenizer_config_extra: dict[str, Any] | None = None,
    eos_token_ids: list[int] | int | None = None,
    defaults: dict[str, Any] | None = None,
) -> Any:
    """Same contract as `mlx_lm.tokenizer_utils.load`."""
    from mlx_lm.tokenizer_utils import load

    from ring_mlx.mlx_lm_plugin.checkpoint import bounded_tokenizer

    if _is_ours(model_path):
        return bounded_tokenizer(model_path, tokenizer_config_extra, eos_token_ids, defaults)
    if _trusts_others:
        return load(model_path, tokenizer_config_extra, eos_token_ids, defaults)
    return load(model_path, {**(tokenizer_config_extra or {}), "trust_remote_code": False}, eos_token_ids, defaults)


def _model_loader(load_model: Callable[..., Any]) -> Callable[..., Any]:
    def load(model_path: Path, *args: Any, **kwargs: Any) -> Any:
        """Same contract as `mlx_lm.utils.load_model`."""
        from ring_mlx.mlx_lm_plugin.checkpoint import errors_in_a_line, load_checked

        if _is_ours(model_path):
            return load_checked(load_model, model_path, *args, **kwargs)
        if _trusts_others:
            return load_model(model_path, *args, **kwargs)
        with errors_in_a_line(model_path):
            return load_model(model_path, *args, **kwargs)

    return load


def _config_loader(load_config: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    def load(folder: Path) -> dict[str, Any]:
        """Same contract as `mlx_lm.utils.load_config`, but a ``model_file`` is refused."""
        from ring_mlx.mlx_lm_plugin.checkpoint import check_configs

        if not _trusts_others:
            check_configs(folder)
        config = load_config(folder)
        file = config.get("model_file")
        if file is not None and (not _trusts_others or _is_our_config(config)):
            raise ConfigError(
                f"config.json in {folder} asks to run {str(file)!r} (model_file), and code in a checkpoint is never "
                "run; remove that key."
            )
        return config

    return load


def _downloader(download: Callable[..., Path]) -> Callable[..., Path]:
    def fetch(name: str, revision: str | None = None, *args: Any, **kwargs: Any) -> Path:
        """Same contract as `mlx_lm.utils._download`; a HubError if the folder or repository cannot be had."""
        if _trusts_others or Path(name).exists():
            return download(name, revision, *args, **kwargs)
        if "/" in name and not REPO_ID.match(name):
            raise HubError(
                f"no such folder {name!r}, and it is not owner/name of a hub repository; check the spelling."
            )
        with hub_errors(name, revision):
            return download(name, revision, *args, **kwargs)

    return fetch


def _trust_no_code() -> None:
    """Close, for good, every way in which this process could import code of a checkpoint or ask whether to."""
    global _trusts_others
    from transformers import dynamic_module_utils

    def refuse(name: object, *_: Any, **__: Any) -> Any:
        raise TokenizerError(f"{NEVER_RUN} ({name}); use a checkpoint without it.")

    _trusts_others = False
    # Without a time to wait for an answer, transformers does not ask. Whatever it runs, it first fetches by the second.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    dynamic_module_utils.get_cached_module_file = refuse
    dynamic_module_utils.get_class_in_module = refuse


def _is_ours(folder: Path) -> bool:
    from mlx_lm import utils

    try:
        return _is_our_config(utils.load_config(folder))
    except (OSError, ValueError, AttributeError):
        return False


def _is_our_config(config: dict[str, Any]) -> bool:
    from mlx_lm import utils

    from ring_mlx.mlx_lm_plugin.architecture import Model

    try:
        return utils._get_classes(config)[0] is Model
    except (KeyError, ValueError, TypeError):
        return False
