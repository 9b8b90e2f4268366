"""One rank's part of a model with random weights.

Every rank draws the same arrays from the seed and computes its own part of them alone, one tensor at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ring_mlx.bench.random_weights import draw, empty_model, fill
from ring_mlx.checkpoint.safetensors_header import Tensor
from ring_mlx.distributed.agreement import compare, versions
from ring_mlx.distributed.failure import DistributedError
from ring_mlx.distributed.group import together
from ring_mlx.distributed.loading import empty_part, plan_part
from ring_mlx.distributed.reading import cut_array
from ring_mlx.model.config import RingConfig
from ring_mlx.model.model import Model
from ring_mlx.system import memory


def random_sharded(
    raw: dict[str, Any],
    name: str,
    bits: int | None,
    group: mx.distributed.Group,
    mode: str,
    *,
    dtype: mx.Dtype,
    exact: bool = False,
    group_size: int = 64,
    seed: int = 0,
) -> Model:
    """This rank's part of `ring_mlx.bench.random_weights.random_model_of`; every rank must call it.

    Args:
        raw, name, bits, group_size, exact, dtype, seed: As there.
        group: The ranks.
        mode: As for `load_sharded`.

    Raises:
        DistributedError: On every rank: if the model cannot be cut so, or ranks differ.
        NoFitError: If a part does not fit; nothing has been made then.
    """
    described, config, tensors = shapes(raw, bits, exact, group_size)
    with together(group) as said:
        said["versions"], said["weights"] = versions(), f"{name} {bits} {seed}"
        part = plan_part(described, config, tensors, mode, group)
    compare(said["all"])
    with together(group) as said:
        drawn = draw(empty_model(config, bits, group_size, exact), dtype, seed)
        # What comes next in the sequence tells whether all before it was the same.
        said["next"] = mx.random.randint(0, 1 << 30, (4,)).tolist()
        arrays = {own: drawn[entry.name] for own, entry in part.entries.items() if isinstance(entry, Tensor)}
        arrays |= {own: cut_array(arrays[own], cut) for own, cut in part.cuts.items()}
        del drawn
        model = empty_part(part, exact, arrays, Path(name))
        memory.claim(part.own, sum(a.nbytes for a in arrays.values()), f"a rank's part of {name}")
        memory.bound_memory()
        fill(model, arrays)
    if any(record["next"] != said["next"] for record in said["all"]):
        raise DistributedError("ranks drew different numbers; start them with the same options.")
    return model


def shapes(
    raw: dict[str, Any], bits: int | None, exact: bool = False, group_size: int = 64
) -> tuple[dict[str, Any], RingConfig, dict[str, Tensor]]:
    """What `plan_part` must know of a model with random weights: config.json, and its tensors, which no file has."""
    config = RingConfig.from_dict(raw)
    parameters = tree_flatten(empty_model(config, bits, group_size, exact).parameters())
    described = {"quantization": {"bits": bits, "group_size": group_size}} if bits is not None else {}
    return described, config, {name: Tensor(Path(), name, "", tuple(a.shape)) for name, a in parameters}
