"""Bits, groups and modes of quantized matrices, and which module gets which."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_mlx.errors import OptionError
from ring_mlx.model.quantization import MODES
from ring_mlx.system.regular_files import MAX_JSON_BYTES, parse_object, read_bounded

AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
READ_BITS = (1, *AFFINE_BITS)  # MLX has one bit too, which no model of this family survives
MIXED = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
RING = {"ring-q3": 3, "ring-q4": 4, "ring-q5": 5, "ring-q6": 6}
RING_REST_BITS = 8
RECIPES = (*MIXED, *RING)
ROUTER = "mlp.gate.gate_proj"
ROUTER_BITS = 8

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Setting:
    """How a matrix is quantized, in MLX's words."""

    group_size: int
    bits: int
    mode: str = "affine"

    def as_config(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


Rule = Callable[[str], Setting | None]


def make_setting(bits: int | None, group_size: int | None, mode: str) -> Setting:
    """A setting, with the mode's own group size and bits where None; an OptionError if MLX has no such format."""
    if mode not in MODES:
        raise OptionError(f"--q-mode {mode!r} is not one of {', '.join(MODES)}; choose one.")
    group, default = MODES[mode]
    setting = Setting(group_size or group, bits or default, mode)
    if mode != "affine" and (setting.group_size, setting.bits) != (group, default):
        raise OptionError(
            f"{mode} has {default} bits in groups of {group}, not {setting.bits} in {setting.group_size}; "
            "leave --q-bits and --q-group-size out."
        )
    if mode == "affine" and (setting.bits not in AFFINE_BITS or setting.group_size not in AFFINE_GROUPS):
        raise OptionError(
            f"{setting.bits} bits in groups of {setting.group_size} is not possible; MLX takes "
            f"{', '.join(map(str, AFFINE_BITS))} bits in groups of {', '.join(map(str, AFFINE_GROUPS))}."
        )
    return setting


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe that `convert` wrote, whose ``bits`` are by module; an OptionError if it is none."""

    def refused(seen: str) -> OptionError:
        return OptionError(f"--quant-predicate {path} is no recipe ({seen}); give recipe.json of a conversion.")

    try:
        recipe = parse_object(read_bounded(path, MAX_JSON_BYTES, refused), path.name, refused)
    except OSError as e:
        raise refused(e.strerror or type(e).__name__) from None
    bits = recipe.get("bits")
    if not isinstance(bits, dict) or not all(type(b) is int and b in AFFINE_BITS for b in bits.values()):
        raise refused("it names no bits by module that MLX has")
    return recipe


def make_rule(
    default: Setting,
    recipe: str | None,
    overrides: Sequence[str],
    num_layers: int,
    bits: Mapping[str, int] | None = None,
) -> Rule:
    """Which setting a module gets: of the last override that matches, else its ``bits``, the recipe's, or the default.

    The router is never quantized, except to 8 bits by an override that names it. Raises an OptionError if the recipe or
    an override is unknown or malformed.
    """
    parsed = [_parse_override(text, default) for text in overrides]
    base = _recipe(recipe, default, num_layers) if bits is None else _by_module(bits, default)

    def rule(path: str) -> Setting | None:
        for pattern, setting in reversed(parsed):
            if fnmatch.fnmatchcase(path, f"*{pattern}*"):
                return _for_router(pattern, setting) if path.endswith(ROUTER) else setting
        return None if path.endswith(ROUTER) else base(path)

    return rule


def unmatched(overrides: Iterable[str], paths: Sequence[str]) -> list[str]:
    """The overrides whose pattern matches no path."""
    return [t for t in overrides if not any(fnmatch.fnmatchcase(p, f"*{t.rsplit('=', 1)[0]}*") for p in paths)]


def uses_more_bits(layer: int, num_layers: int) -> bool:
    """Whether a mixed recipe gives this layer more bits: the first and last eighth, and every third between.

    Source: the rule of mlx_lm.convert, which took it from llama.cpp's Q4_K_M.
    """
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _by_module(bits: Mapping[str, int], default: Setting) -> Rule:
    def rule(path: str) -> Setting:
        if path not in bits:
            raise OptionError(f"the recipe names no bits for {path}; give that of a conversion of the same model.")
        return Setting(default.group_size, bits[path])

    return rule


def _recipe(recipe: str | None, default: Setting, num_layers: int) -> Rule:
    if recipe is None:
        return lambda path: default
    if recipe not in RECIPES:
        raise OptionError(
            f"--quant-predicate {recipe!r} is not one of {', '.join(RECIPES)}, nor a recipe.json; choose one."
        )
    if default.mode != "affine":
        raise OptionError(f"--quant-predicate {recipe} is for affine quantization, not {default.mode}; leave one out.")
    if recipe in RING:
        low, high = Setting(default.group_size, RING[recipe]), Setting(default.group_size, RING_REST_BITS)
        return lambda path: low if ".switch_mlp." in path else high
    low, high = (Setting(default.group_size, bits) for bits in MIXED[recipe])

    def mixed(path: str) -> Setting:
        found = _LAYER.search(path)
        if path.startswith("lm_head"):
            return high
        # query_key_value holds the values, which mlx-lm's recipes name v_proj.
        chosen = path.endswith(("down_proj", "query_key_value"))
        return high if found and chosen and uses_more_bits(int(found[1]), num_layers) else low

    return mixed


def _parse_override(text: str, default: Setting) -> tuple[str, Setting | None]:
    pattern, sign, value = text.rpartition("=")
    if not pattern or not sign or not (value.isdigit() or value == "none"):
        raise OptionError(f"--q-override {text!r} is not 'pattern=bits' or 'pattern=none'; write it so.")
    if value in ("none", "16", "32"):
        return pattern, None
    return pattern, make_setting(int(value), default.group_size if default.mode == "affine" else None, "affine")


def _for_router(pattern: str, setting: Setting | None) -> Setting | None:
    # A pattern that is meant for other modules leaves the router alone; one that names it must be right.
    if setting is None or "gate.gate_proj" not in pattern:
        return None
    if setting.bits != ROUTER_BITS:
        raise OptionError(
            f"--q-override {pattern}={setting.bits} would harm the router; give it {ROUTER_BITS} bits or none."
        )
    return setting
