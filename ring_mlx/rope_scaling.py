"""The ``rope_scaling`` of a config.json: which types there are, and that their numbers can be computed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ring_mlx.config_values import is_number, shown
from ring_mlx.errors import ConfigError

ROPE_TYPES = ("default", "linear", "yarn")
ROPE_KEYS = frozenset(
    [
        "type",
        "rope_type",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ]
)
LEAST_FACTOR = 1e-4


def rope_scaling(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling of a config.json with its defaults; None where there is none.

    Raises:
        ConfigError: If it is of another type or has a value that cannot be computed with.
    """
    scaling = values.get("rope_scaling")
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"rope_scaling {shown(scaling)} is not an object; correct config.json.")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ConfigError(
            f"rope_scaling type {shown(kind)} is not supported, only {', '.join(ROPE_TYPES)}; "
            "use a checkpoint with one of them."
        )
    if kind == "default":
        return None
    unknown = sorted(k for k, v in scaling.items() if k not in ROPE_KEYS and v is not None)
    unknown = [k for k in unknown if k not in ("rope_theta", "partial_rotary_factor")]
    if unknown:
        raise ConfigError(f"rope_scaling key {shown(unknown[0])} is not supported; remove it or use mlx-lm.")
    kept = {k: v for k, v in scaling.items() if k in ROPE_KEYS and v is not None} | {"type": kind}
    if kind == "yarn":
        kept.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    _check_scaling(kept)
    return kept


def _check_scaling(scaling: Mapping[str, Any]) -> None:
    for key in sorted(ROPE_KEYS - {"type", "rope_type"}):
        value = scaling.get(key)
        positive = not key.startswith("mscale")
        if key != "factor" and value is None:
            continue
        if not is_number(value) or (value <= 0 if positive else value < 0):
            kind = "positive" if positive else "finite"
            raise ConfigError(f"rope_scaling {key} {shown(value)} is not a {kind} number; correct config.json.")
    if not LEAST_FACTOR <= scaling["factor"] <= 1 / LEAST_FACTOR:
        raise ConfigError(
            f"rope_scaling factor {shown(scaling['factor'])} is not between {LEAST_FACTOR} and {1 / LEAST_FACTOR:.0f}; "
            "correct config.json."
        )
