"""What commands reuse of prompts that were read before: snapshots on disk, and a saved prompt as a file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.cli import from_options
from ring_mlx.engine.events import SessionOptions
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.reading import PromptReader
from ring_mlx.engine.snapshots import SnapshotTree
from ring_mlx.errors import CacheFileError
from ring_mlx.generation.templates import render_text
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.model import Model
from ring_mlx.options import store_of
from ring_mlx.system.terminal_text import note

QUERY = "ring-mlx query"


def open_reader(
    args: argparse.Namespace, model: Model, tokenizer: TokenizerWrapper, name: str, has_store: bool = True
) -> PromptReader:
    """A reader for one prompt, which starts from the snapshots on disk that sessions and servers keep too.

    Raises OptionError if keys and values cannot be quantized as the options say.
    """
    options = SessionOptions(
        model=name,
        kv_quantization=from_options.make_kv_quantization(args),
        prefill_step_tokens=args.prefill_step_size,
        store=has_store and store_of(args),
        store_budget_bytes=args.store_size,
    )
    loaded = LoadedModel(model, tokenizer, options)
    store = loaded.store()
    tree = SnapshotTree(0) if store is None else loaded.tree()
    if store is not None:
        tree.save_first = store.save_dropped
    return loaded.reader(tree, store)


def load_prompt(reader: PromptReader, path: str, model: Model) -> list[int]:
    """Go on from a file of ``ring-mlx cache-prompt``; returns its tokens.

    Raises CacheFileError as `HybridCache.load`.
    """
    cache, ids, _ = HybridCache.load(path, model.fingerprint, model.cache_shapes)
    if reader.kv_quantization is not None or any(isinstance(c, QuantizedKVCache) for c in cache):
        reader.leave_disk()  # which holds snapshots of one form only
    reader.adopt(cache, ids)
    return ids


def save(reader: PromptReader) -> None:
    """Write to disk what the next prompts may start with; a disk that cannot be written costs a line."""
    error = reader.try_to_save()
    if error is not None:
        note(f"{error} Nothing is saved.")


def text_after_cached(
    tokenizer: TokenizerWrapper, messages: list[dict[str, str]], options: Mapping[str, Any], continue_last: bool
) -> str:
    """What the template puts after the cached part of the user's message, that message's text included.

    A cached prompt ends within the user's message, so all that the template puts before it is in the cache. Raises
    CacheFileError if the template rewrites the user's text, so that the place cannot be found.
    """
    user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    marked = [m | {"content": QUERY} if i == user else m for i, m in enumerate(messages)]
    rendered = render_text(tokenizer, marked, None, options, continue_last)
    _, found, after = rendered.rpartition(QUERY)
    if not found:
        raise CacheFileError("the chat template hides the user's text; use --ignore-chat-template with the cache.")
    return messages[user]["content"] + str(after)
