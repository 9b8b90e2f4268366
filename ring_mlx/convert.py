"""A checkpoint to the mlx-community form, quantised or not; holds the model in memory, knows no command line."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import save_config, save_model

from ring_mlx import weights
from ring_mlx.config import read_json
from ring_mlx.errors import OptionError, RingError
from ring_mlx.hub import resolve_model
from ring_mlx.loading import load_model
from ring_mlx.model import Model

COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json")
PROTECTED = ("gate.gate_proj",)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    quantize: bool = False,
    bits: int = 4,
    group_size: int = 64,
    mode: str = "affine",
    dtype: mx.Dtype | None = None,
) -> Path:
    """Write ``source`` to a new folder ``target`` with stacked experts, loadable here and by mlx-lm.

    The router keeps the source's precision; every other matrix whose rows divide into groups is quantised. The folder
    appears whole or not at all.

    Args:
        source: A folder, or owner/name on the hub.
        target: A folder that does not exist.
        revision: Of a hub repository.
        quantize: Whether to quantise.
        bits, group_size, mode: As for ``mx.quantize``.
        dtype: Of floating tensors, by default the source's.

    Returns:
        The folder.

    Raises:
        OptionError: If the target exists, or the source is quantised already, or the bits do not suit the mode.
        RingError: As for `ring_mlx.load_model`.
    """
    target = Path(target).expanduser()
    if target.exists():
        raise OptionError(f"{target} exists already; name a folder that does not, or remove it.")
    folder = resolve_model(source, revision)
    raw = read_json(folder / "config.json")
    if quantize and "quantization" in raw:
        raise OptionError(f"{folder} is quantised already; convert the original checkpoint.")
    tensors = weights.read_headers(weights.find_shards(folder))
    kept = dtype or weights.file_dtype(raw, tensors)
    model = load_model(folder, dtype=kept, lazy=True)
    model.update(tree_map_with_path(lambda n, p: _as_stored(n, p, kept), model.parameters()))
    if quantize:
        raw["quantization"] = _quantize(model, bits, group_size, mode)
    raw["torch_dtype"] = str(kept).removeprefix("mlx.core.")
    _write_whole(target, folder, model, raw)
    return target


def _as_stored(name: str, parameter: Any, dtype: mx.Dtype) -> Any:
    narrow = mx.issubdtype(parameter.dtype, mx.floating) and not name.endswith("expert_bias")
    return parameter.astype(dtype) if narrow else parameter


def _quantize(model: Model, bits: int, group_size: int, mode: str) -> dict[str, Any]:
    def suits(path: str, module: nn.Module) -> bool:
        return (
            hasattr(module, "to_quantized")
            and not path.endswith(PROTECTED)
            and module.weight.shape[-1] % group_size == 0
        )

    try:
        nn.quantize(model, group_size, bits, mode=mode, class_predicate=suits)
    except ValueError as e:
        raise OptionError(f"{bits} bits in groups of {group_size} ({mode}) is not possible: {e}") from None
    return {"group_size": group_size, "bits": bits, "mode": mode}


def _write_whole(target: Path, source: Path, model: Model, raw: dict[str, Any]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            save_model(partial, model)
            save_config(raw, partial / "config.json")
            for pattern in COPIED:
                for file in source.glob(pattern):
                    shutil.copy(file, partial / file.name)
            partial.chmod(0o755)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except (OSError, RuntimeError) as e:
        raise RingError(f"{target} could not be written ({e}); check space and permissions.") from None


def describe(folder: Path) -> str:
    """One line on a written checkpoint: size and quantisation."""
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    quantization = json.loads((folder / "config.json").read_text()).get("quantization")
    kind = f"{quantization['bits']}-bit {quantization['mode']}" if quantization else "not quantised"
    return f"{folder}: {size / 1e9:.3f} GB, {kind}"
