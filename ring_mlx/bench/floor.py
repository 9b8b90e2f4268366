"""The physical limit: the bytes and operations of a token over what this machine can do.

::

    decode:   B tokens / (bytes read / bandwidth)
    prefill:  B T tokens / max(operations / matmul rate, bytes read / bandwidth)

Bytes of a decode step are the weights, of the experts only those chosen, the recurrent states read and written, and
the keys and values of the context. Those of a prefill are the weights, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten

from ring_mlx.bench.measure import best_s
from ring_mlx.model.config import RingConfig
from ring_mlx.model.memory import cache_bytes, layer_parameters
from ring_mlx.model.model import Model

LARGE, SMALL = (1 << 30, 8192), (1 << 27, 512)


@dataclass(frozen=True)
class Rates:
    """Measured rates of the machine: bytes/s of elementwise work or a sum over a large array, and operations/s of a square product."""

    bandwidth: float
    matmul: float
    matmul_dtype: str


def measure_rates() -> Rates:
    """Both rates, the best of five; bfloat16 products, but float32 on MLX's CPU backend."""
    on_cpu = mx.default_device() == mx.cpu
    length, side = SMALL if on_cpu else LARGE
    dtype = mx.float32 if on_cpu else mx.bfloat16
    rates = Rates(_bandwidth(length), _matmul_rate(side, dtype), "float32" if on_cpu else "bfloat16")
    mx.clear_cache()
    return rates


def _bandwidth(length: int) -> float:
    """Bytes/s of the best of: adding 1 to bytes, adding 1 to floats, summing floats (which only reads)."""
    rates = []
    for dtype in (mx.uint8, mx.float32):
        big = mx.zeros((length // dtype.size,), dtype)
        rates.append(2 * length / best_s(partial(mx.add, big, 1)))
    rates.append(length / best_s(big.sum))
    return max(rates)


def _matmul_rate(side: int, dtype: mx.Dtype) -> float:
    a = mx.random.normal((side, side)).astype(dtype)
    return float(2 * side**3 / best_s(lambda: a @ a))


def weight_bytes_read(model: Model, tokens: int) -> float:
    """Bytes of the weights that a step of so many tokens reads: of E experts, E (1 - (1 - k/E)^tokens) are expected."""
    c = model.config
    share = 1 - (1 - c.num_experts_per_tok / c.num_experts) ** tokens if c.num_experts else 1.0
    total = 0.0
    for path, array in tree_flatten(model.parameters()):
        if "word_embeddings" in path and not c.tie_word_embeddings:
            continue  # a row a token
        total += array.nbytes * (share if "switch_mlp" in path else 1.0)
    return total


def decode_bytes(model: Model, batch: int, context: int) -> float:
    """Bytes that a decode step of ``batch`` rows moves after ``context`` tokens."""
    c, element = model.config, model.model.norm.weight.itemsize
    states_again = cache_bytes(c, 0)  # which are read and written
    return weight_bytes_read(model, batch) + batch * (cache_bytes(c, context, element) + states_again)


def prefill_operations(config: RingConfig, context: int) -> float:
    """Multiplications and additions that reading a prompt of ``context`` tokens takes, the head for its last only.

    Per token: 2 for each active weight, 4 H D^2 in a linear layer (fold in, read out), 4 H D (context + 1) / 2 in a
    softmax one.
    """
    c, per_token = config, 0.0
    width = c.num_attention_heads * c.head_dim
    for i in range(c.num_hidden_layers):
        mixing = 4 * width * c.head_dim if c.is_linear(i) else 2 * width * (context + 1)
        per_token += 2 * layer_parameters(c, i, c.num_experts_per_tok) + mixing
    return per_token * context + 2 * c.hidden_size * c.vocab_size


@dataclass(frozen=True)
class Floor:
    """The fastest that a cell could be on this machine, in tokens a second of all rows, and why."""

    prefill_tps: float
    decode_tps: float
    prefill_operations_per_token: float
    decode_bytes_per_step: float


def floor(model: Model, rates: Rates, batch: int, context: int) -> Floor:
    operations = batch * prefill_operations(model.config, context)
    read = weight_bytes_read(model, batch * context)
    step_bytes = decode_bytes(model, batch, context)
    return Floor(
        prefill_tps=batch * context / max(operations / rates.matmul, read / rates.bandwidth),
        decode_tps=batch * rates.bandwidth / step_bytes,
        prefill_operations_per_token=operations / (batch * context),
        decode_bytes_per_step=step_bytes,
    )
