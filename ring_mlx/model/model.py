"""The hybrid model: tokens and a cache in, logits out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import ArraysCache, BatchKVCache

from metal_kernels import Matrices, choices, embed, head, launch
from ring_mlx.generation.defaults import FAMILY
from ring_mlx.model.cache import HybridCache, make_kv_cache
from ring_mlx.model.cache_shapes import Shapes
from ring_mlx.model.config import RingConfig
from ring_mlx.model.decode_step import MOST_TOKENS, DecodeStep, compiled, is_worthwhile
from ring_mlx.model.kernel_weights import KernelMatrices
from ring_mlx.model.layer import DecoderLayer

# Tokens of a call from which layers are computed one after the other, and how many may be under way.
LONG_FROM_TOKENS = 512
LAYERS_UNDER_WAY = 2
# Rows to which the head's input is filled up where MLX multiplies it. On an H200 MLX's packed product of mini's head takes
# 171 us a row up to seven, and 103 us for eight, which go through its matrix units.
FILLED_ROWS = {"cuda": 8}


class FewTokens:
    """A kernel before or after the layers, for a few tokens; compiled for the present weights and choices.

    Args:
        operation: Takes tokens or the residual stream, the matrix, and what `__call__` is given besides.
        choice: By which `choices` may prefer MLX.
    """

    def __init__(self, operation: Callable[..., mx.array | None], choice: str) -> None:
        self._operation, self._choice = operation, choice
        self._matrices = KernelMatrices()
        self._held: tuple[Any, ...] = ()
        self._chosen: tuple[Any, ...] = ()
        self._runs: dict[int, Callable[[mx.array], mx.array | None] | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FewTokens:
        """Of a copied model; what is compiled cannot be copied."""
        return FewTokens(self._operation, self._choice)

    def __call__(self, x: mx.array, matrix: nn.Module, weight: mx.array, constant: object) -> mx.array | None:
        """The operation for x [B, T, ...], or None where MLX's are used."""
        where, tokens = launch.backend(), x.shape[0] * x.shape[1]
        matrices = None if where is None or tokens > MOST_TOKENS else self._matrices(matrix)
        if where is None or matrices is None:
            return None
        held, chosen = (matrices, weight), (where, where.ledger and where.ledger.turned_off, choices.active(), constant)
        if chosen != self._chosen or not all(map(is_, held, self._held)):
            self._held, self._chosen, self._runs = held, chosen, {}
        if tokens not in self._runs:
            self._runs[tokens] = self._made(x, matrices, weight, constant)
        run = self._runs[tokens]
        return None if run is None else run(x)

    def _made(
        self, x: mx.array, matrices: Matrices, weight: mx.array, constant: object
    ) -> Callable[[mx.array], mx.array | None] | None:
        """None where a kernel is not preferred, or does not take such arguments."""

        def run(x: mx.array) -> mx.array | None:
            return self._operation(x, matrices, weight, constant)

        if not choices.ours(self._choice, x.shape[0] * x.shape[1]) or run(x) is None:
            return None
        if not is_worthwhile():
            return run
        mx.eval(weight, matrices.leaves)  # in memory, to be constants of what is compiled
        return compiled(run)


def _embed(tokens: mx.array, matrices: Matrices, weight: mx.array, exact: object) -> mx.array | None:
    return embed(tokens, matrices.first, mx.float32 if exact else weight.dtype)


def _head(x: mx.array, matrices: Matrices, weight: mx.array, eps: Any) -> mx.array | None:
    return head(x, weight, eps, matrices)


class LanguageModel(nn.Module):
    """Embedding, layers and final norm; attribute names are those of the checkpoints."""

    def __init__(self, config: RingConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._step: DecodeStep | None = None
        self._embed = FewTokens(_embed, "embed")

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        hidden_states: list[mx.array] | None = None,
        exact: bool = False,
        last_only: bool = False,
    ) -> mx.array:
        """Run all layers; arguments as of `Model`, with ``exact`` to keep the residual stream in float32.

        Returns the normed residual stream [B, T, hidden], or [B, 1, hidden] with ``last_only``.
        """
        return self.norm(self.before_norm(tokens, cache, hidden_states, exact, last_only))

    def before_norm(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        hidden_states: list[mx.array] | None = None,
        exact: bool = False,
        last_only: bool = False,
    ) -> mx.array:
        """The same before the last norm."""
        return self._through(self.embedded(tokens, exact), cache, hidden_states, last_only)

    def embedded(self, tokens: mx.array, exact: bool) -> mx.array:
        """The residual stream [B, T, hidden] before the first layer."""
        weight = self.norm.weight
        found = None if self.training else self._embed(tokens, self.word_embeddings, weight, exact)
        if found is not None:
            return found
        # MLX gives rows of some packed embeddings in bfloat16, whatever the other weights are.
        return self.word_embeddings(tokens).astype(mx.float32 if exact else weight.dtype)

    def _through(
        self, x: mx.array, cache: Sequence[Any] | None, hidden_states: list[mx.array] | None, last_only: bool
    ) -> mx.array:
        """The residual stream from before the first layer to after the last; the caches move on."""
        caches = [None] * len(self.layers) if cache is None else list(cache)
        T = x.shape[1]
        masks, offset = _masks(self.layers, caches, x)
        step = self._decode_step() if hidden_states is None else None
        if step is not None and step.accepts(x, caches):
            x = step(x, caches, masks, offset)
        else:
            with launch.use(None) if self.training else nullcontext():  # kernels have no gradients
                x = self._advance(x, caches, masks, offset, hidden_states, last_only)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            if layer.is_linear and layer_cache is not None:
                layer_cache.advance(T)
        return x

    def _advance(
        self,
        x: mx.array,
        caches: Sequence[Any],
        masks: dict[bool, Any],
        offset: int | mx.array,
        hidden_states: list[mx.array] | None,
        last_only: bool,
    ) -> mx.array:
        """The layers one by one; a long prompt is computed as it goes, lest all layers' temporaries be alive."""
        is_long = x.shape[0] * x.shape[1] >= LONG_FROM_TOKENS and caches[-1] is not None and not self.training
        under_way: deque[mx.array] = deque()
        if hidden_states is not None:
            hidden_states.append(x)
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            is_last = i == len(self.layers) - 1
            x = layer(x, masks[layer.is_linear], cache, offset, last_only and is_last and hidden_states is None)
            if hidden_states is not None:
                hidden_states.append(x)
            elif is_long and not is_last:
                mx.async_eval(x)
                under_way.append(x)
                if len(under_way) > LAYERS_UNDER_WAY:
                    mx.eval(under_way.popleft())
        return x

    def _decode_step(self) -> DecodeStep | None:
        """The compiled decode step, rebuilt if `layers` or choices were replaced; None when compiling does not pay."""
        if self.training or not is_worthwhile():
            return None
        step = self._step
        if step is None or step.layers is not self.layers or step.chosen != choices.active():
            self._step = DecodeStep(self.layers)
        return self._step


