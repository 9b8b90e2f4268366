"""mlx-lm's samplers and processors from a request's `Sampling`."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler, make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.engine.events import Sampling
from ring_mlx.errors import OptionError
from ring_mlx.generation.decoding import LogitsProcessor, Sampler
from ring_mlx.generation.defaults import FAMILY, filled
from ring_mlx.generation.sampling_ranges import RANGES, OutOfRangeError

# Below it a difference of a millionth in two logits decides, which float32 does not tell.
LEAST_TEMP = 1e-6
VERY_UNLIKELY = -1e9
GOLDEN = 0x9E3779B97F4A7C15


def start_sampling(
    s: Sampling, vocabulary: int, tokenizer: TokenizerWrapper, defaults: Sampling = FAMILY
) -> tuple[Sampler, list[LogitsProcessor], int]:
    """Sampler, processors and the seed; the n-th token depends only on seed and n, not on other random draws.

    Settings that are not given come from the model's ``defaults``. Raises OptionError if a value cannot work with the vocabulary.
    """
    s = _checked(filled(s, defaults), vocabulary)
    seed = secrets.randbelow(1 << 32) if s.seed is None else s.seed % (1 << 64)
    sampler = make_sampler(
        0.0 if _is_greedy(s, vocabulary) else s.temp,
        s.top_p,
        s.min_p,
        min(s.min_tokens_to_keep, vocabulary),
        top_k=s.top_k,
        xtc_probability=s.xtc_probability,
        xtc_threshold=s.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n", add_special_tokens=False) + sorted(tokenizer.eos_token_ids),
    )
    processors: list[LogitsProcessor] = make_logits_processors(
        dict(s.logit_bias) if s.logit_bias else None,
        *(s.repetition_penalty, s.repetition_context_size),
        *(s.presence_penalty, s.presence_context_size),
        *(s.frequency_penalty, s.frequency_context_size),
    )
    return sampler if sampler is greedy_sampler else SeededSampler(sampler, seed), processors, seed


def without(ids: Iterable[int], vocabulary: int, before: int) -> LogitsProcessor:
    """A processor with which these tokens do not come while fewer than ``before`` tokens, the prompt's included, are there.

    They only become very unlikely, so that one comes where nothing else may.
    """
    wanted = mx.zeros((vocabulary,), dtype=mx.bool_)
    wanted[mx.array(sorted(ids))] = True

    def process(seen: mx.array, logits: mx.array) -> mx.array:
        return mx.where(wanted, VERY_UNLIKELY, logits) if seen.size < before else logits

    return process


class SeededSampler:
    """A sampler whose n-th draw depends only on the seed and n; ``drawn`` counts them."""

    def __init__(self, sampler: Sampler, seed: int) -> None:
        self._sampler, self._seed, self.drawn = sampler, seed, 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities [B, vocab] to ids [B]."""
        mx.random.seed((self._seed + self.drawn * GOLDEN) % (1 << 64))
        self.drawn += 1
        return self._sampler(logprobs)


def _is_greedy(s: Sampling, vocabulary: int) -> bool:
    """Whether only the likeliest token remains; its probability is more than 1 / vocabulary.

    mlx-lm takes a ``top_p`` of 0 for all tokens, and rounds smaller ones, and what it divides by, to 0.
    """
    assert s.temp is not None
    assert s.top_p is not None
    return s.temp < LEAST_TEMP or s.top_p * vocabulary <= 1


def _checked(s: Sampling, vocabulary: int) -> Sampling:
    """The same with whole numbers as ints."""
    values: dict[str, Any] = {}
    try:
        for f in fields(Sampling):
            value = getattr(s, f.name)
            if f.name != "logit_bias" and not (value is None and f.default is None):
                values[f.name] = RANGES[f.name].check(value)
        for value in (s.logit_bias or {}).values():
            RANGES["logit_bias"].check(value)
    except OutOfRangeError as e:
        raise OptionError(f"{e}; give one.") from None
    if (s.top_k or 0) >= vocabulary:
        raise OptionError(f"top_k {s.top_k} is not below the vocabulary of {vocabulary}; give 0 for all.")
    for token in s.logit_bias or {}:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise OptionError(f"logit bias for token {token}, which is not below {vocabulary}; give token ids.")
    return replace(s, **values)
