"""What `mx.fast.metal_kernel` is told once about a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx

from metal_kernels.twin.attributes import KERNEL_ATTRIBUTES

TemplateValue = bool | int | mx.Dtype
Template = Sequence[tuple[str, TemplateValue]]

INTEGERS = (mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64)
METAL_TYPES = {mx.bool_: "bool", mx.float32: "float"} | {
    dtype: f"{str(dtype).removeprefix('mlx.core.')}_t" for dtype in (*INTEGERS, mx.float16, mx.bfloat16, mx.complex64)
}
# MLX puts smaller inputs into the constant address space.
MIN_DEVICE_SIZE = 8


class ShapeUse(NamedTuple):
    """Which facts of an input's shape the body names."""

    shape: bool
    strides: bool
    ndim: bool


@dataclass(frozen=True)
class KernelSpec:
    """The arguments of `mx.fast.metal_kernel`, and what follows from the body alone."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    shape_uses: tuple[ShapeUse, ...] = field(init=False)
    attributes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        object.__setattr__(self, "input_names", tuple(self.input_names))
        object.__setattr__(self, "output_names", tuple(self.output_names))
        uses = tuple(
            ShapeUse(f"{n}_shape" in self.source, f"{n}_strides" in self.source, f"{n}_ndim" in self.source)
            for n in self.input_names
        )
        object.__setattr__(self, "shape_uses", uses)
        object.__setattr__(self, "attributes", tuple(a for a in KERNEL_ATTRIBUTES if a in self.source))

    def check_counts(self, inputs: Sequence[object], shapes: Sequence[object], dtypes: Sequence[object]) -> None:
        """Raises ValueError, in MLX's words, unless there is one of each for each name."""
        for what, got, names in (
            ("inputs", inputs, self.input_names),
            ("output_shapes", shapes, self.output_names),
            ("output_dtypes", dtypes, self.output_names),
        ):
            if len(got) != len(names):
                raise ValueError(f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(got)}.")
