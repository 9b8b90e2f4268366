"""Adapters from mlx_lm.lora, applied to a model: LoRA, DoRA or whole layers.

A layer with an adapter runs on MLX's operations, and the kernels that would have read its weight pass it by
(`ring_mlx.model.kernel_weights`); all other layers keep theirs.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from ring_mlx.checkpoint import weights
from ring_mlx.checkpoint.safetensors_header import Tensor, read_header
from ring_mlx.errors import WeightsError
from ring_mlx.model.config_values import is_count, is_number, shown
from ring_mlx.model.kernel_weights import packed
from ring_mlx.model.model import Model
from ring_mlx.system.regular_files import open_regular, read_json

SETTINGS, TENSORS = "adapter_config.json", "adapters.safetensors"
FOREIGN = "adapter_model.safetensors"
LEAVES = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m"), "full": ()}
LINEAR, EMBEDDING = (nn.Linear, nn.QuantizedLinear), (nn.Embedding, nn.QuantizedEmbedding)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(frozen=True)
class Adapter:
    """A folder that mlx_lm.lora wrote: ``y = W x + scale (x A) B``.

    ``kind`` is "lora", "dora", or "full" for layers that were trained whole; ``mark`` differs between adapters that
    change a model in another way.
    """

    folder: Path
    kind: str
    rank: int
    scale: float
    tensors: dict[str, Tensor]
    mark: str

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory beside the model."""
        return 0 if self.kind == "full" else sum(4 * math.prod(t.shape) for t in self.tensors.values())

    def check(self, model: Model, are_experts_on_disk: bool = False) -> None:
        """Raises a WeightsError if it is not for this model, or for experts that are read on demand."""
        if are_experts_on_disk and any(".switch_mlp." in name for name in self.tensors):
            raise self._wrong("changes routed experts, which --expert-cache-bytes reads as they are; leave that out")
        found = dict(tree_flatten(model.parameters())) if self.kind == "full" else self._expected(model)
        expected = {name: tuple(getattr(value, "shape", value)) for name, value in found.items()}
        tensors = self.tensors
        both = sorted(tensors.keys() & expected.keys())
        packed = [n for n in both if isinstance(v := found[n], mx.array) and not mx.issubdtype(v.dtype, mx.floating)]
        seen = weights.listed(
            unknown=sorted(tensors.keys() - expected.keys()),
            missing=[] if self.kind == "full" else sorted(expected.keys() - tensors.keys()),
            misshapen=[f"{n} {tensors[n].shape} not {expected[n]}" for n in both if tensors[n].shape != expected[n]],
            no_floats=[
                f"{n} {tensors[n].dtype}" for n in both if tensors[n].dtype not in weights.FLOATS or n in packed
            ],
        )
        if seen:
            raise self._wrong(f"does not fit the model ({seen}); give one that was trained on this checkpoint")

    def put_into(self, arrays: dict[str, mx.array]) -> None:
        """Replace the checkpoint's layers by those that were trained whole, in the checkpoint's dtype."""
        if self.kind == "full":
            arrays.update({name: new.astype(arrays[name].dtype) for name, new in self._arrays().items()})

    def attach(self, model: Model) -> None:
        """Put LoRA or DoRA around the layers of a model that has its weights."""
        if self.kind == "full":
            return
        modules, arrays = dict(model.named_modules()), self._arrays()
        for path in self._paths():
            parent, _, name = path.rpartition(".")
            base = modules[path]
            kind: Any = LoRAEmbedding if isinstance(base, EMBEDDING) else LoRALinear
            adapted = (LoRASwitchLinear if isinstance(base, EXPERTS) else kind).from_base(
                base, self.rank, scale=self.scale
            )
            adapted.lora_a, adapted.lora_b = arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"]
            if self.kind == "dora":
                adapted = DoRA(adapted, base, arrays[f"{path}.m"])
            setattr(modules[parent], name, adapted)
        model.eval()

    def fingerprint(self, model: str) -> str:
        return hashlib.sha256(f"{model} {self.mark}".encode()).hexdigest()[:32]

    def _paths(self) -> list[str]:
        return sorted({name.rpartition(".")[0] for name in self.tensors})

    def _expected(self, model: Model) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor for the layers that the file names, as far as they can have an adapter."""
        modules, expected = dict(model.named_modules()), {}
        for path in self._paths():
            shapes = _shapes(modules.get(path), self.rank)
            for leaf in LEAVES[self.kind] if shapes and (self.kind == "lora" or len(shapes) == 3) else ():
                expected[f"{path}.{leaf}"] = shapes[leaf]
        return expected

    def _arrays(self) -> dict[str, mx.array]:
        return weights.load_arrays(self.tensors, 0, mx.float32)

    def _wrong(self, seen: str) -> WeightsError:
        return WeightsError(f"the adapter in {self.folder} {seen}.")


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read an adapter without its weights; a WeightsError if it is missing, damaged, or of another kind."""
    path = Path(os.path.expanduser(folder))
    for name in (SETTINGS, TENSORS):
        if not os.path.exists(path / name):
            is_foreign = os.path.exists(path / FOREIGN)
            remedy = "PEFT's are not read; train it with `ring-mlx mlx-lm lora`" if is_foreign else "correct the path"
            raise WeightsError(f"no {name} in {path}; give the folder of an adapter of mlx_lm.lora ({remedy}).")
    raw = read_json(path / SETTINGS, WeightsError)
    kind = raw.get("fine_tune_type", "lora")
    if not isinstance(kind, str) or kind not in LEAVES:
        raise WeightsError(
            f"fine_tune_type {shown(kind)} in {path / SETTINGS} is none of {', '.join(LEAVES)}; correct it."
        )
    rank, scale = (0, 0.0) if kind == "full" else _parameters(raw, path / SETTINGS)
    tensors = read_header(path / TENSORS).tensors
    if not tensors:
        raise WeightsError(f"{path / TENSORS} holds no tensors; give an adapter that was trained.")
    with open_regular(path / TENSORS, WeightsError) as file:
        digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    return Adapter(path, kind, rank, scale, tensors, f"{kind} {rank} {scale} {digest}")


