"""The only reader of quantization settings in a config.json: MLX's own, and those of forms that must be converted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ring_mlx.errors import WeightsError
from ring_mlx.model.config_values import is_count, shown

# Group size and bits that MLX takes where none are given.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
FLOAT_MODES = {mode: form for mode, form in MODES.items() if mode != "affine"}
NUMBERS, WORDS = ("bits", "group_size"), ("mode", "quant_method")
MOST_BITS, MOST_GROUP = 32, 1 << 16
FLOAT_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
# Of a method that keeps its weights in another form, though it may count its bits as MLX does.
FOREIGN = ("desc_act", "sym", "zero_point", "checkpoint_format", "version", "config_groups", "weight_block_size")

# What `ring_mlx.convert` reads. Others are named, by the method in config.json or by how names of tensors end.
CONVERTIBLE = ("gptq", "compressed-tensors", "fp8", "fbgemm_fp8", "modelopt")
SIGNS = {
    "SCB": "bitsandbytes int8",
    "absmax": "bitsandbytes nf4 or fp4",
    "q_scale_max": "EXL2",
    "trellis": "EXL3",
    "W_q": "HQQ",
    "_data": "quanto",
    "_weight_qdata": "torchao",
    "codebooks": "AQLM",
    "centroids": "VPTQ",
    "bitmask": "a sparse form of compressed-tensors",
}
OTHER_FORMS = "use its bfloat16, FP8, GPTQ, compressed-tensors int4 or mlx-community form"


def with_settings(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json with MLX's settings under ``quantization``, also where only ``quantization_config`` has them."""
    found = raw.get("quantization_config")
    if raw.get("quantization") is not None or not isinstance(found, Mapping):
        return raw
    is_ours = found.get("quant_method") in (None, "mlx") and not any(key in found for key in FOREIGN)
    return raw | {"quantization": dict(found)} if is_ours and any(key in found for key in NUMBERS) else raw


