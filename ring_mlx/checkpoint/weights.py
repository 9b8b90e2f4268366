"""Checkpoint files to model parameters: names, stacking, quantization and checks; the only place that knows both forms.

Two forms are read. The Hugging Face form has one tensor an expert (``mlp.experts.{e}.gate_proj.weight``) and calls the
router ``mlp.gate.weight``; the mlx-community form stacks experts (``mlp.switch_mlp.gate_proj.weight``) and calls the
router ``mlp.gate.gate_proj``. Module attributes are named as in the second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ring_mlx.checkpoint.safetensors_header import Tensor
from ring_mlx.errors import WeightsError
from ring_mlx.model import memory
from ring_mlx.model.config import RingConfig
from ring_mlx.model.config_values import shown, some
from ring_mlx.model.model import Model
from ring_mlx.model.quantization import inferred_settings

FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
DTYPES = {**FLOATS, "U32": mx.uint32, "U8": mx.uint8}
CONFIG_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
SKIPPED = ("mtp", "slope", "inv_freq", ".padding")
EXPERT_DIGESTS = "expert_sha256"
FLOAT32 = (".mlp.gate.expert_bias", ".mlp.gate.gate_proj.weight")
AnyTensor = TypeVar("AnyTensor", Tensor, mx.array)
Entry = Tensor | dict[int, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

# Of the smallest packed form: a word of 32 bits holds 32 parameters of 1 bit.
MAX_PACKED = 32

_LAYER = re.compile(r"^model\.layers\.([0-9]{1,6})\.")
_EXPERT = re.compile(r"^(model\.layers\.[0-9]{1,6}\.mlp)\.experts\.([0-9]{1,6})\.(.+)$")
_ROUTER = re.compile(r"^(model\.layers\.[0-9]{1,6}\.mlp\.gate)\.((?!expert_bias$)[a-z_]+)$")


def canonical(tensors: Mapping[str, Tensor], config: RingConfig) -> dict[str, Entry]:
    """Tensors under the model's parameter names; the experts of the Hugging Face form as one entry by expert.

    Names with mtp, slope or inv_freq, layers past the last, and the head of a tied model are left out. Raises
    WeightsError if config.json describes more than the tensors hold, which is found before anything is built, or two
    tensors are the same parameter.
    """
    check_sizes(tensors, config)
    out: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        layer, expert = _LAYER.match(name), _EXPERT.match(name)
        is_tied = config.tie_word_embeddings and name.startswith("lm_head.")
        if is_tied or any(part in name for part in SKIPPED) or (layer and int(layer[1]) >= config.num_hidden_layers):
            continue
        entries: Any = out.setdefault(f"{expert[1]}.switch_mlp.{expert[3]}", {}) if expert else out
        key = int(expert[2]) if expert else _ROUTER.sub(r"\1.gate_proj.\2", name)
        if not isinstance(entries, dict) or key in entries:
            raise WeightsError(
                f"{shown(name)} stands for a parameter that another tensor of the checkpoint is too; remove the file "
                "that is not of this checkpoint."
            )
        entries[key] = tensor
    return out


def in_order(name: str, experts: Mapping[int, AnyTensor], count: int) -> list[AnyTensor]:
    """The experts of a stack by number; a WeightsError if one is missing or too many, or differs in shape or dtype."""
    check_numbers(name, experts, count)
    kinds = {str((t.shape, t.dtype)) for t in experts.values()}
    if len(kinds) > 1:
        raise differing(name, kinds)
    return [experts[e] for e in range(count)]


def check_numbers(name: str, experts: Mapping[int, object], count: int) -> None:
    """Raises a WeightsError if the experts of a stack are not numbered from 0 to ``count`` - 1."""
    missing = [str(e) for e in range(count) if e not in experts]
    if missing or len(experts) > count:
        extra = [str(e) for e in sorted(experts) if e >= count]
        raise WeightsError(
            f"{name} should stack experts 0 to {count - 1}, but "
            f"{'lacks ' + some(missing) if missing else 'also has ' + some(extra)}; download the checkpoint again."
        )


def differing(name: str, kinds: Iterable[str]) -> WeightsError:
    """The error about experts that cannot be stacked."""
    return WeightsError(
        f"the experts of {name} differ in shape or dtype: {some(sorted(kinds))}; download the checkpoint again."
    )


def check_sizes(tensors: Mapping[str, Tensor], config: RingConfig) -> None:
    """Check that config.json describes no more layers and parameters than the tensors hold, else a WeightsError."""
    layers = {int(found[1]) for name in tensors if (found := _LAYER.match(name))}
    if config.num_hidden_layers > 1 + max(layers, default=0):
        raise WeightsError(
            f"num_hidden_layers {config.num_hidden_layers} in config.json is more than the layers that there are "
            f"tensors of ({1 + max(layers, default=-1)}); correct it, or download the missing shards."
        )
    elements = sum(math.prod(t.shape) for t in tensors.values())
    parameters = memory.parameter_count(config)
    if parameters > MAX_PACKED * elements:
        raise WeightsError(
            f"config.json describes {parameters:,} parameters, but the tensors hold {elements:,} elements; take the "
            "file from the checkpoint that the tensors are of."
        )


def quantize_like(model: Model, quantization: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> None:
    """Replace modules of ``model`` by quantized ones as config.json and the scales in the files say.

    ``quantization`` is the object in config.json, ``arrays`` the checkpoint under parameter names. Raises a
    WeightsError if a setting does not fit the tensors.
    """

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        named = quantization.get(path)
        if isinstance(named, (bool, Mapping)):
            return dict(named) if isinstance(named, Mapping) else named and f"{path}.scales" in arrays
        if f"{path}.scales" not in arrays or f"{path}.weight" not in arrays:
            return False
        packed, scales = arrays[f"{path}.weight"], arrays[f"{path}.scales"]
        found = inferred_settings(
            module.weight.shape[-1], packed.shape[-1], scales.shape[-1], is_affine=scales.dtype != mx.uint8
        )
        if found is None or not found[0]:
            # MLX would divide by it in native code, which ends the process.
            raise ValueError(f"{path}.scales are of shape {scales.shape}")
        return dict(zip(("group_size", "bits", "mode"), found, strict=True))

    scaled = [name for name in arrays if name.endswith(".global_scale")]
    if scaled:
        raise WeightsError(
            f"{scaled[0]} scales nvfp4 once more, which is not supported; requantize it with ring-mlx convert -q."
        )
    try:
        nn.quantize(
            model,
            group_size=quantization.get("group_size") or 64,
            bits=quantization.get("bits") or 4,
            mode=quantization.get("mode") or "affine",
            class_predicate=settings,
        )
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as e:
        raise WeightsError(f"quantization in config.json does not fit the tensors ({e}); convert again.") from None


def compute_dtype(raw: Mapping[str, Any], tensors: Mapping[str, Tensor], wanted: mx.Dtype | None) -> mx.Dtype:
    """The dtype of floating parameters: the wanted one, else float32 on MLX's CPU backend, else the file's.

    The CPU backend emulates half precision, at up to 40 times the cost of float32.
    """
    if wanted is not None:
        return wanted
    return mx.float32 if mx.default_device() == mx.cpu else file_dtype(raw, tensors)


def file_dtype(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> mx.Dtype:
    """The dtype that config.json names (a WeightsError if it is no text), else the commonest float of the tensors."""
    named = raw.get("torch_dtype") or raw.get("dtype")
    if named is not None and not isinstance(named, str):
        raise WeightsError(f"torch_dtype {shown(named)} in config.json is no text; give bfloat16, float16 or float32.")
    if named in CONFIG_DTYPES:
        return CONFIG_DTYPES[named]
    floats = [t.dtype for t in tensors.values() if t.dtype in FLOATS]
    return DTYPES[max(set(floats), key=floats.count)] if floats else mx.float32


def dtype_name(dtype: mx.Dtype | str) -> str:
    """As config.json names a dtype, such as bfloat16."""
    return str(dtype).removeprefix("mlx.core.")


def check_dtype(tensor: Tensor) -> None:
    """Raises a WeightsError if MLX has no such dtype."""
    if tensor.dtype not in DTYPES:
        raise WeightsError(
            f"{tensor.name} has dtype {tensor.dtype}, which is not supported; use the bfloat16 or the mlx-community "
            "form of the checkpoint."
        )


def load_arrays(
    entries: Mapping[str, Entry], num_experts: int, dtype: mx.Dtype, exact: bool = False
) -> dict[str, mx.array]:
    """Lazy arrays under parameter names: experts stacked, floats cast as `cast` does.

    Raises a WeightsError if a stack is not whole, or MLX has no such dtype.
    """
    opened: dict[Path, dict[str, mx.array]] = {}

    def read(tensor: Tensor) -> mx.array:
        check_dtype(tensor)
        if tensor.file not in opened:
            try:
                opened[tensor.file] = mx.load(str(tensor.file), format="safetensors")  # type: ignore[assignment]
            except (RuntimeError, ValueError) as e:
                raise WeightsError(
                    f"{tensor.file} cannot be loaded ({e}); use another form of the checkpoint."
                ) from None
        return opened[tensor.file][tensor.name]

    return {name: cast(name, array, dtype, exact) for name, array in stacked(entries, num_experts, read)}


def stacked(
    entries: Mapping[str, Entry], num_experts: int, read: Callable[[Any], mx.array]
) -> Iterator[tuple[str, mx.array]]:
    """What `canonical` found, read one after the other, the experts of a stack as one array."""
    for name, entry in entries.items():
        if isinstance(entry, dict):
            yield name, mx.stack([read(each) for each in in_order(name, entry, num_experts)])
        else:
            yield name, read(entry)


def cast(name: str, array: mx.array, dtype: mx.Dtype, exact: bool) -> mx.array:
    """A floating array in ``dtype``; router, expert bias and, if ``exact``, the head in float32."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    array = array.astype(mx.float32 if name.endswith(FLOAT32) else dtype)
    return array.astype(mx.float32) if exact and name == "lm_head.weight" else array


