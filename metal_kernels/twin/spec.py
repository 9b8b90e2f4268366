"""What `mx.fast.metal_kernel` is told once about a kernel, and the Metal function that MLX writes around its body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx

from metal_kernels.twin.attributes import KERNEL_ATTRIBUTES

TemplateValue = bool | int | mx.Dtype
Template = Sequence[tuple[str, TemplateValue]]

METAL_TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
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
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    shape_uses: tuple[ShapeUse, ...] = field(init=False)
    attributes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
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

    def metal_function(
        self, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], template: Template
    ) -> tuple[str, str, str]:
        """MLX's own text for these arguments (less its preamble), the function's name, and the name to instantiate.

        Raises:
            ValueError: In MLX's words, for a template value that it does not take, such as a float.
        """
        if not all(_is_template_value(v) for _, v in template):
            raise ValueError("[metal_kernel] Invalid template argument. Must be `mlx.core.Dtype`, `int` or `bool`.")
        arguments = f"<{', '.join(_template_argument(v) for _, v in template)}>" if template else ""
        name = self._function_name(inputs, output_dtypes, arguments)
        text = self.header
        if template:
            text += f"template <{', '.join(f'{_template_kind(v)} {k}' for k, v in template)}>\n"
        text += f"[[kernel]] void {name}(\n" + ",\n".join(self._parameters(inputs, output_dtypes))
        text += f") {{\n{self.source}\n}}\n"
        if template:
            instance = f"{name}{arguments}"
            text += f'\ntemplate [[host_name("{name}")]] [[kernel]] decltype({instance}) {instance};\n'
        return text, name, name + arguments

    def _function_name(self, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], arguments: str) -> str:
        name = f"custom_kernel_{self.name}"
        if arguments:
            flat = arguments.replace("<", "_").replace(">", "_").replace(", ", "_").replace("-", "_")
            name += f"_{flat[:-1]}"
        for a in inputs:
            kind = "s" if a.ndim == 0 else "c" if a.size < MIN_DEVICE_SIZE else ""
            name += f"_{METAL_TYPES[a.dtype]}{kind}"
        return name + "".join(f"_{METAL_TYPES[d]}" for d in output_dtypes)

    def _parameters(self, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype]) -> list[str]:
        buffers = []
        for name, a, use in zip(self.input_names, inputs, self.shape_uses, strict=True):
            space = "constant" if a.size < MIN_DEVICE_SIZE else "device"
            buffers.append(f"const {space} {METAL_TYPES[a.dtype]}{'*' if a.ndim else '&'} {name}")
            if a.ndim and use.shape:
                buffers.append(f"const constant int* {name}_shape")
            if a.ndim and use.strides:
                buffers.append(f"const constant int64_t* {name}_strides")
            if a.ndim and use.ndim:
                buffers.append(f"const constant int& {name}_ndim")
        for name, dtype in zip(self.output_names, output_dtypes, strict=True):
            type_ = METAL_TYPES[dtype]
            buffers.append(f"device {f'atomic<{type_}>' if self.atomic_outputs else type_}* {name}")
        numbered = [f"  {text} [[buffer({i})]]" for i, text in enumerate(buffers)]
        return numbered + [f"  {KERNEL_ATTRIBUTES[a]} {a} [[{a}]]" for a in self.attributes]


def _is_template_value(value: object) -> bool:
    return value in METAL_TYPES if isinstance(value, mx.Dtype) else isinstance(value, int) and -(2**31) <= value < 2**31


def _template_argument(value: TemplateValue) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value) if isinstance(value, int) else METAL_TYPES[value]


def _template_kind(value: TemplateValue) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "typename"
