"""A model run one layer at a time, its weights read, used and dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ring_mlx.checkpoint import weights
from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.convert import remote
from ring_mlx.convert.encoding import CHUNK_WEIGHTS
from ring_mlx.convert.plan import uses
from ring_mlx.convert.sources import Source, as_matrix, matrices, parameter_shapes
from ring_mlx.model.model import Model
from ring_mlx.model.quantization import loadable_settings

# Matrices of a layer that read the residual stream, but for the routed experts, and the norm before each.
READERS = {
    "attention.query_key_value": "input_layernorm",
    "attention.g_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.shared_experts.gate_proj": "post_attention_layernorm",
    "mlp.shared_experts.up_proj": "post_attention_layernorm",
}


class Stream:
    """A model without weights, and where to get them; layers compute in ``dtype``, the residual stream is float32."""

    def __init__(self, source: Source, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self._model = Model(source.config)
        self._head: tuple[nn.Module, Any] | None = None

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """Parameters whose names start with ``prefix``, without it."""
        raise NotImplementedError

    def close(self) -> None:
        """Close files."""

    def embed(self, batches: Sequence[mx.array], arrays: Mapping[str, mx.array] | None = None) -> list[mx.array]:
        """The residual stream [B, T, hidden] float32 of each batch of tokens [B, T].

        ``arrays`` are parameters by name, to be used instead of the stream's own, here and in `advance`.
        """
        embedding = self._model.model.word_embeddings
        embedding.load_weights(self._parameters("model.word_embeddings.", arrays))
        states = [embedding(tokens).astype(mx.float32) for tokens in batches]
        mx.eval(states)
        if not self._model.config.tie_word_embeddings:
            self._model.model.word_embeddings = None
        return states

    def layer(self, layer: int, arrays: Mapping[str, mx.array] | None = None) -> Any:
        """A layer with its parameters."""
        module: Any = self._model.layers[layer]
        module.load_weights(self._parameters(f"model.layers.{layer}.", arrays))
        return module.eval()

    def advance(self, layer: int, states: list[mx.array], arrays: Mapping[str, mx.array] | None = None) -> None:
        """Take every batch through a layer, in place; the layer is gone then."""
        layers: list[Any] = self._model.layers
        module = self.layer(layer, arrays)
        layers[layer] = None
        mask = None if module.is_linear else "causal"
        for i, x in enumerate(states):
            states[i] = module(x, mask, None, 0)
            mx.eval(states[i])
        del module
        mx.clear_cache()

    def _parameters(self, prefix: str, arrays: Mapping[str, mx.array] | None) -> list[tuple[str, mx.array]]:
        if arrays is None:
            return list(self.arrays(prefix).items())
        return [(name.removeprefix(prefix), a) for name, a in arrays.items() if name.startswith(prefix)]

    def logits(self, x: mx.array) -> mx.array:
        """Logits [..., vocab] float32 of the last residual stream [..., hidden]; the head stays loaded."""
        if self._head is None:
            norm = self._model.model.norm
            norm.load_weights(list(self.arrays("model.norm.").items()))
            if self._model.config.tie_word_embeddings:
                self._head = norm, self._model.model.word_embeddings.as_linear
            else:
                self._model.lm_head.load_weights(list(self.arrays("lm_head.").items()))
                self._head = norm, self._model.lm_head
        norm, head = self._head
        return head(norm(x).astype(self.dtype)).astype(mx.float32)


class LoadedStream(Stream):
    """A checkpoint as the loader takes it, quantized or not."""

    def __init__(self, source: Source, dtype: mx.Dtype) -> None:
        super().__init__(source, dtype)
        self._entries, self._experts = weights.canonical(source.tensors, source.config), source.config.num_experts
        if (quantization := loadable_settings(source.raw)) is not None:
            weights.quantize_like(self._model, quantization, self.arrays(""))

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """As `Stream.arrays`, unread."""
        entries = {n: e for n, e in self._entries.items() if n.startswith(prefix)}
        loaded = weights.load_arrays(entries, self._experts, self.dtype)
        return {n.removeprefix(prefix): a for n, a in loaded.items()}


class FloatStream(Stream):
    """Any source, in float; what it reads counts in ``files`` as a use of each matrix, by default of files of its own.

    Then shards that are on the hub are fetched into the folder ``scratch`` one by one.
    """

    def __init__(
        self, source: Source, dtype: mx.Dtype, files: TensorFiles | None = None, scratch: Path = Path()
    ) -> None:
        super().__init__(source, dtype)
        self._matrices, self._shapes = matrices(source), parameter_shapes(source.config)
        self._files = files or TensorFiles(remote.fetcher(source.repo, scratch), uses(self._matrices.values()))

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """As `Stream.arrays`; each name may be asked for once."""
        found = {}
        for name, shape in self._shapes.items():
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = self._read(name).reshape(shape)
                self._files.release(self._matrices[name].files)
        return found

    def close(self) -> None:
        self._files.close()

    def _read(self, name: str) -> mx.array:
        matrix, (rows, cols) = self._matrices[name], as_matrix(self._shapes[name])
        dtype = mx.float32 if name.endswith(weights.FLOAT32) else self.dtype
        step = max(1, CHUNK_WEIGHTS // cols)
        parts = []
        for start in range(0, rows, step):
            parts.append(matrix.read(self._files, start, min(start + step, rows)).astype(dtype))
            mx.eval(parts[-1])
        whole = mx.concatenate(parts)
        mx.eval(whole)
        return whole

    def embedding(self) -> nn.Module:
        """With its parameters."""
        embedding = self._model.model.word_embeddings
        embedding.load_weights(self._parameters("model.word_embeddings.", None))
        return embedding

    def norm_and_head(self) -> tuple[nn.Module, nn.Module | None]:
        """With their parameters; the head is None where it is the embedding."""
        norm = self._model.model.norm
        norm.load_weights(self._parameters("model.norm.", None))
        if self._model.config.tie_word_embeddings:
            return norm, None
        self._model.lm_head.load_weights(self._parameters("lm_head.", None))
        return norm, self._model.lm_head

    @property
    def head(self) -> nn.Module:
        """The module that `logits` ends with, where it is not the embedding."""
        head: nn.Module = self._model.lm_head
        return head

    def drop(self, layer: int) -> None:
        """Forget a layer's parameters."""
        layers: list[Any] = self._model.layers
        layers[layer] = None
        mx.clear_cache()

    def readers_of_embedding(self) -> mx.array:
        """How much an error in each direction of the residual stream changes what the first layer's matrices get from it.

        ``sum W^T W`` [hidden, hidden] float32 of those that read the stream, times the weights of the norms before them.
        """
        prefix, total = "model.layers.0.", mx.zeros((self._model.config.hidden_size,) * 2)
        for reader, norm in READERS.items():
            if (name := f"{prefix}{reader}.weight") in self._shapes:
                w = self._read(name) * self._read(f"{prefix}{norm}.weight")
                total = total + w.T.astype(mx.float32) @ w.astype(mx.float32)
                mx.eval(total)
        return total
