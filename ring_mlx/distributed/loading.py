"""A checkpoint folder to one rank's part of the model.

No process holds more than its part and one tensor's worth of what is being read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint import weights
from ring_mlx.checkpoint.fingerprint import fingerprint
from ring_mlx.checkpoint.shards import find_shards, read_tensors
from ring_mlx.distributed.agreement import compare, versions
from ring_mlx.distributed.cuts import Cut, Entry, plan_cuts
from ring_mlx.distributed.failure import DistributedError
from ring_mlx.distributed.group import together
from ring_mlx.distributed.pipeline import Line, Stage
from ring_mlx.distributed.plan import MODES, TENSOR, local_config, stages
from ring_mlx.distributed.reading import read_parts
from ring_mlx.distributed.tensor import Sum, TensorModel
from ring_mlx.generation.defaults import read_defaults
from ring_mlx.model.config import RingConfig, read_config
from ring_mlx.model.decay import decay_rate
from ring_mlx.model.model import LanguageModel, Model
from ring_mlx.model.quantization import loadable_settings
from ring_mlx.system import memory
from ring_mlx.tuning.kernel_check import check_kernels


@dataclass(frozen=True)
class Part:
    """What a rank is to hold, before anything is read.

    Attributes:
        config: Of the whole model.
        own: Of this part, as for what it takes in memory.
        entries: The tensors that it needs, by its own parameter names.
        cuts: Which part of each.
        quantization: As in config.json, of its own modules; None without.
        build: Makes the layers.
        alone: Runs them without the other ranks.
    """

    config: RingConfig
    own: RingConfig
    entries: dict[str, Entry]
    cuts: dict[str, Cut]
    quantization: dict[str, Any] | None
    build: Callable[[], LanguageModel]
    alone: Callable[[], AbstractContextManager[None]]


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
        mode: "tensor": every layer is cut; "pipeline": every rank has some of the layer groups.
        dtype, exact, decay_layer_offset: As for `ring_mlx.load_model`.

    Returns:
        A model that gives whole logits on every rank, as long as every rank makes the same calls. Its caches hold
        this rank's heads or layers only.

    Raises:
        DistributedError: On every rank: if the model cannot be cut so, or ranks differ in versions or weights.
        ConfigError, WeightsError, NoFitError, OptionError: As for `ring_mlx.load_model`.
    """
    path = Path(os.path.expanduser(folder))
    if mode not in MODES:
        raise DistributedError(f"mode {mode!r} is not one of {', '.join(MODES)}; choose one of them.")
    with together(group) as said:
        config, raw = read_config(path, decay_layer_offset)
        tensors = read_tensors(path)
        target = weights.compute_dtype(raw, tensors, dtype)
        said["weights"] = fingerprint(config, find_shards(path), target, exact)
        said["versions"] = versions()
        part = plan_part(raw, config, tensors, mode, group)
    compare(said["all"])
    with together(group):
        model = _read(part, path, target, exact)
        model.sampling = read_defaults(path, config.vocab_size)
    model.fingerprint = f"{said['weights']}-{mode}-{group.rank()}-{group.size()}"
    with part.alone():
        check_kernels(model)
    return model


def plan_part(
    raw: Mapping[str, Any], config: RingConfig, tensors: Mapping[str, Any], mode: str, group: mx.distributed.Group
) -> Part:
    """What this rank is to hold of the tensors of a checkpoint.

    Raises:
        DistributedError: If the model cannot be cut so.
        WeightsError: If it is quantised in a way that is not read.
    """
    quantization = loadable_settings(raw)
    entries = weights.canonical(tensors, config)
    return (_tensor_part if mode == TENSOR else _pipeline_part)(config, entries, quantization, group)


def _tensor_part(config: RingConfig, entries: dict[str, Entry], quantization: Any, group: mx.distributed.Group) -> Part:
    rank, size = group.rank(), group.size()
    own, total = local_config(config, size), Sum(group)
    cuts, regrouped = plan_cuts(entries, config, rank, size)
    heads = own.num_attention_heads

    def rates(layer: int) -> mx.array:
        every = decay_rate(config.num_attention_heads, layer, config.num_hidden_layers, config.decay_layer_offset)
        return mx.contiguous(every[rank * heads : (rank + 1) * heads])

    settings = None if quantization is None else {**quantization, **regrouped}
    return Part(config, own, entries, cuts, settings, lambda: TensorModel(own, rates, total), total.alone)


def _pipeline_part(
    config: RingConfig, entries: dict[str, Entry], quantization: Any, group: mx.distributed.Group
) -> Part:
    first, end = stages(config, group.size())[group.rank()]
    line = Line(group)

    def local(name: str) -> str | None:
        """A name in this part, or None where it belongs to others."""
        if name.startswith("model.layers."):
            number, _, rest = name.removeprefix("model.layers.").partition(".")
            return f"model.layers.{int(number) - first}.{rest}" if first <= int(number) < end else None
        is_embedding = name.startswith("model.word_embeddings.")
        return None if is_embedding and not (line.is_first or config.tie_word_embeddings) else name

    mine = {own: entry for name, entry in entries.items() if (own := local(name)) is not None}
    settings = quantization
    if quantization is not None:
        settings = {new: value for key, value in quantization.items() if (new := local(key)) is not None}
    own_config = replace(config, num_hidden_layers=end - first)
    return Part(config, own_config, mine, {}, settings, lambda: Stage(config, (first, end), line), line.alone)


def empty_part(part: Part, exact: bool, arrays: Mapping[str, mx.array], source: Path) -> Model:
    """The part's layers, to be given these arrays.

    Raises:
        WeightsError: If they are not what the layers need.
    """
    model = Model(part.own, exact=exact)
    model.model, model.config = part.build(), part.config
    if part.quantization is not None:
        weights.quantize_like(model, part.quantization, arrays)
    weights.check(model, arrays, source)
    return model


def _read(part: Part, folder: Path, dtype: mx.Dtype, exact: bool) -> Model:
    memory.claim(part.own, _needed_bytes(part), f"a rank's part of {folder.name}")
    memory.bound_memory()
    arrays = read_parts(part.entries, part.cuts, part.config.num_experts, dtype, exact)
    model = empty_part(part, exact, arrays, folder)
    weights.give(model, arrays)
    mx.eval(model.parameters())
    mx.clear_cache()
    return model


def _needed_bytes(part: Part) -> int:
    """Of the part as it lies on disk."""
    total = 0.0
    for name, entry in part.entries.items():
        cut = part.cuts.get(name)
        tensors: list[Any] = list(entry.values()) if isinstance(entry, dict) else [entry]
        share = 1.0
        if cut is not None:
            whole = tensors[0].shape[cut.axis] * cut.repeat
            share = cut.repeat * sum(hi - lo for lo, hi in cut.ranges) / whole
        total += share * sum(t.nbytes for t in tensors)
    return int(total)
