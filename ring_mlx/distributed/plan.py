"""Which part of a model a rank holds, and why some models cannot be cut so."""

from __future__ import annotations

from dataclasses import replace

from ring_mlx.distributed.failure import DistributedError
from ring_mlx.model.config import RingConfig

TENSOR, PIPELINE = "tensor", "pipeline"
MODES = (TENSOR, PIPELINE)
AUTO = "auto"
CHOICES = (AUTO, *MODES)


def local_config(config: RingConfig, size: int) -> RingConfig:
    """The configuration of one rank's share of every layer under tensor parallelism.

    Heads of both kinds, groups of the linear layers' norm and inner dimensions are divided by ``size``. Where there
    are fewer heads of keys and values than ranks, ranks that share one hold it each.

    Raises:
        DistributedError: Naming what does not divide.
    """
    c = config
    for name, value in _divided(c).items():
        if value % size:
            raise DistributedError(
                f"{name} {value} does not divide among {size} ranks; use another number of ranks, or "
                "--distributed pipeline."
            )
    kv = c.num_key_value_heads
    if kv % size and size % kv:
        raise DistributedError(
            f"num_key_value_heads {kv} neither divides among {size} ranks nor repeats evenly on them; use another "
            "number of ranks, or --distributed pipeline."
        )
    shared = c.num_shared_experts * c.moe_shared_expert_intermediate_size
    return replace(
        c,
        num_attention_heads=c.num_attention_heads // size,
        num_key_value_heads=max(1, kv // size),
        group_norm_size=max(1, c.group_norm_size // size),
        intermediate_size=c.intermediate_size // size,
        moe_intermediate_size=c.moe_intermediate_size // size,
        num_shared_experts=1 if shared else 0,
        moe_shared_expert_intermediate_size=shared // size,
    )


def stages(config: RingConfig, size: int) -> list[tuple[int, int]]:
    """First and one past the last layer of each rank of a pipeline: whole layer groups, the tail beside them.

    Raises:
        DistributedError: If there are fewer groups than ranks.
    """
    units = _units(config)
    if len(units) < size:
        raise DistributedError(
            f"{len(units)} layer group{'s' * (len(units) > 1)} cannot be shared out whole among the {size} ranks of a "
            f"pipeline; use {f'at most {len(units)} ranks' if len(units) > 1 else '--distributed tensor'}."
        )
    base, more = divmod(len(units), size)
    out, at = [], 0
    for rank in range(size):
        # The later ranks take what is left over: the first holds the embedding too.
        count = base + (rank >= size - more)
        out.append((units[at][0], units[at + count - 1][1]))
        at += count
    return out


def _units(config: RingConfig) -> list[tuple[int, int]]:
    """Layer groups, each with its softmax layer at the end, and the tail as one more."""
    length, layers = config.layer_group_size, config.num_hidden_layers
    whole = layers // length * length
    units = [(i, i + length) for i in range(0, whole, length)]
    return units if whole == layers else [*units, (whole, layers)]


def _divided(c: RingConfig) -> dict[str, int]:
    """What must divide among the ranks, by its name in config.json; only what the model has."""
    layers = range(c.num_hidden_layers)
    sizes = {"num_attention_heads": c.num_attention_heads}
    if any(c.is_linear(i) for i in layers):
        sizes["group_norm_size"] = c.group_norm_size
    if not all(c.is_moe(i) for i in layers):
        sizes["intermediate_size"] = c.intermediate_size
    if any(c.is_moe(i) for i in layers):
        sizes["moe_intermediate_size"] = c.moe_intermediate_size
        if c.num_shared_experts:
            total = c.num_shared_experts * c.moe_shared_expert_intermediate_size
            sizes["num_shared_experts x moe_shared_expert_intermediate_size"] = total
    return sizes