def settings(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checked ``quantization`` of a config.json: group_size, bits, mode, and settings or False by module."""
    found = _object(raw, "quantization")
    if found is None:
        return None
    _check("quantization", found)
    for path, value in found.items():
        if path in NUMBERS + WORDS or not isinstance(value, (Mapping, type(None))):
            continue
        if value is None:
            raise WeightsError(
                f"quantization of {shown(path)} is null in config.json, which leaves its form open; write group_size, "
                "bits and mode there, or convert again."
            )
        _check(path, value)
        found[path] = without_nulls(value)
    return without_nulls(found)


def without_nulls(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a module, with MLX's defaults of its mode where they are null, as mlx_lm.convert writes them."""
    given = {k: v for k, v in entry.items() if v is not None}
    defaults = dict(zip(("group_size", "bits"), MODES.get(given.get("mode", "affine"), ()), strict=False))
    return {k: v for k, v in defaults.items() if k in entry} | given


def bits_of(raw: Mapping[str, Any]) -> int | None:
    """The bits of a checkpoint's weights, as its config.json has them; None if it does not say."""
    found = raw.get("quantization")
    if isinstance(found, Mapping):
        return found["bits"] if is_count(found.get("bits")) else None
    return FLOAT_BITS.get(str(raw.get("dtype") or raw.get("torch_dtype")))


def foreign_method(raw: Mapping[str, Any]) -> str | None:
    """The ``quant_method`` of weights that MLX cannot load as they are; None without one."""
    method = (_object(raw, "quantization_config") or {}).get("quant_method")
    return None if raw.get("quantization") is not None or method is None else str(method)


def loadable_settings(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `settings` of weights that MLX can load as they are; a WeightsError if they need a conversion first."""
    method = foreign_method(raw)
    if method in CONVERTIBLE:
        raise WeightsError(
            f"quantization method {shown(method)} cannot be loaded as it is; use the bfloat16 or the mlx-community form, "
            "or make one with ring-mlx convert."
        )
    if method is not None:
        raise _unreadable(raw, method)
    return settings(raw)


def check_readable(raw: Mapping[str, Any], names: Iterable[str], has_codes: bool) -> None:
    """Raises a WeightsError that names a format of weights which `ring_mlx.convert` cannot read.

    ``names`` are those of the tensors; ``has_codes`` says whether any of them is no float: else the method in
    config.json is only left over.
    """
    found, method = raw.get("quantization_config") or {}, foreign_method(raw)
    if method is not None and method not in CONVERTIBLE and has_codes:
        raise _unreadable(raw, method)
    signs = [SIGNS[end] for name in names if (end := name.rpartition(".")[2]) in SIGNS]
    if signs:
        raise WeightsError(f"the weights are in {signs[0]}, which is not supported; {OTHER_FORMS}.")
    if isinstance(found, Mapping) and (found.get("transform_config") or {}).get("config_groups"):
        raise WeightsError(
            "the weights are rotated (transform_config of compressed-tensors), which this model's code does not undo; "
            f"{OTHER_FORMS}."
        )


def _unreadable(raw: Mapping[str, Any], method: str) -> WeightsError:
    found, remedy = raw.get("quantization_config") or {}, OTHER_FORMS
    if method == "bitsandbytes":
        kind = "int8" if found.get("load_in_8bit") else str(found.get("bnb_4bit_quant_type", "4 bits"))
        method, remedy = f"{method} ({kind})", f"{remedy}, or save it after transformers' model.dequantize()"
    return WeightsError(f"quantization method {shown(method)} is not supported; {remedy}.")


def inferred_settings(cols: int, packed_cols: int, groups: int, is_affine: bool) -> tuple[int, int, str] | None:
    """Group size, bits and mode of a packed matrix by its columns and those of its words and scales; None if unknown.

    ``is_affine`` says whether it has float scales.
    """
    group, bits = cols // max(1, groups), packed_cols * 32 // max(1, cols)
    mode = "affine" if is_affine else next((m for m, form in FLOAT_MODES.items() if form == (group, bits)), None)
    return (group, bits, mode) if bits and mode else None


def module_settings(
    raw: Mapping[str, Any], path: str, cols: int, packed_cols: int, groups: int, is_affine: bool
) -> tuple[int, int, str] | None:
    """The settings that config.json names for a module, else `inferred_settings`: its general ones may not hold."""
    named = (raw.get("quantization") or {}).get(path)
    if isinstance(named, Mapping):
        named = without_nulls(named)
        return int(named["group_size"]), int(named["bits"]), str(named.get("mode", "affine"))
    return inferred_settings(cols, packed_cols, groups, is_affine)


def gptq_settings(raw: Mapping[str, Any], words: int, cols: int) -> tuple[int, int | None, bool, bool]:
    """Of GPTQ: bits, group size, whether columns are out of order, and whether zero points are version 1's.

    Where modules have settings of their own (``dynamic``), the bits are those of ``words`` for ``cols``.
    """
    found: Mapping[str, Any] = raw.get("quantization_config") or {}
    if found.get("quant_method") != "gptq":
        raise WeightsError(
            f"quantization method {found.get('quant_method')!r} is not supported; use GPTQ, compressed-tensors, FP8 or "
            "float weights."
        )
    form = found.get("checkpoint_format") or found.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise WeightsError(
            f"GPTQ's checkpoint_format {shown(form)} is not supported, only 'gptq' and 'gptq_v2'; save it so with "
            "gptqmodel, or use another form of the checkpoint."
        )
    bits, size, is_mixed = int(found.get("bits", 4)), found.get("group_size"), bool(found.get("desc_act"))
    if own := found.get("dynamic"):
        is_mixed = is_mixed or any(bool(each.get("desc_act")) for each in own.values())
        bits, size = (words * 32 // cols if cols else bits), None
    return bits, None if size is None else int(size), is_mixed, form == "gptq"


def compressed_schemes(raw: Mapping[str, Any]) -> list[tuple[int, int | None]]:
    """Bits and group size of each scheme of packed compressed-tensors; a WeightsError if they are packed otherwise."""
    found: Mapping[str, Any] = raw.get("quantization_config") or {}
    if found.get("format") not in (None, "pack-quantized", "mixed-precision"):
        raise WeightsError(
            f"compressed-tensors format {shown(found.get('format'))} is not supported, only 'pack-quantized', "
            "'float-quantized' and 'mxfp8-quantized'; use another form of the checkpoint."
        )
    weights = [g.get("weights") or {} for g in (found.get("config_groups") or {}).values()]
    schemes = [(int(w.get("num_bits", 4)), w.get("group_size")) for w in weights if w.get("type", "int") == "int"]
    return [(bits, None if size is None else int(size)) for bits, size in schemes] or [(4, None)]


def fp8_blocks(raw: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns that may have one scale in FP8: as config.json names them, else 128 and 128."""
    found: Mapping[str, Any] = raw.get("quantization_config") or {}
    weights = [g.get("weights") or {} for g in (found.get("config_groups") or {}).values()]
    named = [found.get("weight_block_size"), *(w.get("block_structure") for w in weights)]
    # Older versions of compressed-tensors wrote "128x128".
    split = [b.split("x") if isinstance(b, str) else b for b in named if b]
    blocks = [(int(rows), int(cols)) for rows, cols in split] or [(128, 128)]
    if min(map(min, blocks)) < 1:
        raise WeightsError(f"a block of {shown(named)} is not two sizes above 0; correct config.json.")
    return blocks


def _object(raw: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise WeightsError(f"{key} {shown(value)} in config.json is not an object; correct it.")
    return None if value is None else dict(value)


def _check(path: str, found: Mapping[str, Any]) -> None:
    for key, most in zip(NUMBERS, (MOST_BITS, MOST_GROUP), strict=True):
        value = found.get(key)
        if value is not None and not (is_count(value) and value <= most):
            raise WeightsError(
                f"{key} {shown(value)} of {shown(path)} in config.json is not an integer from 1 to {most}; correct it, "
                "or convert again."
            )
    if not isinstance(found.get("mode") or "", str):
        raise WeightsError(f"mode {shown(found['mode'])} of {shown(path)} in config.json is not text; correct it.")
