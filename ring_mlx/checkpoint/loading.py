"""A checkpoint folder or hub repository to a ready model and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx import experts
from ring_mlx.checkpoint import weights
from ring_mlx.checkpoint.adapters import read_adapter
from ring_mlx.checkpoint.fingerprint import fingerprint
from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.shards import find_shards, read_headers
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.errors import WeightsError
from ring_mlx.generation.defaults import read_defaults
from ring_mlx.model import memory
from ring_mlx.model.config import RingConfig, read_config
from ring_mlx.model.model import Model
from ring_mlx.model.moe import bundle_experts
from ring_mlx.model.quantization import loadable_settings
from ring_mlx.system.progress import Progress
from ring_mlx.system.turn import DEVICE
from ring_mlx.tuning.autotune import settle
from ring_mlx.tuning.kernel_check import check_kernels

Claim = Callable[[RingConfig, int, str], object]


def demo_model_path() -> Path:
    """The folder of the packaged toy model, the default of every command."""
    return Path(__file__).parents[1] / "demo_model"


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: mx.Dtype | None = None,
    exact: bool = False,
    lazy: bool = False,
    expert_cache_bytes: int | None = None,
    expert_policy: str | None = None,
    adapter_path: str | os.PathLike[str] | None = None,
    decay_layer_offset: int | str | None = None,
    progress: Progress | None = None,
    claim: Claim = memory.claim,
) -> Model:
    """Load the model of a checkpoint folder, without a tokenizer.

    Args:
        path: A folder with config.json and safetensors, in Hugging Face or mlx-community form.
        dtype: What floating weights and activations become; by default the file's, but float32 on MLX's CPU backend,
            where half precision is emulated.
        exact: Residual stream, norms and head in float32 too; see `Model`.
        lazy: Leave the weights unread until they are used.
        expert_cache_bytes: Read routed experts on demand, into so much memory; None keeps them all in memory.
        expert_policy: Which of them stay, one of `ring_mlx.experts.POLICIES`; None is the default.
        adapter_path: Folder of an adapter of mlx_lm.lora to put over the model.
        decay_layer_offset: 0, -1 or "clamped" in place of config.json's, for linear models; None leaves it.
        progress: Called with (parts in memory, all), unless it is lazy.
        claim: Called with config, bytes of the weights and name before any weight is read; refuses by a NoFitError.

    Returns:
        The model, in evaluation mode. On a GPU the first load of a kind of model takes up to ten seconds more, in which
        the fastest kernels are found and kept; a warning says so. ``RING_MLX_TUNE=off`` in the environment skips it.

    Raises:
        ConfigError: If config.json is missing, broken or asks for something unsupported.
        WeightsError: If tensors are missing, extra, misshapen or damaged, in the checkpoint or the adapter.
        NoFitError: If the machine's memory cannot hold it; nothing has been read then.
        OptionError: If experts cannot be read on demand so, or the model has no such decay.
    """
    folder = Path(os.path.expanduser(path))
    adapter = None if adapter_path is None else read_adapter(adapter_path)
    model, arrays, shards, target = assemble(folder, dtype, exact, decay_layer_offset)
    needed = memory.weight_bytes(model, arrays)
    if expert_cache_bytes is not None:
        needed = min(needed, experts.needed_bytes(arrays, expert_cache_bytes))
    if adapter is not None:
        adapter.check(model, expert_cache_bytes is not None)
        needed += adapter.nbytes
        adapter.put_into(arrays)
    claim(model.config, needed, folder.name)
    memory.bound_memory()
    weights.give(model, arrays)
    if expert_cache_bytes is not None:
        experts.attach(model, folder, expert_cache_bytes, target, expert_policy)
    model.fingerprint = fingerprint(model.config, shards, target, exact)
    if adapter is not None:
        adapter.attach(model)
        model.fingerprint = adapter.fingerprint(model.fingerprint)
    if not lazy:
        _get_ready(model, folder, progress)
    return model


def assemble(
    folder: Path, dtype: mx.Dtype | None = None, exact: bool = False, decay_layer_offset: int | str | None = None
) -> tuple[Model, dict[str, mx.array], list[Path], mx.Dtype]:
    """Check the files of a checkpoint against each other; no weight is read. Arguments and errors as for `load_model`.

    Returns the model without its weights, the weights under parameter names, still unread, their files, and the dtype
    of the floats.
    """
    config, raw = read_config(folder, decay_layer_offset)
    quantization = loadable_settings(raw)
    shards = find_shards(folder)
    tensors = read_headers(shards)
    target = weights.compute_dtype(raw, tensors, dtype)
    arrays = weights.load_arrays(weights.canonical(tensors, config), config.num_experts, target, exact)
    model = Model(config, exact=exact)
    model.sampling = read_defaults(folder, config.vocab_size)
    if quantization is not None:
        weights.quantize_like(model, quantization, arrays)
    weights.check(model, arrays, folder)
    return model, arrays, shards, target


def load(
    path_or_repo: str | os.PathLike[str], *, revision: str | None = None, **options: Any
) -> tuple[Model, TokenizerWrapper]:
    """Load a model and its tokenizer from a folder or the hub.

    Args:
        path_or_repo: A local folder, or ``owner/name`` on the Hugging Face hub.
        revision: Branch, tag or commit of a hub repository.
        **options: As for `load_model`.

    Raises:
        HubError, TokenizerError: If the folder, repository or tokenizer cannot be found or fetched.
        ConfigError, WeightsError, NoFitError, OptionError: As for `load_model`.
    """
    folder = resolve_model(path_or_repo, revision)
    tokenizer = load_tokenizer(folder)
    return load_model(folder, **options), tokenizer


def _get_ready(model: Model, folder: Path, progress: Progress | None) -> None:
    """Read the weights, then test the kernels and choose the fastest."""
    try:
        _read(model, progress)
    except RuntimeError as e:
        raise WeightsError(f"the weights in {folder} cannot be read ({e}); check the disk and the memory.") from None
    with DEVICE:
        check_kernels(model, speculates=True)
        settle(model, progress)
    if progress:
        progress(len(model.layers) + 1, len(model.layers) + 1)


def _read(model: Model, progress: Progress | None) -> None:
    """Evaluate layer by layer, so that only one layer's unstacked experts are held beside the model."""
    for done, layer in enumerate(model.layers, 1):
        with DEVICE:
            mx.eval(layer.parameters())
            bundle_experts(layer.mlp)
        if progress:
            progress(done, len(model.layers) + 1)
    mx.eval(model.parameters())
    mx.clear_cache()
