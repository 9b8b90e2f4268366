"""A saved prompt as a file: which tokens, of which text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.tokenizer import render_text
from ring_mlx.errors import CacheFileError

QUERY = "ring-mlx query"


def text_after_cached(
    tokenizer: TokenizerWrapper, messages: list[dict[str, str]], options: Mapping[str, Any], continue_last: bool
) -> str:
    """What the template puts after the cached part of the user's message, that message's text included.

    A cached prompt ends within the user's message, so all that the template puts before it is in the cache.

    Raises:
        CacheFileError: If the template rewrites the user's text, so that the place cannot be found.
    """
    user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    marked = [m | {"content": QUERY} if i == user else m for i, m in enumerate(messages)]
    rendered = render_text(tokenizer, marked, None, options, continue_last)
    _, found, after = rendered.rpartition(QUERY)
    if not found:
        raise CacheFileError("the chat template hides the user's text; use --ignore-chat-template with the cache.")
    return messages[user]["content"] + str(after)
