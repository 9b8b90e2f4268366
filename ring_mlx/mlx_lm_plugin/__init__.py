"""mlx-lm with our model: after `register` its commands and functions build it.

mlx-lm finds a model's classes by the name ``mlx_lm.models.<type>``, after two tables of other names. `register` changes
seven things, and `unregister` takes them back:

- ``sys.modules["mlx_lm.models.ring_linear"]`` is `ring_mlx.mlx_lm_plugin.architecture`. mlx-lm's own
  ``bailing_moe_linear`` can still be imported.
- ``MODEL_REMAPPING`` leads ``bailing_moe_linear`` and ``bailing_moe_v2`` there.
- ``MODEL_ARCHITECTURE_REMAPPING`` leads ``bailing_moe`` there if the config names the 2.0 architecture; Ling 1.x has
  the same type and stays with mlx-lm.
- ``mlx_lm.utils._load_tokenizer`` makes our models' tokenizers by `ring_mlx.checkpoint.tokenizer.make_tokenizer`, and
  their chat templates run in a process that can be ended.
- ``mlx_lm.utils.load_model`` checks the files of our models before anything is built of them.
- ``mlx_lm.utils.load_config`` refuses a ``model_file``, which mlx-lm would run as the architecture.
- ``mlx_lm.utils._download`` says in one line what went wrong.

mlx-lm is imported when it is first used: a script names `ring_mlx.register` before it has it. Other models go through
mlx-lm as before; in `run`, whose process is ours, their code is refused as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ring_mlx.errors import OptionError, RingError
from ring_mlx.model.config import LINEAR_TYPES

NAME = "ring_linear"
MODULE = f"mlx_lm.models.{NAME}"
TYPES = dict.fromkeys((*LINEAR_TYPES, "bailing_moe_v2"), NAME)
ARCHITECTURES = {("bailing_moe", "BailingMoeV2ForCausalLM"): NAME}
TRUST = "--trust-remote-code"

_replaced: list[tuple[dict[Any, Any], Any, Any]] = []


def register() -> None:
    """Let mlx-lm build our model; a second call changes nothing."""
    from mlx_lm import utils

    from ring_mlx.mlx_lm_plugin import architecture, replacements

    if _replaced:
        return
    _put(sys.modules, MODULE, architecture)
    for model_type, name in TYPES.items():
        _put(utils.MODEL_REMAPPING, model_type, name)
    for pair, name in ARCHITECTURES.items():
        _put(utils.MODEL_ARCHITECTURE_REMAPPING, pair, name)
    _put(vars(utils), "_load_tokenizer", replacements.checked_tokenizer)
    _put(vars(utils), "load_model", replacements.load_model)
    _put(vars(utils), "load_config", replacements.load_config)
    _put(vars(utils), "_download", replacements.download)


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

    from ring_mlx.mlx_lm_plugin.replacements import in_a_line, trust_no_code

    if any(len(a) > len("--t") and TRUST.startswith(a.partition("=")[0]) for a in arguments):
        raise OptionError(f"{TRUST}: code in a checkpoint is never run; leave it out.")
    register()
    trust_no_code()
    before = sys.argv
    sys.argv = [f"mlx_lm {command}", command, *arguments]
    try:
        if command == "server":
            _load_before_serving()
        cli.main()
    except (RingError, BrokenPipeError, ImportError):
        raise
    except Exception as e:
        raise in_a_line(command, e) from e
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


def _put(where: dict[Any, Any], key: Any, value: Any) -> None:
    _replaced.append((where, key, where.get(key)))
    where[key] = value
