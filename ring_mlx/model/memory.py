"""Which models fit into this machine's memory, and MLX's limits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import mlx.core as mx
from mlx.utils import tree_flatten

from ring_mlx.errors import NoFitError
from ring_mlx.model.config import RingConfig
from ring_mlx.model.model import Model
from ring_mlx.system import macos

GB = 1e9
WORKSPACE_BYTES = 1 << 29
CACHE_LIMIT_BYTES = 2 << 30
PLAIN_CONTEXT = 8192
# Left to macOS and other programs where the working set is raised: an eighth of the memory, at least this.
LEFT_BYTES = 4 << 30


def budget_bytes() -> int:
    """Memory for a model: Metal's recommended working set, or nine tenths of the CUDA device's or the machine's memory."""
    info = mx.device_info()
    recommended = info.get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    total = info.get("total_memory") or info.get("memory_size")
    if not total:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(int(total) * 0.9)


def active_bytes() -> int:
    """Memory that MLX's arrays take now."""
    return int(mx.get_active_memory())


def weight_bytes(model: Model, arrays: Mapping[str, mx.array]) -> int:
    """Bytes that the parameters will take once evaluated."""
    return sum(arrays[name].nbytes for name, _ in tree_flatten(model.parameters()) if name in arrays)


def cache_bytes(config: RingConfig, tokens: int, element_bytes: int = 2) -> int:
    """Bytes of a cache after ``tokens`` tokens of one sequence.

    ::

        softmax layers * 2 * Hkv * head_dim * tokens * element_bytes + linear layers * H * head_dim^2 * 4
    """
    linear = sum(config.is_linear(i) for i in range(config.num_hidden_layers))
    softmax = config.num_hidden_layers - linear
    kv = softmax * 2 * config.num_key_value_heads * config.head_dim * tokens * element_bytes
    return kv + linear * config.num_attention_heads * config.head_dim**2 * 4


def parameter_count(config: RingConfig) -> int:
    """Parameters of a model of this shape, with embeddings and head, without norms and biases."""
    c = config
    layers = sum(layer_parameters(c, i, c.num_experts) for i in range(c.num_hidden_layers))
    return layers + c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)


def layer_parameters(c: RingConfig, layer: int, experts: int) -> int:
    """Parameters of a layer's matrices, with so many of its routed experts."""
    width, is_linear = c.num_attention_heads * c.head_dim, c.is_linear(layer)
    kv = width if is_linear else c.num_key_value_heads * c.head_dim
    columns = 2 * width + 2 * kv + width * is_linear
    if not c.is_moe(layer):
        return c.hidden_size * (columns + 3 * c.intermediate_size)
    inner = c.num_shared_experts * c.moe_shared_expert_intermediate_size + experts * c.moe_intermediate_size
    return c.hidden_size * (columns + 3 * inner + c.num_experts)


def size_in_bits(config: RingConfig, bits: int) -> int:
    """Bytes of the parameters; scales and biases of groups of 64 take half a bit each, unless they are plain."""
    return int(parameter_count(config) * (bits if bits == 16 else bits + 0.5) / 8)


def check_fit(
    config: RingConfig, needed_bytes: int, name: str, limit_bytes: int | None = None, beside_bytes: int = 0
) -> None:
    """Refuse, before weights are read, a model that this machine cannot hold with a short conversation.

    ``needed_bytes`` are those of its weights as they would be loaded, ``beside_bytes`` those of a draft model. The NoFitError
    names what is needed, what the machine has and what would fit.
    """
    limit = (budget_bytes() if limit_bytes is None else limit_bytes) - beside_bytes
    extra = extra_bytes(config)
    if needed_bytes + extra <= limit:
        return
    advice = _what_fits(config, needed_bytes, limit - extra)
    if command := wired_limit_command(needed_bytes + extra + beside_bytes):
        advice += f", or raise what macOS gives until the next start: {command}"
    beside = f" beside the draft model's {beside_bytes / GB:.1f} GB" if beside_bytes else ""
    raise NoFitError(
        f"{name} needs {(needed_bytes + extra) / GB:.1f} GB (weights {needed_bytes / GB:.1f} GB) but this machine can "
        f"give {max(0, limit) / GB:.1f} GB{beside}; {advice}."
    )


def check_prompt(config: RingConfig, held_bytes: int, tokens: int, limit_bytes: int | None = None) -> None:
    """Refuse a prompt whose keys and values do not fit beside ``held_bytes`` of weights. Raises NoFitError."""
    limit = budget_bytes() if limit_bytes is None else limit_bytes
    needed = held_bytes + cache_bytes(config, tokens) + WORKSPACE_BYTES
    if tokens > PLAIN_CONTEXT and needed > limit:
        fitting = tokens_beside(config, held_bytes, limit)
        raise NoFitError(
            f"{tokens:,} tokens need {needed / GB:.1f} GB with the model, but this machine can give {limit / GB:.1f} GB; "
            f"give at most {fitting:,} tokens."
        )


