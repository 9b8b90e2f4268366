"""The divergence of a model's predictions from a reference model's on one text.

`ring_mlx.convert.report` does the same a layer at a time, for models that do not fit into memory together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.shards import safetensors_in
from ring_mlx.errors import NoFitError, OptionError
from ring_mlx.evaluation.scoring import scored_logits, windows
from ring_mlx.generation.divergence import HEAD_TOKENS, Divergence, divergence, summary
from ring_mlx.model.model import Model
from ring_mlx.system import memory
from ring_mlx.system.pace import Progress


def check_same_tokens(ours: TokenizerWrapper, theirs: TokenizerWrapper, text: str, name: str) -> None:
    """Refuse a reference that reads the text as other tokens.

    Raises:
        OptionError: If it does.
    """
    if list(ours.encode(text)) != list(theirs.encode(text)):
        raise OptionError(f"--kl {name} splits the text into other tokens; give a model of the same tokenizer.")


def check_both_fit(model: Model, reference: Path) -> None:
    """Refuse, before it is read, a reference that memory cannot hold beside the model.

    Raises:
        NoFitError: Naming both sizes and the way to compare them all the same.
    """
    ours = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    theirs, room = sum(f.stat().st_size for f in safetensors_in(reference)), memory.budget_bytes()
    if ours + theirs + memory.WORKSPACE_BYTES > room:
        raise NoFitError(
            f"this model takes {ours / memory.GB:.1f} GB and {reference.name} {theirs / memory.GB:.1f} GB, but this "
            f"machine can give {room / memory.GB:.1f} GB; compare a conversion with its source layer by layer with "
            "`ring-mlx convert --report`."
        )


def diverge(
    model: Model,
    reference: Model,
    ids: Sequence[int],
    window: int,
    stride: int,
    progress: Progress | None = None,
) -> Divergence:
    """Read a text with both models in the windows of `perplexity.perplexity`.

    Args:
        model: What is judged.
        reference: What it is held against, of the same vocabulary.
        ids: The text's tokens.
        window, stride, progress: As for `perplexity.perplexity`.

    Raises:
        OptionError: If the vocabularies differ, or as for `scoring.windows`.
    """
    sizes = model.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise OptionError(f"--kl compares vocabularies of {sizes[0]} and {sizes[1]} tokens; give a model of the same.")
    found = []
    for start, first, end in windows(len(ids), window, stride):
        both = (scored_logits(m, ids[start:end], first - start) for m in (reference, model))
        for (left, targets), (right, _) in zip(*both, strict=True):
            for at in range(0, left.shape[0], HEAD_TOKENS):
                rows = slice(at, at + HEAD_TOKENS)
                found.append(divergence(left[rows], right[rows], targets[rows]))
        if progress:
            progress(end - 1, len(ids) - 1)
    return summary(found)


def table(found: Divergence, reference: str) -> str:
    """As text."""
    return (
        f"KL({reference} || this): mean {found.kl_mean:.6f}, median {found.kl_median:.6f}, 99 % {found.kl_99:.6f} nats "
        f"over {found.tokens:,} tokens; same likeliest token {found.top1_agreement:.2%}; perplexity "
        f"{found.perplexity:.4f}, the reference's {found.reference_perplexity:.4f}"
    )
