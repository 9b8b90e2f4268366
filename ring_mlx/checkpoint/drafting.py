"""A model and a smaller one that drafts for it: both with the same tokens, and both in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.loading import load_model
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.errors import TokenizerError
from ring_mlx.model import memory
from ring_mlx.model.config import read_config
from ring_mlx.model.config_values import shown
from ring_mlx.model.model import Model
from ring_mlx.system.progress import Progress

OTHER = "give a draft model of the same family, or leave it out"


def load_with_draft(
    folder: Path,
    draft_folder: Path,
    progress: Callable[[str], AbstractContextManager[Progress | None]],
    claim: Callable[..., object] = memory.claim,
    **options: Any,
) -> tuple[Model, TokenizerWrapper, Model]:
    """A model, its tokenizer, and the model that drafts for it.

    Tokens are compared first, then the smaller model is loaded, so that the other is refused before its weights are read where
    both do not fit.

    Args:
        progress: Makes a bar of a label for each model.
        claim: As of `load_model`, for both models.
        **options: Of `load_model`, for the model that is drafted for.

    Raises:
        RingError: As `ring_mlx.load`; TokenizerError also where the tokens differ.
    """
    tokenizer = load_tokenizer(folder)
    check_same(tokenizer, load_tokenizer(draft_folder), draft_folder.name)
    rows, draft_rows = (read_config(f)[0].vocab_size for f in (folder, draft_folder))
    if rows != draft_rows:
        raise TokenizerError(f"{draft_folder.name} has rows for {draft_rows} tokens, and the model {rows}; {OTHER}.")
    with progress("loading the draft model") as bar:
        draft = load_model(draft_folder, progress=bar, claim=claim)
    with progress("loading the model") as bar:
        beside = memory.held_bytes(draft)
        model = load_model(folder, progress=bar, claim=partial(claim, beside_bytes=beside), **options)
    return model, tokenizer, draft


def check_same(tokenizer: TokenizerWrapper, drafting: TokenizerWrapper, name: str) -> None:
    """Refuse a draft model whose ids mean other tokens. Raises a TokenizerError that names the first difference."""
    ours, theirs = _tokens(tokenizer), _tokens(drafting)
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            raise TokenizerError(
                f"token {i} is {_said(theirs.get(i))} in the draft model {name}, and {_said(ours.get(i))} in the model; {OTHER}."
            )


def _tokens(tokenizer: TokenizerWrapper) -> dict[int, tuple[str, bool]]:
    """The token of each id, and whether it is special."""
    tokens = {i: (token, False) for token, i in tokenizer.get_vocab().items()}
    added = tokenizer._tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return tokens | {i: (token.content, bool(token.special)) for i, token in added.items()}


def _said(token: tuple[str, bool] | None) -> str:
    return "nothing" if token is None else f"{shown(token[0])}{' (special)' * token[1]}"
