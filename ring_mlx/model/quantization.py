"""What a config.json says of quantisation: MLX's own settings, or the name of a form that must be converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ring_mlx.errors import WeightsError
from ring_mlx.model.config_values import is_count, shown

NUMBERS, WORDS = ("bits", "group_size"), ("mode", "quant_method")
MOST_BITS, MOST_GROUP = 32, 1 << 16
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
    """The checked ``quantization`` of a config.json: group_size, bits, mode, and settings or False by module.

    Raises:
        WeightsError: If it is of another kind.
    """
    found = _object(raw, "quantization")
    if found is None:
        return None
    _check("quantization", found)
    for path, value in found.items():
        if path in NUMBERS + WORDS or not isinstance(value, (Mapping, type(None))):
            continue
        if value is None or None in value.values():
            raise WeightsError(
                f"quantization of {shown(path)} is {shown(value)} in config.json, which leaves its form open; write "
                "group_size, bits and mode there, or convert again."
            )
        _check(path, value)
    return found


def foreign_method(raw: Mapping[str, Any]) -> str | None:
    """The ``quant_method`` of weights that MLX cannot take as they are; None without one.

    Raises:
        WeightsError: If ``quantization_config`` is of another kind.
    """
    method = (_object(raw, "quantization_config") or {}).get("quant_method")
    return None if raw.get("quantization") is not None or method is None else str(method)


def loadable_settings(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `settings` of weights that MLX takes as they are.

    Raises:
        WeightsError: If they need a conversion first, or the settings are of another kind.
    """
    method = foreign_method(raw)
    if method is not None:
        raise WeightsError(
            f"quantization method {shown(method)} cannot be loaded as it is; use the bfloat16 or the mlx-community form, "
            "or make one with ring-mlx convert."
        )
    return settings(raw)


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
