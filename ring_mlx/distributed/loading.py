"""One rank's part of a model: put together without its weights, cut, and only then read, a tensor at a time.

mlx-lm's `sharded_load` works the same way. It is not used: it computes all tensors at once, does not refuse models that
cannot be divided, and does not notice ranks with other weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ring_mlx.checkpoint import weights
from ring_mlx.checkpoint.fingerprint import fingerprint
from ring_mlx.checkpoint.loading import assemble
from ring_mlx.distributed import AUTO, CHOICES, PIPELINE, TENSOR, pipeline, tensor
from ring_mlx.distributed.failure import DistributedError
from ring_mlx.distributed.group import together
from ring_mlx.distributed.hosts import compare, versions
from ring_mlx.errors import WeightsError
from ring_mlx.model import memory
from ring_mlx.model.model import Model
from ring_mlx.system.terminal_text import note
from ring_mlx.tuning.kernel_check import check_kernels

SMALL_BYTES = 1 << 14
Arrays = dict[str, mx.array]
WAYS = {TENSOR: tensor, PIPELINE: pipeline}


def load_sharded(
    folder: str | os.PathLike[str],
    group: mx.distributed.Group,
    mode: str,
    *,
    dtype: mx.Dtype | None = None,
    exact: bool = False,
    decay_layer_offset: int | str | None = None,
) -> Model:
    """This rank's part of the model in a folder; every rank must call it.

    Args:
        folder: A folder with config.json and safetensors, the same on every rank.
        group: The ranks, from ``mx.distributed.init``.
        mode: "tensor": every layer is cut; "pipeline": every rank has some of the layer groups; "auto": tensor where
            the model can be cut so.
        dtype, exact, decay_layer_offset: As for `ring_mlx.load_model`.

    Returns:
        A model that gives whole logits on every rank, as long as every rank makes the same calls. Its caches hold
        this rank's heads or layers only.

    Raises:
        DistributedError: On every rank: if the model cannot be cut so, or ranks differ in versions or weights.
        ConfigError, WeightsError, NoFitError, OptionError: As for `ring_mlx.load_model`.
    """
    path = Path(os.path.expanduser(folder))

    def make() -> tuple[Model, Arrays, str]:
        model, arrays, shards, target = assemble(path, dtype, exact, decay_layer_offset)
        return model, arrays, fingerprint(model.config, shards, target, exact)

    return share(make, group, mode, path.name)


def share(make: Callable[[], tuple[Model, Arrays, str]], group: mx.distributed.Group, mode: str, name: str) -> Model:
    """This rank's part of the model that ``make`` gives, as `load_sharded`; every rank must call it.

    Args:
        make: Gives the whole model without its weights, the weights by name, not computed yet, and their fingerprint.
        group, mode: The ranks, and how they share it.
        name: What to call the model.
    """
    if mode not in CHOICES:
        raise DistributedError(f"mode {mode!r} is not one of {', '.join(CHOICES)}; choose one of them.")
    with together(group) as said:
        said["versions"] = versions()
        model, arrays, said["weights"] = make()
        mode = _settle(mode, model, group)
        way = WAYS[mode]
        config = way.check(model, group.size())
        model.load_weights(list(arrays.items()))
        del arrays  # what is named somewhere stays in memory once it is computed
        way.cut(model, group)
    compare(said["all"])
    with together(group):
        parts = dict(tree_flatten(model.parameters()))
        memory.claim(config, sum(a.nbytes for a in parts.values()), f"a rank's part of {name}")
        memory.bound_memory()
        read(model, parts, name)
    model.fingerprint = f"{said['weights']}-{mode}-{group.rank()}-{group.size()}"
    check_kernels(model)
    model.model = way.connect(model.model, group)
    return model


def _settle(mode: str, model: Model, group: mx.distributed.Group) -> str:
    """Tensor where the model can be cut so, else pipeline."""
    if mode != AUTO:
        return mode
    try:
        tensor.check(model, group.size())
    except DistributedError as e:
        if group.rank() == 0:
            note(f"note: {e} A pipeline is used instead.")
        return PIPELINE
    return TENSOR


def read(model: Model, parts: Arrays, name: str) -> None:
    """Compute a cut model's parameters one at a time, so that at most one is whole; WeightsError if the disk fails."""
    for path, part in parts.items():
        if part.nbytes <= SMALL_BYTES:  # MLX's cut of a small tensor would keep all of it in memory
            parts[path] = mx.take(part, mx.arange(len(part)), axis=0)
    weights.give(model, parts)
    try:
        for part in parts.values():
            mx.eval(part)
            mx.clear_cache()
    except RuntimeError as e:
        raise WeightsError(f"the weights of {name} cannot be read ({e}); check the disk and the memory.") from None