def give(model: Model, arrays: dict[str, mx.array]) -> None:
    """Set the model's parameters, which are computed when they are used, and its evaluation mode; changes ``arrays``.

    Unquantized matrices are laid out by columns for MLX's CPU backend; shapes stay. Its float32 product with a
    transposed matrix takes 1.7 to 2.3 times as long as with a plain one (MLX 0.32.4 on Linux), and a layer multiplies
    by its weight transposed.
    """
    for name, array in arrays.items():
        if lies_by_columns(name, array):
            arrays[name] = mx.contiguous(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    model.load_weights(list(arrays.items()))
    model.eval()


def lies_by_columns(name: str, array: mx.array) -> bool:
    """Whether `give` lays a parameter out by columns; an embedding is read by rows and stays."""
    is_matrix = name.endswith(".weight") and array.ndim > 1 and array.dtype == mx.float32
    return is_matrix and not name.endswith("word_embeddings.weight") and mx.default_device() == mx.cpu


def check(model: Model, arrays: Mapping[str, mx.array], folder: Path | str) -> None:
    """Check the names, shapes and kinds of a checkpoint's parameters against the model's; errors as `check_shapes`."""
    parameters = dict(tree_flatten(model.parameters()))
    common = sorted(set(parameters) & set(arrays))
    kinds = [f"{n} {_kind(arrays[n])}" for n in common if _kind(arrays[n]) != _kind(parameters[n])]
    found, wanted = ({n: tuple(a.shape) for n, a in each.items()} for each in (arrays, parameters))
    check_shapes(found, wanted, folder, kinds)


def check_shapes(found: Shapes, wanted: Shapes, source: Path | str, kinds: Sequence[str] = ()) -> None:
    """Check the shapes of a checkpoint's parameters against those of the model, by name.

    Raises a WeightsError that names ``source`` and lists all missing, unknown and misshapen ones, and ``kinds`` (names
    with a wrong dtype).
    """
    common = sorted(set(found) & set(wanted))
    seen = listed(
        missing=sorted(set(wanted) - set(found)),
        unknown=sorted(set(found) - set(wanted)),
        misshapen=[f"{n} {found[n]} instead of {wanted[n]}" for n in common if found[n] != wanted[n]],
        of_the_wrong_dtype=kinds,
    )
    if seen:
        raise WeightsError(f"{source} does not match its config.json: {seen}. Download it again.")


def listed(**problems: Sequence[str]) -> str:
    """The problems that there are, each kind with some of its names."""
    return "; ".join(f"{what.replace('_', ' ')} {some(names)}" for what, names in problems.items() if names)


def _kind(array: mx.array) -> str:
    """What a parameter's dtype must be: floats are cast, packed ones are taken as they are."""
    return "float" if mx.issubdtype(array.dtype, mx.floating) else dtype_name(array.dtype)
