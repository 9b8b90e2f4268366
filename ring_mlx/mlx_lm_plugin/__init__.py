"""mlx-lm with our model: after `register` its commands and functions build it; knows where mlx-lm looks, no arrays.

mlx-lm finds a model's classes by the name ``mlx_lm.models.<type>``, after two tables of other names. `register`
changes four things, and `unregister` takes them back:

- ``sys.modules["mlx_lm.models.ring_linear"]`` is `ring_mlx.mlx_lm_plugin.architecture`. mlx-lm's own
  ``bailing_moe_linear`` is neither replaced nor hidden: importing it still gives it.
- ``MODEL_REMAPPING`` leads ``bailing_moe_linear`` and ``bailing_moe_v2`` there.
- ``MODEL_ARCHITECTURE_REMAPPING`` leads ``bailing_moe`` there, where the config names the 2.0 architecture; Ling 1.x
  has the same type and stays with mlx-lm.
- ``mlx_lm.utils._load_tokenizer``, the one function replaced. For our models only it adds ``<|role_end|>`` to the stop
  tokens, without which an answer does not end, and it does not ask to run the checkpoint's code for a config that the
  tokenizer does not need. There is no table for either.

Other models go through mlx-lm as before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ring_mlx.config import LINEAR_TYPES
from ring_mlx.errors import OptionError

NAME = "ring_linear"
MODULE = f"mlx_lm.models.{NAME}"
TYPES = dict.fromkeys((*LINEAR_TYPES, "bailing_moe_v2"), NAME)
ARCHITECTURES = {("bailing_moe", "BailingMoeV2ForCausalLM"): NAME}

_replaced: list[tuple[dict[Any, Any], Any, Any]] = []


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


def unregister() -> None:
    """Put mlx-lm back as it was; models that are loaded stay ours."""
    while _replaced:
        where, key, before = _replaced.pop()
        if before is None:
            del where[key]
        else:
            where[key] = before


def run(command: str, arguments: Sequence[str]) -> None:
    """Run a command of mlx-lm, such as ``generate``, with its own arguments, after `register`.

    Raises:
        OptionError: If mlx-lm has no such command.
        SystemExit: From its parser of arguments.
        Exception: Whatever the command raises.
    """
    from mlx_lm import cli

    register()
    before = sys.argv
    sys.argv = [f"mlx_lm {command}", command, *arguments]
    try:
        cli.main()
    except ValueError as e:
        # mlx-lm knows its commands only inside main, and names them in this message.
        _, found, known = str(e).partition("CLI requires a subcommand in ")
        if not found:
            raise
        raise OptionError(f"mlx-lm has no command {command!r}; give one of {known.strip('()')}.") from None
    finally:
        sys.argv = before


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
    from transformers import PreTrainedConfig

    from ring_mlx.tokenizer import ROLE_END

    if not _is_ours(model_path):
        return load(model_path, tokenizer_config_extra, eos_token_ids, defaults)
    options = {"config": PreTrainedConfig(), **(tokenizer_config_extra or {})}
    tokenizer = load(model_path, options, eos_token_ids, defaults)
    if ROLE_END in tokenizer.get_vocab():
        tokenizer.add_eos_token(ROLE_END)
    return tokenizer


def _is_ours(folder: Path) -> bool:
    from mlx_lm import utils

    from ring_mlx.mlx_lm_plugin.architecture import Model

    try:
        return utils._get_classes(utils.load_config(folder))[0] is Model
    except (OSError, KeyError, ValueError):
        return False
