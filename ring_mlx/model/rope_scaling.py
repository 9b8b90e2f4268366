"""The rotary embedding in a config.json: its two spellings as one, which types there are, and numbers that can be used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ring_mlx.errors import ConfigError
from ring_mlx.model.config_values import MOST_INTEGER, is_count, is_number, shown

SCALING_KEYS = frozenset(["type", "factor", "original_max_position_embeddings"])
YARN_KEYS = SCALING_KEYS | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
# Which keys say something of each type; all else is refused.
ROPE_TYPES = {"default": SCALING_KEYS, "linear": SCALING_KEYS, "yarn": YARN_KEYS}
# Keys of the model itself that newer files put beside those of the scaling.
MODEL_KEYS = ("rope_theta", "partial_rotary_factor")
LEAST_FACTOR = 1e-4


def one_spelling(values: dict[str, Any]) -> None:
    """Turn ``rope_parameters`` and ``rope_scaling`` into the model's keys and ``rope_scaling``.

    Raises ConfigError if one is not an object, or has an unknown type or key, or two places say different things.
    """
    top = {k: values[k] for k in MODEL_KEYS if values.get(k) is not None}
    found: dict[str, tuple[str, Any]] = {k: ("config.json", v) for k, v in top.items()}
    for place in ("rope_parameters", "rope_scaling"):
        for key, value in _known(place, values.get(place)):
            before = found.setdefault(key, (place, value))
            if before != (place, value) and before[1] != value:
                raise ConfigError(
                    f"{key} {shown(value)} in {place} contradicts {shown(before[1])} in {before[0]}; remove the wrong "
                    "one from config.json."
                )
    values |= {k: found.pop(k)[1] for k in MODEL_KEYS if k in found}
    _check_keys(found)
    values["rope_scaling"] = {k: v for k, (_, v) in found.items()}


def _known(place: str, given: object) -> Iterator[tuple[str, Any]]:
    """The keys of one place and their values, with one name for the type; null is absent."""
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{place} {shown(given)} is not an object; correct config.json.")
    for key, value in (given or {}).items():
        if value is not None and not (key == "truncate" and value is True):  # what is done without the key
            yield "type" if key == "rope_type" else key, value


def _check_keys(found: Mapping[str, tuple[str, Any]]) -> None:
    """Refuse a type that the model does not have, and a key that the type does not have."""
    place, kind = found.get("type", ("", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ConfigError(
            f"{place} type {shown(kind)} is not supported, only {', '.join(ROPE_TYPES)}; "
            "use a checkpoint with one of them."
        )
    for key, (place, _) in found.items():
        if key not in ROPE_TYPES[kind]:
            raise ConfigError(
                f"{place} key {shown(key)} is not supported with the type {kind}; remove it from config.json."
            )


def rope_scaling(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling with its defaults, of a file in `one_spelling`; None where there is none.

    Raises ConfigError if it has a value that cannot be computed with.
    """
    scaling = dict(values["rope_scaling"])
    if scaling.setdefault("type", "default") == "default":
        if scaling.get("factor", 1) != 1:
            raise ConfigError(
                f"rope_scaling factor {shown(scaling['factor'])} is of no type; write {' or '.join([*ROPE_TYPES][1:])} "
                "as its type into config.json, or remove it."
            )
        return None
    scaling.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    _check_scaling(scaling)
    return scaling


def fill_partial_rotary(values: dict[str, Any]) -> None:
    """Set ``partial_rotary_factor`` from ``rotary_dim``; a ConfigError if they contradict each other."""
    rotary_dim, factor, head_dim = (values.get(k) for k in ("rotary_dim", "partial_rotary_factor", "head_dim"))
    if rotary_dim is None or not is_count(head_dim):
        return
    if not is_count(rotary_dim):
        raise ConfigError(f"rotary_dim {shown(rotary_dim)} is not of type int; correct config.json.")
    if factor is None:
        values["partial_rotary_factor"] = rotary_dim / head_dim
    elif is_number(factor) and int(head_dim * factor) != rotary_dim:
        raise ConfigError(
            f"rotary_dim {rotary_dim} contradicts head_dim {head_dim} x partial_rotary_factor {factor}; "
            "correct config.json from the original checkpoint."
        )


def attention_factor(scaling: Mapping[str, Any]) -> float:
    """The factor of the rotated dimensions under YaRN, as transformers computes it.

    mlx-lm's own takes ``mscale`` and ``mscale_all_dim`` alone too, and no ``attention_factor``.
    """
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    stretch = 0.1 * max(0.0, math.log(scaling["factor"]))
    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return (1 + above * stretch) / (1 + below * stretch) if above and below else 1 + stretch


def _check_scaling(scaling: Mapping[str, Any]) -> None:
    for key in sorted(YARN_KEYS - {"type"}):
        value = scaling.get(key)
        positive = not key.startswith("mscale")
        if key != "factor" and value is None:
            continue
        if not is_number(value) or (value <= 0 if positive else value < 0):
            kind = "positive" if positive else "finite"
            raise ConfigError(f"rope_scaling {key} {shown(value)} is not a {kind} number; correct config.json.")
    original = scaling["original_max_position_embeddings"] or 1  # a lack is told with those of other keys
    if scaling["factor"] * original > MOST_INTEGER:
        raise ConfigError(
            f"rope_scaling factor {shown(scaling['factor'])} x original_max_position_embeddings {shown(original)} is "
            f"beyond {MOST_INTEGER:,}; correct config.json."
        )
    if not LEAST_FACTOR <= scaling["factor"] <= 1 / LEAST_FACTOR:
        raise ConfigError(
            f"rope_scaling factor {shown(scaling['factor'])} is not between {LEAST_FACTOR} and {1 / LEAST_FACTOR:.0f}; "
            "correct config.json."
        )
