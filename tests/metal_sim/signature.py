"""The Metal function that MLX writes around a kernel's body."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from metal_kernels.twin.attributes import KERNEL_ATTRIBUTES
from metal_kernels.twin.spec import METAL_TYPES, MIN_DEVICE_SIZE, KernelSpec, Template, TemplateValue


def metal_function(
    spec: KernelSpec, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], template: Template
) -> tuple[str, str, str]:
    """MLX's own text for these arguments (less its preamble), the function's name, and the name to instantiate.

    Raises:
        ValueError: In MLX's words, for a template value that it does not take, such as a float.
    """
    if not all(_is_template_value(v) for _, v in template):
        raise ValueError("[metal_kernel] Invalid template argument. Must be `mlx.core.Dtype`, `int` or `bool`.")
    arguments = f"<{', '.join(_template_argument(v) for _, v in template)}>" if template else ""
    name = _function_name(spec, inputs, output_dtypes, arguments)
    text = spec.header
    if template:
        text += f"template <{', '.join(f'{_template_kind(v)} {k}' for k, v in template)}>\n"
    text += f"[[kernel]] void {name}(\n" + ",\n".join(_parameters(spec, inputs, output_dtypes))
    text += f") {{\n{spec.source}\n}}\n"
    if template:
        instance = f"{name}{arguments}"
        text += f'\ntemplate [[host_name("{name}")]] [[kernel]] decltype({instance}) {instance};\n'
    return text, name, name + arguments


def _function_name(
    spec: KernelSpec, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], arguments: str
) -> str:
    name = f"custom_kernel_{spec.name}"
    if arguments:
        flat = arguments.replace("<", "_").replace(">", "_").replace(", ", "_").replace("-", "_")
        name += f"_{flat[:-1]}"
    for a in inputs:
        kind = "s" if a.ndim == 0 else "c" if a.size < MIN_DEVICE_SIZE else ""
        name += f"_{METAL_TYPES[a.dtype]}{kind}"
    return name + "".join(f"_{METAL_TYPES[d]}" for d in output_dtypes)


def _parameters(spec: KernelSpec, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype]) -> list[str]:
    buffers = []
    for name, a, use in zip(spec.input_names, inputs, spec.shape_uses, strict=True):
        space = "constant" if a.size < MIN_DEVICE_SIZE else "device"
        buffers.append(f"const {space} {METAL_TYPES[a.dtype]}{'*' if a.ndim else '&'} {name}")
        if a.ndim and use.shape:
            buffers.append(f"const constant int* {name}_shape")
        if a.ndim and use.strides:
            buffers.append(f"const constant int64_t* {name}_strides")
        if a.ndim and use.ndim:
            buffers.append(f"const constant int& {name}_ndim")
    for name, dtype in zip(spec.output_names, output_dtypes, strict=True):
        type_ = METAL_TYPES[dtype]
        buffers.append(f"device {f'atomic<{type_}>' if spec.atomic_outputs else type_}* {name}")
    numbered = [f"  {text} [[buffer({i})]]" for i, text in enumerate(buffers)]
    return numbered + [f"  {KERNEL_ATTRIBUTES[a]} {a} [[{a}]]" for a in spec.attributes]


def _is_template_value(value: object) -> bool:
    return value in METAL_TYPES if isinstance(value, mx.Dtype) else isinstance(value, int) and -(2**31) <= value < 2**31


def _template_argument(value: TemplateValue) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value) if isinstance(value, int) else METAL_TYPES[value]


def _template_kind(value: TemplateValue) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "typename"
