"""What will be written: every stored tensor with its setting, place and size, before anything is read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ring_mlx.checkpoint.safetensors_header import TensorSpec
from ring_mlx.checkpoint.weights import DTYPES
from ring_mlx.convert.matrices import Matrix
from ring_mlx.convert.options import Options
from ring_mlx.convert.recipes import ROUTER, Rule, Setting, make_rule, unmatched
from ring_mlx.convert.sources import Source, matrices, parameter_shapes, source_dtype
from ring_mlx.errors import OptionError
from ring_mlx.model.config import RingConfig
from ring_mlx.model.model import Model

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 2 << 30
FLOAT32 = ("expert_bias",)
ROUTED = ".switch_mlp."
LAST_STAGE = 1 << 30

# Parts of the model in the order of the table; the first whose pattern matches a parameter's name counts.
PARTS = (
    ("embeddings", r"word_embeddings"),
    ("routed experts", r"\.switch_mlp\."),
    ("shared experts", r"\.shared_experts\."),
    ("router", r"\.mlp\.gate\."),
    ("norms", r"norm"),
    ("attention", r"\.attention\."),
    ("dense MLP", r"\.mlp\."),
    ("head", r"lm_head"),
)


@dataclass(frozen=True)
class Output:
    """One parameter of the model: its matrix in the source, and how it is stored; ``copied`` keeps the packed form."""

    name: str
    shape: tuple[int, ...]
    matrix: Matrix
    setting: Setting | None
    dtype: mx.Dtype
    copied: bool = False

    @property
    def path(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def stored(self) -> list[TensorSpec]:
        """The tensors that it becomes."""
        if self.setting is None:
            return [TensorSpec(self.name, DTYPE_NAMES[self.dtype], self.shape)]
        s, leading, cols = self.setting, self.shape[:-1], self.shape[-1]
        is_affine, shape = s.mode == "affine", (*leading, cols // s.group_size)
        dtype = DTYPE_NAMES[self.dtype if is_affine else mx.uint8]
        scales = [
            TensorSpec(f"{self.path}.{n}", dtype, shape) for n in (("scales", "biases") if is_affine else ("scales",))
        ]
        return [TensorSpec(self.name, DTYPE_NAMES[mx.uint32], (*leading, cols * s.bits // 32)), *scales]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.stored)

    @property
    def count(self) -> int:
        """Weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """All outputs by shard, the settings for config.json, and which modules stay float; ``streamed`` shards hold experts.

    ``recipe`` is what is to be written as recipe.json.
    """

    shards: dict[str, list[Output]]
    dtype: mx.Dtype
    quantization: dict[str, Any] | None
    left_float: list[str] = field(default_factory=list)
    streamed: frozenset[str] = frozenset()
    recipe: Mapping[str, Any] | None = None

    @property
    def outputs(self) -> list[Output]:
        """In the order of writing."""
        return [o for outputs in self.shards.values() for o in outputs]

    @property
    def nbytes(self) -> int:
        return sum(o.nbytes for o in self.outputs)


def make_plan(
    source: Source, options: Options, shard_bytes: int = SHARD_BYTES, recipe: Mapping[str, Any] | None = None
) -> Plan:
    """Decide how every parameter is stored; a shard holds at most ``shard_bytes``, unless one parameter is larger.

    ``recipe`` has ``bits`` by module, which go before those of the options.

    Raises an OptionError if options do not suit the source, or its packed form can neither be kept nor be changed.
    """
    quantizable, outputs, left = quantizable_paths(source.config), [], []
    rule = _rule(source, options, quantizable, recipe)
    dtype = getattr(mx, options.dtype) if options.dtype else source_dtype(source)
    found = matrices(source)
    for name, shape in _in_order(parameter_shapes(source.config)):
        matrix, path, setting = found[name], name.rpartition(".")[0], None
        if name.endswith(".weight") and path in quantizable and not options.dequantize:
            setting = rule(path) if rule else _kept(matrix, source)
            if setting is not None and shape[-1] % setting.group_size:
                left.append(path)
                setting = None
        copied = setting is not None and matrix.setting == setting
        own = (
            matrix.scale_dtype if copied else matrix.dtype if setting is None and _keeps(name, shape, source) else None
        )
        is_free = options.dtype is None or name.endswith(f"{ROUTER}.weight")
        chosen = mx.float32 if name.endswith(FLOAT32) else own if own is not None and is_free else dtype
        outputs.append(Output(name, shape, matrix, setting, chosen, copied))
    # A recipe's default names no setting that it uses.
    quantization = _quantization(outputs, quantizable, None if options.recipe or recipe else options.setting)
    if options.expert_layout == "stacked":
        stages = _by_stage(outputs) if options.calibrate else [outputs]
        return Plan(_cut(stages, shard_bytes), dtype, quantization, left, recipe=recipe)
    experts: dict[str, list[Output]] = {}
    for output in outputs:
        if ROUTED in output.name:
            layer = int(output.name.split(".")[2])
            experts.setdefault(f"model-experts-{layer:05d}.safetensors", []).append(output)
    rest = _cut([[o for o in outputs if ROUTED not in o.name]], shard_bytes)
    return Plan(rest | experts, dtype, quantization, left, frozenset(experts), recipe)


