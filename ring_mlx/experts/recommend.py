"""Recommends how much memory to give to experts on disk."""

from __future__ import annotations

from ring_mlx.model.config import RingConfig
from ring_mlx.model.memory import PLAIN_CONTEXT, WORKSPACE_BYTES, cache_bytes, parameter_count

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
    conversation = cache_bytes(config, min(PLAIN_CONTEXT, config.context_tokens))
    room = memory_bytes - resident - conversation - WORKSPACE_BYTES
    if room >= int(routed * bits_per_weight / 8):
        return None
    room = int(room * (1 - PAGE_CACHE_PART))
    return room if room >= int(expert_count(config) * bits_per_weight / 8) * config.num_experts_per_tok else 0


def expert_count(config: RingConfig) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size


def routed_count(config: RingConfig) -> int:
    layers = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
    return layers * config.num_experts * expert_count(config)
