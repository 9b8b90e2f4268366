"""Checks our checkpoints before mlx-lm reads them, and turns its errors into one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.loading import assemble
from ring_mlx.checkpoint.regular_files import check_small_files, read_json
from ring_mlx.checkpoint.shards import read_headers
from ring_mlx.checkpoint.tokenizer import make_tokenizer
from ring_mlx.errors import RingError, TokenizerError, WeightsError
from ring_mlx.generation import templates
from ring_mlx.model.config_values import shown
from ring_mlx.system import memory

READ_BY_MLX_LM = "model*.safetensors"  # whatever the index says


def check_configs(folder: Path) -> None:
    """Refuse settings that are no JSON object or too long, in a ConfigError that names the file."""
    check_small_files(folder)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            read_json(folder / name)


def load_checked(load_model: Callable[..., Any], folder: Path, *args: Any, **kwargs: Any) -> Any:
    """`mlx_lm.utils.load_model` of a checkpoint of ours, if its files fit each other and this machine's memory."""
    is_lazy = kwargs.get("lazy", False) or True in args[:1]
    with errors_in_a_line(folder):
        # A machine of several may have only its own part, which mlx-lm loads without ``strict``.
        check_weights(folder, kwargs.get("strict", True) and False not in args[1:2], is_read=not is_lazy)
        return load_model(folder, *args, **kwargs)


def check_weights(folder: Path, whole: bool = True, is_read: bool = False) -> None:
    """Check the files of a checkpoint of ours, if it is ``whole``, against each other.

    If the model ``is_read``, it must fit into memory.
    """
    check_configs(folder)
    found = read_headers(sorted(folder.glob(READ_BY_MLX_LM)))
    if found and whole:
        model, arrays, _, _ = assemble(folder)
        if is_read:
            memory.claim(model.config, memory.weight_bytes(model, arrays), folder.name)


@contextmanager
def errors_in_a_line(folder: Path) -> Iterator[None]:
    """Turn what mlx-lm raises over a checkpoint into one line, a WeightsError; our own errors pass."""
    try:
        yield
    except RingError:
        raise
    except Exception as e:
        seen = shown(f"{type(e).__name__}: {e}", 1000)
        raise WeightsError(f"mlx-lm cannot load {folder} ({seen}); download it again.") from e


def bounded_tokenizer(
    folder: Path,
    options: Mapping[str, Any] | None = None,
    eos_token_ids: list[int] | int | None = None,
    defaults: dict[str, Any] | None = None,
) -> TokenizerWrapper:
    """`make_tokenizer` whose chat template is rendered by a process that can be ended."""
    tokenizer = make_tokenizer(folder, options, eos_token_ids, defaults)
    if tokenizer.has_chat_template and tokenizer._chat_template is None:
        tokenizer._chat_template = _renderer(tokenizer)
    return tokenizer


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
        try:
            return templates.render(
                tokenizer, messages, tools, options, continue_final_message, add_generation_prompt=add_generation_prompt
            )
        except (ValueError, TypeError) as e:
            raise TokenizerError(f"the chat template refused the messages ({e}); check roles and contents.") from None

    return render
