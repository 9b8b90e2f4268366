"""mlx-lm's samplers and processors from a request's `Sampling`; knows no screen and no command line."""

from __future__ import annotations

import secrets

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.decoding import LogitsProcessor, Sampler
from ring_mlx.errors import OptionError
from ring_mlx.session_events import Sampling


def start_sampling(
    s: Sampling, vocabulary: int, tokenizer: TokenizerWrapper
) -> tuple[Sampler, list[LogitsProcessor], int]:
    """Sampler, processors and the seed that MLX's random numbers have been set to.

    Raises:
        OptionError: If a value cannot work with the vocabulary.
    """
    if s.top_k >= vocabulary or s.top_k < 0:
        raise OptionError(f"top k {s.top_k} is not below the vocabulary of {vocabulary}; give 0 for all.")
    if s.temp < 0 or not 0 <= s.top_p <= 1 or not 0 <= s.min_p <= 1:
        raise OptionError(f"temp {s.temp}, top p {s.top_p} or min p {s.min_p} is out of range; give 0 to 1.")
    for token in s.logit_bias or {}:
        if not 0 <= token < vocabulary:
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