class Model(nn.Module):
    """A Ring-linear model, or a softmax sibling, as one callable.

    Args:
        config: The checked configuration.
        exact: Residual stream, norms and head in float32 as well (router, state, decay and the sum over experts
            always are), as section 5.2 of arXiv 2510.19338 asks for training and inference to agree.
    """

    def __init__(self, config: RingConfig, exact: bool = False) -> None:
        super().__init__()
        self.config, self.exact = config, exact
        self.model_type = config.model_type
        self.fingerprint = ""
        self.sampling = FAMILY  # what holds where nobody says otherwise
        self.model = LanguageModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._head = FewTokens(_head, "head")

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        *,
        hidden_states: list[mx.array] | None = None,
        last_only: bool = False,
    ) -> mx.array:
        """Logits of the next token after every position.

        Args:
            tokens: [B, T] integer ids.
            cache: From `make_cache`, or a list of mlx-lm caches; updated in place. None computes from scratch.
            hidden_states: If given, the residual stream [B, T, hidden] after the embedding and after each layer is
                appended.
            last_only: Only the last position goes through the head.

        Returns:
            Logits [B, T, vocab], or [B, 1, vocab] with ``last_only``; float32 if ``exact``.
        """
        x = self.model.before_norm(tokens, cache, hidden_states, self.exact, last_only)
        return self.logits(x[:, -1:] if last_only else x)

    def logits(self, x: mx.array) -> mx.array:
        """The last norm and the head for the residual stream x [B, T, hidden]: [B, T, vocab]."""
        norm, is_tied = self.model.norm, self.config.tie_word_embeddings
        matrix = self.model.word_embeddings if is_tied else self.lm_head
        found = None if self.training else self._head(x, matrix, norm.weight, norm.eps)
        if found is not None:
            return found
        x, multiply = norm(x), matrix.as_linear if is_tied else matrix
        rows = x.shape[0] * x.shape[1]
        if not 1 < rows < FILLED_ROWS.get(choices.where(), 0):
            return multiply(x)
        filled = mx.pad(x.reshape(rows, -1), [(0, FILLED_ROWS[choices.where()] - rows), (0, 0)])
        return multiply(filled)[:rows].reshape(*x.shape[:-1], -1)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, as mlx-lm's tools expect to find them."""
        return self.model.layers

    @property
    def cache_shapes(self) -> Shapes:
        """The shapes of what `make_cache` makes, for caches and snapshots that come from files."""
        softmax = next(layer for layer in self.layers if not layer.is_linear)
        return Shapes(
            tuple(layer.is_linear for layer in self.layers),
            softmax.attention.num_heads,
            softmax.attention.num_key_value_heads,
            self.config.head_dim,
            self.config.vocab_size,
            softmax.input_layernorm.weight.dtype,
            self.config.context_tokens,
        )

    def make_cache(self, left_padding: Sequence[int] | None = None) -> HybridCache:
        """An empty cache for one sequence, or for a batch of rows that may differ in length.

        Args:
            left_padding: Padding tokens before each row's first token, [B] (zeros where a batch has none); padding
                neither enters nor decays a state, and no token attends to it. None makes a cache for one sequence.
        """
        if left_padding is None:
            return HybridCache(ArraysCache(size=1) if layer.is_linear else make_kv_cache() for layer in self.layers)
        pads = list(left_padding)
        return HybridCache(
            ArraysCache(size=1, left_padding=pads) if layer.is_linear else BatchKVCache(pads) for layer in self.layers
        )


def _masks(layers: list[DecoderLayer], caches: list[Any], x: mx.array) -> tuple[dict[bool, Any], int | mx.array]:
    """The masks of softmax (False) and linear (True) layers, and the position of the first token.

    Every model has a softmax layer (the last of a group, or the tail); its cache knows the position.
    """
    softmax = next(c for layer, c in zip(layers, caches, strict=True) if not layer.is_linear)
    linear = next((c for layer, c in zip(layers, caches, strict=True) if layer.is_linear), None)
    causal = create_attention_mask(x, softmax)
    if softmax is None:
        return {False: causal, True: None}, 0
    if isinstance(causal, mx.array) and not getattr(softmax, "is_ragged", False):
        # A query in the padding may look at itself, so that no row of the softmax is empty. Ragged rows have no such query.
        T, L = causal.shape[-2:]
        causal = causal | mx.eye(T, L, k=L - T, dtype=mx.bool_)
    return {False: causal, True: None if linear is None else linear.make_mask(x.shape[1])}, softmax.offset