def _parameters(raw: Mapping[str, Any], file: Path) -> tuple[int, float]:
    given = raw.get("lora_parameters")
    rank, scale = (given.get(key) if isinstance(given, Mapping) else None for key in ("rank", "scale"))
    if not is_count(rank):
        raise WeightsError(f"rank {shown(rank)} of lora_parameters in {file} is no whole number from 1; correct it.")
    if not is_number(scale):
        raise WeightsError(f"scale {shown(scale)} of lora_parameters in {file} is no finite number; correct it.")
    return int(rank), float(scale)


def _shapes(module: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that an adapter has for a layer; empty if it can have none."""
    if not isinstance(module, (*LINEAR, *EMBEDDING, *EXPERTS)):
        return {}
    *count, rows, columns = module.weight.shape
    if "scales" in module:
        columns = columns * 32 // module.bits
    if isinstance(module, EXPERTS):
        return {"lora_a": (*count, rank, columns), "lora_b": (*count, rows, rank)}
    first, last = (rows, columns) if isinstance(module, EMBEDDING) else (columns, rows)
    return {"lora_a": (first, rank), "lora_b": (rank, last), "m": (rows,)}


class DoRA(nn.Module):
    """A LoRA layer whose rows have the length m [rows]. mlx-lm's own unpacks its weight again for every token.

    ::

        y = m / |W + scale B A| * (W x + scale B A x) + bias

    ``lora`` is mlx-lm's LoRA around ``base``, a linear layer or an embedding.
    """

    def __init__(self, lora: Any, base: Any, m: mx.array) -> None:
        super().__init__()
        self.lora = lora
        is_embedding = isinstance(base, nn.Embedding | nn.QuantizedEmbedding)
        change = lora.lora_a @ lora.lora_b
        weight = packed(base).dequantize() + lora.scale * (change if is_embedding else change.T)
        self.magnitude = m / mx.maximum(mx.linalg.norm(weight, axis=1), 1e-30)

    def __call__(self, x: mx.array) -> mx.array:
        """Of a linear layer x [..., in] to [..., out], of an embedding ids [...] to [..., dims]."""
        y = self.lora(x)
        if "linear" not in self.lora:
            return y * self.magnitude[x][..., None].astype(y.dtype)
        bias = self.lora.linear.get("bias")
        if bias is None:
            return y * self.magnitude.astype(y.dtype)
        return (y - bias) * self.magnitude.astype(y.dtype) + bias

    def as_linear(self, x: mx.array) -> mx.array:
        """An embedding as the head of a model that ties them."""
        y = self.lora.as_linear(x)
        return y * self.magnitude.astype(y.dtype)
