"""The rotary embedding in a config.json: its two spellings as one, which types there are, and numbers that can be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ring_mlx.config_values import MOST_INTEGER, is_number, shown
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
# Keys of the model itself that newer files put beside those of the scaling.
MODEL_KEYS = ("rope_theta", "partial_rotary_factor")
LEAST_FACTOR = 1e-4


def one_spelling(values: dict[str, Any]) -> None:
    """Bring what ``rope_parameters`` and ``rope_scaling`` say to the keys of the model and to ``rope_scaling``.

    Raises:
        ConfigError: If one is not an object or has an unknown key, or two places say different things.
    """
    top = {k: values[k] for k in MODEL_KEYS if values.get(k) is not None}
    found: dict[str, tuple[str, Any]] = {k: ("config.json", v) for k, v in top.items()}
    for place in ("rope_parameters", "rope_scaling"):
        for key, value in _known(place, values.get(place)):
            before = found.setdefault(key, (place, value))
            if before[1] != value:
                raise ConfigError(
                    f"{key} {shown(value)} in {place} contradicts {shown(before[1])} in {before[0]}; remove the wrong "
                    "one from config.json."
                )
    values |= {k: found.pop(k)[1] for k in MODEL_KEYS if k in found}
    values["rope_scaling"] = {k: v for k, (_, v) in found.items()}


def _known(place: str, given: object) -> Iterator[tuple[str, Any]]:
    """The keys of one place and their values, with one name for the type; null is absent."""
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{place} {shown(given)} is not an object; correct config.json.")
    for key, value in (given or {}).items():
        if value is None or (key == "truncate" and value is True):  # what is done without the key
            continue
        if key not in ROPE_KEYS and key not in MODEL_KEYS:
            raise ConfigError(f"{place} key {shown(key)} is not supported; remove it from config.json.")
        yield "type" if key == "rope_type" else key, value


def rope_scaling(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling with its defaults, of a file in `one_spelling`; None where there is none.

    Raises:
        ConfigError: If it is of another type or has a value that cannot be computed with.
    """
    scaling = dict(values["rope_scaling"])
    kind = scaling.setdefault("type", "default")
    if kind not in ROPE_TYPES:
        raise ConfigError(
            f"rope_scaling type {shown(kind)} is not supported, only {', '.join(ROPE_TYPES)}; "
            "use a checkpoint with one of them."
        )
    if kind == "default":
        if scaling.get("factor", 1) != 1:
            raise ConfigError(
                f"rope_scaling factor {shown(scaling['factor'])} is of no type; write one of {', '.join(ROPE_TYPES[1:])} "
                "as its type into config.json, or remove it."
            )
        return None
    scaling.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    _check_scaling(scaling)
    return scaling


def lengthened(context: int, scaling: Mapping[str, Any] | None) -> int:
    """The context with the scaling: its factor times the original one, where that is more than ``context``."""
    if scaling is None:
        return context
    return max(context, round(scaling["factor"] * scaling["original_max_position_embeddings"]))


def _check_scaling(scaling: Mapping[str, Any]) -> None:
    for key in sorted(ROPE_KEYS - {"type", "rope_type"}):
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