def _rule(source: Source, options: Options, quantizable: set[str], recipe: Mapping[str, Any] | None) -> Rule | None:
    """Which setting a module gets; None keeps what the source has."""
    if options.setting is None:
        return None
    bits = recipe and recipe["bits"]
    rule = make_rule(options.setting, options.recipe, options.overrides, source.config.num_hidden_layers, bits)
    useless = unmatched(options.overrides, sorted(quantizable))
    if useless:
        raise OptionError(f"--q-override {useless[0]!r} matches no module; see the names in config.json's form.")
    return rule


def quantizable_paths(config: RingConfig) -> set[str]:
    """Modules that MLX can quantize: linear layers, stacked experts and the embedding."""
    leaves = tree_flatten(Model(config).leaf_modules(), is_leaf=nn.Module.is_module)
    return {path for path, module in leaves if hasattr(module, "to_quantized")}


def uses(matrices: Iterable[Matrix]) -> Counter[str]:
    """How many matrices each source shard holds a part of."""
    return Counter(file.name for matrix in matrices for file in matrix.files)


def by_part(plan: Plan) -> list[tuple[str, int, int]]:
    """(part, weights, bytes) of every part of the model, and of all."""
    totals = {part: [0, 0] for part, _ in PARTS}
    for o in plan.outputs:
        part = next((p for p, pattern in PARTS if re.search(pattern, o.name)), "norms")
        totals[part][0] += o.count
        totals[part][1] += o.nbytes
    rows = [(part, count, size) for part, (count, size) in totals.items() if count]
    return [*rows, ("all", sum(count for _, count, _ in rows), plan.nbytes)]


def _in_order(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    """Embedding, layers by number, final norm, head: the order in which checkpoints are mostly written."""

    return sorted(shapes.items(), key=lambda item: (stage_of(item[0]), item[0]))


def _keeps(name: str, shape: tuple[int, ...], source: Source) -> bool:
    """Whether a float keeps the source's type, whatever config.json names: of norms, router and head."""
    head = "word_embeddings" if source.config.tie_word_embeddings else "lm_head"
    return len(shape) == 1 or name.endswith((f"{ROUTER}.weight", f"{head}.weight"))


def _kept(matrix: Matrix, source: Source) -> Setting | None:
    if matrix.setting is None and matrix.is_integer:
        raise OptionError(
            f"{source.name} is quantized in a way that MLX cannot hold as it is (desc_act, groups that 32 does not "
            "divide, 7 bits, or a global scale); add -q to requantize or -d to dequantize."
        )
    return matrix.setting


def _quantization(outputs: Sequence[Output], quantizable: set[str], default: Setting | None) -> dict[str, Any] | None:
    chosen = {o.path: o.setting for o in outputs if o.path in quantizable and o.name.endswith(".weight")}
    settings = [s for s in chosen.values() if s is not None]
    if not settings:
        return None
    default = default or max(dict.fromkeys(settings), key=settings.count)
    named = {p: s.as_config() if s else False for p, s in chosen.items() if s != default}
    return default.as_config() | named


def stage_of(name: str) -> int:
    """When a parameter is used: 0 embeds, 1 is the first layer, and LAST_STAGE the final norm and the head."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return int(layer[1]) + 1 if layer else 0 if "word_embeddings" in name else LAST_STAGE


def _by_stage(outputs: Sequence[Output]) -> list[list[Output]]:
    found: dict[int, list[Output]] = {}
    for output in outputs:
        found.setdefault(stage_of(output.name), []).append(output)
    return [found[stage] for stage in sorted(found)]


def _cut(stages: Sequence[Sequence[Output]], shard_bytes: int) -> dict[str, list[Output]]:
    """Shards, of which none has parameters of two stages."""
    groups: list[list[Output]] = []
    for stage in stages:
        groups.append([])
        size = 0
        for output in stage:
            if groups[-1] and size + output.nbytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(output)
            size += output.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups)}
