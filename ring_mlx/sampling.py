"""mlx-lm's samplers and processors from a request's `Sampling`."""

from __future__ import annotations

import secrets

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.decoding import LogitsProcessor, Sampler
from ring_mlx.errors import OptionError
from ring_mlx.session_events import Sampling

RANGES = {
    "temp": (0, 1e6),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "min_tokens_to_keep": (1, 1e9),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
    "repetition_penalty": (0, 1e6),
    "seed": (0, 2**64 - 1),
}


def start_sampling(
    s: Sampling, vocabulary: int, tokenizer: TokenizerWrapper
) -> tuple[Sampler, list[LogitsProcessor], int]:
    """Sampler, processors and the seed that MLX's random numbers have been set to.

    Raises:
        OptionError: If a value cannot work with the vocabulary.
    """
    if s.top_k >= vocabulary or s.top_k < 0:
        raise OptionError(f"top k {s.top_k} is not below the vocabulary of {vocabulary}; give 0 for all.")
    for name, (low, high) in RANGES.items():
        value = getattr(s, name)
        if value is not None and not low <= value <= high:
            raise OptionError(f"{name} {value} is not between {low:g} and {high:g}; give a value that is.")
    for token in s.logit_bias or {}:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise OptionError(f"logit bias for token {token}, which is not below {vocabulary}; give token ids.")
    seed = secrets.randbelow(1 << 32) if s.seed is None else s.seed
    mx.random.seed(seed)
    sampler: Sampler = make_sampler(
        s.temp,
        s.top_p,
        s.min_p,
        s.min_tokens_to_keep,
        top_k=s.top_k,
        xtc_probability=s.xtc_probability,
        xtc_threshold=s.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n", add_special_tokens=False) + sorted(tokenizer.eos_token_ids),
    )
    processors: list[LogitsProcessor] = make_logits_processors(
        dict(s.logit_bias) if s.logit_bias else None,
        s.repetition_penalty,
        s.repetition_context_size,
        s.presence_penalty,
        s.presence_context_size,
        s.frequency_penalty,
        s.frequency_context_size,
    )
    return sampler, processors, seed
