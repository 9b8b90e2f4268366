"""One or two matrices that share an input, as the kernel takes them; formats checked and arguments prepared once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from metal_kernels.packed import Packed
from metal_kernels.quantized_moe.experts import MIN_SIZE, arrays, format_of, format_template, is_readable


@dataclass
class Matrices:
    """Matrices [N, K] of one format; build it once a layer.

    Args:
        first: [N, K].
        second: [M, K], or None.

    Attributes:
        supported: Whether the kernel reads this format.
        width: K.
        form: The kernel's arguments that say how both are packed.
        sizes: N and M, 0 for no second matrix.
        prepared: What the wrappers work out once, kept from call to call.
    """

    first: Packed
    second: Packed | None = None
    supported: bool = field(init=False)
    width: int = field(init=False)
    form: dict[str, int] = field(init=False)
    sizes: tuple[int, int] = field(init=False)
    prepared: dict[object, Any] = field(init=False, default_factory=dict, repr=False)
    arrays: list[mx.array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.supported = all(
            w.weight.ndim == 2
            and w.weight.size >= MIN_SIZE
            and is_readable(w)
            and format_of(w) == format_of(self.first)
            for w in self.all
        )
        self.form = dict(format_template(self.first)) if self.supported else {"N": 0, "K": 0}
        N, self.width = self.form.pop("N"), self.form["K"]
        other = self.second or self.first
        self.sizes = N, 0 if self.second is None else int(other.weight.shape[0])
        self.supported = self.supported and self.first.weight.shape[1:] == other.weight.shape[1:]
        self.arrays = [*arrays(self.first), *arrays(other)]

    @property
    def all(self) -> tuple[Packed, ...]:
        """The matrices that there are."""
        return (self.first,) if self.second is None else (self.first, self.second)
