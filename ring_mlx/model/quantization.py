"""The only reader of quantization settings in a config.json: MLX's own, and those of forms that must be converted."""

from __future__ import annotations

from collections.abc import Mapping
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
    if method is not None:
        raise WeightsError(
            f"quantization method {shown(method)} cannot be loaded as it is; use the bfloat16 or the mlx-community form, "
            "or make one with ring-mlx convert."
        )
    return settings(raw)


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


def gptq_settings(raw: Mapping[str, Any]) -> tuple[int, bool, int]:
    """Of GPTQ: bits, whether columns are out of order, and what a stored zero point lacks (1 in version 1)."""
    found: Mapping[str, Any] = raw.get("quantization_config") or {}
    if found.get("quant_method") != "gptq":
        raise WeightsError(
            f"quantization method {found.get('quant_method')!r} is not supported; use GPTQ, compressed-tensors, FP8 or "
            "float weights."
        )
    return int(found.get("bits", 4)), bool(found.get("desc_act")), int(found.get("checkpoint_format") != "gptq_v2")


def compressed_bits(raw: Mapping[str, Any]) -> int:
    """The bits of compressed-tensors; a WeightsError if it has several, or is not pack-quantized."""
    found: Mapping[str, Any] = raw.get("quantization_config") or {}
    if found.get("format") not in (None, "pack-quantized"):
        raise WeightsError(
            f"compressed-tensors format {found.get('format')!r} is not supported, only 'pack-quantized'; use another "
            "form of the checkpoint."
        )
    bits = {int((g.get("weights") or {}).get("num_bits", 4)) for g in (found.get("config_groups") or {}).values()}
    if len(bits) > 1:
        raise WeightsError(
            f"compressed-tensors with {' and '.join(map(str, sorted(bits)))} bits in one checkpoint is not supported; "
            "use another form."
        )
    return bits.pop() if bits else 4


def fp8_block(raw: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block of FP8 that has one scale."""
    block = (raw.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    return int(block[0]), int(block[1])


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
