"""The parameters of a kernel function, and the C entry that passes them from the runtime."""

from __future__ import annotations

import re
from typing import NamedTuple

from metal_kernels.twin.tokens import RewriteError
from tests.metal_sim.toolchain import MetalCompileError

# Kernel attributes as expressions over msl_thread s.
TRIPLES = {
    "thread_position_in_grid": "s.pos_in_grid",
    "thread_position_in_threadgroup": "s.pos_in_tg",
    "threadgroup_position_in_grid": "s.tg_pos",
    "threads_per_threadgroup": "s.tg_size",
    "threads_per_grid": "s.grid",
    "grid_size": "s.grid",
    "threadgroups_per_grid": "s.ntg",
    "dispatch_threads_per_threadgroup": "s.disp_tg",
}
THREADS = "s.tg_size[0]*s.tg_size[1]*s.tg_size[2]"
DISPATCHED = "s.disp_tg[0]*s.disp_tg[1]*s.disp_tg[2]"
NUMBERS = {
    "thread_index_in_threadgroup": "s.idx_in_tg",
    "thread_index_in_simdgroup": "s.lane",
    "simdgroup_index_in_threadgroup": "s.simdgroup",
    "simdgroups_per_threadgroup": "s.nsimdgroups",
    "dispatch_simdgroups_per_threadgroup": f"({DISPATCHED}+31)/32",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "s.lane%4u",
    "quadgroup_index_in_threadgroup": "s.idx_in_tg/4u",
    "quadgroups_per_threadgroup": f"({THREADS}+3)/4",
    "dispatch_quadgroups_per_threadgroup": f"({DISPATCHED}+3)/4",
}


class Parameter(NamedTuple):
    """One parameter of a kernel: a buffer with its index and name, or an attribute."""

    buffer: int | None
    name: str


def kernel_parameters(source: str, name: str) -> list[Parameter]:
    """The parameters of kernel ``name`` in Metal source; buffers without an index are numbered in order."""
    head = r"(?:\[\[\s*kernel\b[^\]]*\]\]|\bkernel)\s+void\s+(?:\[\[[^\]]*\]\]\s*)?"
    found = re.search(head + re.escape(name) + r"\s*\(", source)
    if found is None:
        raise RewriteError(f"kernel {name} not found")
    parameters: list[Parameter] = []
    for text in _split_arguments(source, found.end()):
        attribute = re.search(r"\[\[(.*?)\]\]", text, re.DOTALL)
        declared = re.sub(r"\[.*", "", text.strip(), flags=re.DOTALL).split()[-1].strip("*&")
        if attribute is None:
            if not re.search(r"[*&\[]", text):
                raise RewriteError(f"kernel {name}: parameter without attribute: {text.strip()!r}")
            used = [p.buffer for p in parameters if p.buffer is not None]
            parameters.append(Parameter(max(used, default=-1) + 1, declared))
            continue
        buffer = re.search(r"buffer\(\s*(\d+)\s*\)", attribute.group(1))
        if buffer is not None:
            parameters.append(Parameter(int(buffer.group(1)), declared))
        else:
            parameters.append(Parameter(None, attribute.group(1).strip()))
    return parameters


def _split_arguments(source: str, start: int) -> list[str]:
    """The arguments from ``start``, just behind the opening parenthesis, to its end."""
    parts = [""]
    depth = 1
    for c in source[start:]:
        if c in "([{<":
            depth += 1
        elif c in ")]}>":
            depth -= 1
        if depth == 0:
            return parts
        if c == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += c
    raise RewriteError("a kernel's parameter list is never closed")


def entry_source(kernel: str, parameters: list[Parameter]) -> str:
    """C++ of msl_entry, which the runtime calls in each thread."""
    arguments = []
    for parameter in parameters:
        if parameter.buffer is not None:
            arguments.append(f"msl_buf{{s.buffers[{parameter.buffer}]}}")
        elif parameter.name in TRIPLES:
            arguments.append(f"msl_attr3({TRIPLES[parameter.name]})")
        elif parameter.name == "grid_origin":
            arguments.append("msl_a3{{0,0,0}}")
        elif parameter.name in NUMBERS:
            arguments.append(f"msl_attr1({NUMBERS[parameter.name]})")
        else:
            raise MetalCompileError(f"unknown kernel attribute {parameter.name}")
    call = f"msl_call(&{kernel}, {', '.join(arguments)});"
    return (
        '\n#line 1 "msl_entry"\nextern "C" __attribute__((visibility("default"))) void msl_entry() {'
        f" const msl_thread& s = *msl_self; {call} }}\n"
    )
