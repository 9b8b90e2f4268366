"""The checkpoint's tokenizer through mlx-lm's wrapper, with every stop token that its files name; knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_wrapper
from transformers import PreTrainedConfig

from ring_mlx.config import read_json
from ring_mlx.errors import TokenizerError

ROLE_END = "<|role_end|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> TokenizerWrapper:
    """Load the tokenizer of a checkpoint folder.

    It stops on the union of ``eos_token_id`` in config.json and generation_config.json, the tokenizer's own, and
    ``<|role_end|>`` if it is in the vocabulary: config.json alone names only ``<|endoftext|>``.

    Args:
        folder: The checkpoint.

    Returns:
        mlx-lm's wrapper around the transformers tokenizer.

    Raises:
        TokenizerError: If the files are missing or unreadable.
        ConfigError: If config.json or generation_config.json is not JSON.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise TokenizerError(f"no tokenizer in {folder} ({', '.join(TOKENIZER_FILES)}); download it as well.")
    eos = sorted(_named_eos(folder))
    # A config of our own keeps transformers from building one from config.json, whose model type it does not know.
    try:
        tokenizer = load_wrapper(folder, {"config": PreTrainedConfig()}, eos_token_ids=eos)
    except Exception as e:  # noqa: BLE001 transformers raises whatever its parsers raise
        raise TokenizerError(f"the tokenizer in {folder} cannot be read ({e}); download it again.") from None
    vocabulary = tokenizer.get_vocab()
    if ROLE_END in vocabulary:
        tokenizer.eos_token_ids = tokenizer.eos_token_ids | {vocabulary[ROLE_END]}
    return tokenizer


def render_chat(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
    continue_last: bool = False,
) -> list[int]:
    """Messages to token ids through the checkpoint's own template.

    Args:
        tokenizer: From `load_tokenizer`.
        messages: Objects with ``role`` and ``content``.
        tools: Tool descriptions for the template, or None.
        template_options: Further template arguments, such as ``enable_thinking``.
        continue_last: Leave the last (assistant) message open instead of starting a new one.

    Raises:
        TokenizerError: If there is no template, or it refuses the messages.
    """
    text = render_text(tokenizer, messages, tools, template_options, continue_last)
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def render_text(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
    continue_last: bool = False,
) -> str:
    """The text that `render_chat` encodes; same arguments and errors."""
    if not tokenizer.has_chat_template:
        raise TokenizerError("the checkpoint has no chat template; use --ignore-chat-template for plain text.")
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            tools=list(tools) if tools else None,
            add_generation_prompt=not continue_last,
            continue_final_message=continue_last,
            **dict(template_options or {}),
        )
    except Exception as e:  # noqa: BLE001 a template is a program of the checkpoint's author
        raise TokenizerError(f"the chat template refused the messages ({e}); check roles and contents.") from None
    return text


def _named_eos(folder: Path) -> set[int]:
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids
