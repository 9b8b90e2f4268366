"""The options of a conversion, and which of them exclude each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ring_mlx.convert.fit import EFFORTS
from ring_mlx.convert.recipes import Setting, make_setting
from ring_mlx.errors import OptionError

LAYOUTS = ("stacked", "streamed")
TARGETS = {"target_bytes": None, "target_bits": None}


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the result, besides the source.

    Attributes:
        quantize: Whether to quantize.
        bits, group_size, mode: As for ``mx.quantize``.
        dtype: Name of the dtype of floats; None takes the source's.
        dequantize: Whether to store everything in float.
        recipe: One of ``recipes.RECIPES``, the path of a recipe.json, or None for the same bits everywhere.
        target_bytes: Of all tensors; bits are chosen by module so that they are not exceeded and least is lost.
        target_bits: The same for each weight, of all that the model has.
        overrides: "pattern=bits" or "pattern=none"; the last that matches a module's path counts.
        fit: "fast" or "best" search the least squared error, "rtn" rounds to nearest as ``mx.quantize`` does.
        calibrate: Whether each matrix is quantized for what a text puts into it, layer by layer.
        expert_layout: "streamed" puts the three matrices of an expert side by side, in one shard a layer, to be read
            on demand; see `ring_mlx.experts.layout`.
        decay_layer_offset: What config.json says of the decay's layers; None leaves what the source says.
    """

    quantize: bool = False
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    dtype: str | None = None
    dequantize: bool = False
    recipe: str | None = None
    target_bytes: int | None = None
    target_bits: float | None = None
    overrides: Sequence[str] = ()
    fit: str = "fast"
    calibrate: bool = False
    expert_layout: str = "stacked"
    decay_layer_offset: int | str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For manifest and card. Newer options are left out at their defaults, so that older manifests are the same."""
        plain = {"expert_layout": "stacked", "decay_layer_offset": None, "calibrate": False} | TARGETS
        found = asdict(self) | {"overrides": list(self.overrides)}
        if self.has_recipe_file and self.recipe:
            found["recipe"] = Path(self.recipe).name
        return {k: v for k, v in found.items() if k not in plain or v != plain[k]}

    @property
    def has_recipe_file(self) -> bool:
        """Whether ``recipe`` is a file."""
        return (self.recipe or "").endswith(".json")

    @property
    def has_target(self) -> bool:
        """Whether bits are chosen for a size."""
        return self.target_bytes is not None or self.target_bits is not None

    @property
    def setting(self) -> Setting | None:
        """The default setting of quantized modules; None if nothing is to be quantized."""
        return make_setting(self.bits, self.group_size, self.mode) if self.quantize else None

    def check(self) -> None:
        """Raises OptionError if options exclude each other, or MLX has no such setting."""
        if self.quantize and self.dequantize:
            raise OptionError("-q and -d contradict each other; give one.")
        given = {
            "--quant-predicate": self.recipe,
            "--q-override": self.overrides,
            f"--q-mode {self.mode}": self.mode != "affine",
            "--q-bits": self.bits is not None,
            "--q-group-size": self.group_size is not None,
            "--calibrate": self.calibrate,
            "--target-size": self.target_bytes is not None,
            "--target-bits": self.target_bits is not None,
        }
        useless = [flag for flag, is_given in given.items() if is_given]
        if not self.quantize and useless:
            raise OptionError(f"{useless[0]} needs --quantize; add -q.")
        if self.recipe and self.bits is not None:
            raise OptionError(f"--q-bits {self.bits} has no effect on --quant-predicate {self.recipe}; leave one out.")
        for flag, value, choices in (("--q-fit", self.fit, EFFORTS), ("--expert-layout", self.expert_layout, LAYOUTS)):
            if value not in choices:
                raise OptionError(f"{flag} {value!r} is not one of {', '.join(choices)}; choose one.")
        if self.has_target:
            own = "--target-size" if self.target_bits is None else "--target-bits"
            others = {"--target-size": self.target_bits is not None and self.target_bytes is not None}
            for flag in ("--quant-predicate", f"--q-mode {self.mode}", "--q-bits", "--target-size"):
                if others.get(flag, given.get(flag)) and flag != own:
                    raise OptionError(f"{own} chooses the bits itself; leave {flag} out.")
        if self.calibrate and self.mode != "affine":
            raise OptionError(f"--calibrate is for affine quantization, not {self.mode}; leave one out.")
        if self.calibrate and self.expert_layout == "streamed":
            raise OptionError(
                "--calibrate writes stacked experts; leave --expert-layout streamed out, and convert the result with it."
            )
        if self.quantize:
            make_setting(self.bits, self.group_size, self.mode)