def held_bytes(model: Model) -> int:
    """Memory of a loaded model with a short conversation."""
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return weights + cache_bytes(model.config, min(PLAIN_CONTEXT, model.config.context_tokens))


def extra_bytes(config: RingConfig) -> int:
    """Memory of a short conversation, without the weights."""
    return cache_bytes(config, min(PLAIN_CONTEXT, config.context_tokens)) + WORKSPACE_BYTES


def tokens_beside(config: RingConfig, weight_bytes: int, room: int) -> int:
    """Tokens of one conversation that fit into ``room`` bytes beside the weights; 0 if a short one does not fit."""
    left = room - weight_bytes - WORKSPACE_BYTES - cache_bytes(config, 0)
    a_token = cache_bytes(config, 1) - cache_bytes(config, 0)
    tokens = min(max(0, left) // a_token, config.context_tokens) if a_token else config.context_tokens
    return tokens if left > 0 and tokens >= min(PLAIN_CONTEXT, config.context_tokens) else 0


def wired_limit_command(needed_bytes: int) -> str | None:
    """The command that raises Metal's recommended working set to so much, in whole GiB; None where it cannot be raised so.

    The setting is lost when the machine restarts.
    """
    needed_mb = -(-needed_bytes >> 30) * 1024
    return f"sudo sysctl iogpu.wired_limit_mb={needed_mb}" if needed_mb << 20 <= most_working_set_bytes() else None


def most_working_set_bytes() -> int:
    """The most to which Metal's recommended working set should be raised; 0 where there is none."""
    info = mx.device_info()
    total = int(info.get("memory_size") or 0)
    return max(0, total - max(LEFT_BYTES, total // 8)) if info.get("max_recommended_working_set_size") else 0


def claim(config: RingConfig, needed_bytes: int, name: str, beside_bytes: int = 0) -> None:
    """`check_fit`, and a warning where other programs hold the memory now."""
    check_fit(config, needed_bytes, name, None, beside_bytes)
    left = macos.available_bytes()
    if left is not None and needed_bytes > left:
        warnings.warn(
            f"[memory] the weights of {name} take {needed_bytes / GB:.1f} GB, but other programs leave "
            f"{left / GB:.1f} GB now; close some, or the machine swaps.",
            stacklevel=2,
        )


def bound_memory(limit_bytes: int | None = None) -> None:
    """Bound MLX's buffers for reuse (see `cache_limit_bytes`) and all its memory (the budget).

    Beyond the budget MLX waits for running work before it allocates, so that the machine does not swap.
    """
    limit = budget_bytes() if limit_bytes is None else limit_bytes
    mx.set_cache_limit(cache_limit_bytes(limit))
    mx.set_memory_limit(limit)


def cache_limit_bytes(budget: int) -> int:
    """Freed memory that MLX may keep for reuse: a twentieth of the budget, at most 2 GiB."""
    return min(CACHE_LIMIT_BYTES, budget // 20)


def snapshot_budget_bytes() -> int:
    """The default budget of snapshots: a quarter of the memory that is left for models, at most 4 GiB."""
    return min(4 << 30, max(1 << 26, (budget_bytes() - mx.get_active_memory()) // 4))


def _what_fits(config: RingConfig, needed_bytes: int, room: int) -> str:
    for bits in (8, 6, 5, 4, 3):
        size = size_in_bits(config, bits)
        if size <= room and size < needed_bytes:
            return f"a {bits}-bit conversion would fit (about {size / GB:.1f} GB)"
    smallest = size_in_bits(config, 4)
    return f"even at 4 bits it takes about {smallest / GB:.1f} GB, so use a machine with more memory, or keep experts on disk with --expert-cache-bytes"


# 4 bits and, for every 64 weights, a scale and a bias.
BITS_PER_WEIGHT = 4.5
# Left to the operating system's page cache, which holds files that were just read.
PAGE_CACHE_PART = 0.1


def recommend_cache_bytes(
    config: RingConfig, memory_bytes: int, bits_per_weight: float = BITS_PER_WEIGHT
) -> int | None:
    """Bytes for ``--expert-cache-bytes``: nine tenths of the memory that is left.

    ::

        left = memory - weights other than routed experts - cache of a short conversation - workspace

    None if all experts fit, so that none needs to be streamed; 0 if not even those of one token do. ``memory_bytes`` is
    what the machine can give (`ring_mlx.model.memory.budget_bytes`), ``bits_per_weight`` includes scales and biases.
    """
    routed = routed_count(config)
    resident = int((parameter_count(config) - routed) * bits_per_weight / 8)
    room = memory_bytes - resident - extra_bytes(config)
    if room >= int(routed * bits_per_weight / 8):
        return None
    room = int(room * (1 - PAGE_CACHE_PART))
    expert_bytes = int(3 * config.hidden_size * config.moe_intermediate_size * bits_per_weight / 8)
    return room if room >= expert_bytes * config.num_experts_per_tok else 0


def routed_count(config: RingConfig) -> int:
    layers = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
    return layers * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size
