"""Runs kernels of MLX's metallib, which Apple's compiler made, on the simulator's runtime.

A metallib holds LLVM bitcode with calls of air.* functions. clang prints it as text; here the text is made x86-64:
address spaces and Apple's attributes go, function constants get values, and the air.* functions are defined.
"""

from __future__ import annotations

import mmap
import re
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.metal_sim.air_functions import LIBM2, RUNTIME_DECLARATIONS, air_function
from tests.metal_sim.build import digest
from tests.metal_sim.toolchain import MetalCompileError, cache_folder, staged, toolchain

BITCODE = b"\xde\xc0\x17\x0b"
NAMES_END = 8 << 20
BUFFERS_OFFSET = 104  # of msl_thread::buffers
OFFSETS = {
    "thread_position_in_grid": 0,
    "thread_position_in_threadgroup": 12,
    "threadgroup_position_in_grid": 24,
    "threads_per_threadgroup": 36,
    "threads_per_grid": 48,
    "threadgroups_per_grid": 60,
    "dispatch_threads_per_threadgroup": 72,
    "thread_index_in_threadgroup": 84,
    "thread_index_in_simdgroup": 88,
    "simdgroup_index_in_threadgroup": 92,
    "simdgroups_per_threadgroup": 96,
}
TYPE = r"<\d+ x \w+>|\w+"


class Metallib:
    """A compiled Metal library: kernels by name."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        names = re.findall(rb"NAME..([\x20-\x7e]+)\x00", self.bytes[:NAMES_END], re.DOTALL)
        starts = [m.start() for m in re.finditer(BITCODE, self.bytes)]
        self.starts = dict(zip((n.decode() for n in names), starts, strict=True))

    def text(self, name: str) -> str:
        """The kernel's LLVM text."""
        start = self.starts[name]
        _, _, offset, size, _ = struct.unpack("<5I", self.bytes[start : start + 20])
        flags = [
            "-x",
            "ir",
            "-",
            "-S",
            "-emit-llvm",
            "-O0",
            "-Wno-override-module",
            "-Xclang",
            "-disable-llvm-passes",
            "-o",
            "-",
        ]
        command = [*toolchain().compiler, "-target", "x86_64-unknown-linux-gnu", *flags]
        bitcode = self.bytes[start : start + offset + size]
        done = subprocess.run(command, input=bitcode, capture_output=True, check=False)
        text = done.stdout.decode()
        if done.returncode or f'source_filename = "{name}"' not in text:
            raise MetalCompileError(f"{name}: {done.stderr.decode()}")
        return text

    def build(self, name: str, constants: Mapping[int, int]) -> Path:
        """The kernel as a shared library for the runtime."""
        text = _x86(self.text(name), constants)
        library = cache_folder() / f"air-{digest(text, toolchain().identity)}.so"
        if not library.exists():
            with staged(library) as path:
                unit, compiled = path.with_suffix(".ll"), path.with_suffix(".o")
                unit.write_text(text, encoding="utf-8")
                flags = ["-x", "ir", "-O2", "-fPIC", "-Wno-override-module", "-c"]
                toolchain().compile(flags, unit, compiled)
                toolchain().link([compiled], path)
        return library


def _metadata(text: str, node: str) -> str:
    found = re.search(rf"^!{node} = !\{{(.*)\}}", text, re.MULTILINE)
    assert found is not None
    return found[1]


def _x86(text: str, constants: Mapping[int, int]) -> str:
    """The whole module: Apple's code, the air.* functions and the runtime's entry."""
    kernel = re.search(r"!air\.kernel = !\{!(\d+)\}", text)
    assert kernel is not None
    described = re.match(r"ptr @(\S+), !\d+, !(\d+)", _metadata(text, kernel[1]))
    assert described is not None
    parameters = [_metadata(text, i) for i in re.findall(r"!(\d+)", _metadata(text, described[2]))]
    text = _plain(text, constants)
    declaration = (
        r"^declare (?:\w+ )*?((?:<\d+ x \w+>|void|i\d+|float|half|bfloat|ptr)) @(air\.[\w.]+)\((.*)\)[^)\n]*\n"
    )
    functions = []
    for result, name, arguments in re.findall(declaration, text, re.MULTILINE):
        parts = [a.strip() for a in re.split(r",(?![^<]*>)", arguments) if a.strip()]
        functions.append(air_function(name, result, [_type(p) for p in parts]))
    text = re.sub(r"^declare [^\n]*@air\.[^\n]*\n", "", text, flags=re.MULTILINE)
    text += "".join(functions) + _entry(text, described[1], parameters) + RUNTIME_DECLARATIONS
    for name in sorted(set(re.findall(r"call float @(\w+f)\(", text))):
        text += f"declare float @{name}(float{', float' if name in LIBM2.values() else ''})\n"
    if "call float @llvm.fma.f32" in text and "declare float @llvm.fma.f32" not in text:
        text += "declare float @llvm.fma.f32(float, float, float)\n"
    return text


def _type(argument: str) -> str:
    found = re.match(TYPE, argument.strip())
    assert found is not None
    return found[0]


def _plain(text: str, constants: Mapping[int, int]) -> str:
    """Without address spaces, sections and Apple's metadata, and with the values of function constants."""
    text = re.sub(r"^@llvm\.compiler\.used.*\n|^!air\..*\n", "", text, flags=re.MULTILINE)
    for i in set(re.findall(r"MTL_FC_INIT_(\d+)_", text)):
        value = int(constants.get(int(i), 0))
        pattern = rf"^(@\S*MTL_FC_INIT_{i}_\w+ = .*?constant i(?:8|32) )undef"
        text = re.sub(pattern, rf"\g<1>{value}", text, flags=re.MULTILINE)
    text = re.sub(r', section "air\.[^"]*"|externally_initialized |"frame-pointer"="\w+" ?', "", text)
    text = re.sub(r"addrspacecast \(ptr addrspace\(\d\) (\S+) to ptr\)", r"\1", text)
    text = re.sub(r" ?addrspace\(\d\)", "", text)
    text = re.sub(r"(@llvm\.[\w.]*?)\.p\d((?:\.p\d)?)", lambda m: f"{m[1]}.p0{'.p0' if m[2] else ''}", text)
    return re.sub(r"target (datalayout|triple) = .*\n", "", text)


def _parameter_types(text: str, function: str) -> list[str]:
    found = re.search(rf"^define .*?@{re.escape(function)}\((.*)\)", text, re.MULTILINE)
    assert found is not None
    parts, depth = [""], 0
    for c in found[1]:
        depth += (c in "(<") - (c in ")>")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [_type(p) for p in parts]


def _entry(text: str, function: str, parameters: list[str]) -> str:
    """msl_entry: fills in each parameter as its metadata describes it."""
    lines = [
        "%s = load ptr, ptr @msl_self",
        f"%bp = getelementptr i8, ptr %s, i64 {BUFFERS_OFFSET}",
        "%b = load ptr, ptr %bp",
    ]
    arguments = []
    for i, (type_, described) in enumerate(zip(_parameter_types(text, function), parameters, strict=True)):
        buffer = re.search(r'"air\.location_index", i32 (\d+)', described)
        if '"air.buffer"' in described and buffer is not None:
            lines += [f"%q{i} = getelementptr ptr, ptr %b, i64 {buffer[1]}", f"%a{i} = load ptr, ptr %q{i}"]
        else:
            attribute = re.search(r'"air\.(\w+)"', described)
            assert attribute is not None
            lines += _attribute(i, type_, OFFSETS[attribute[1]])
        arguments.append(f"{type_} %a{i}")
    lines += [f"call void @{function}({', '.join(arguments)})", "ret void"]
    return "define void @msl_entry() {\n  " + "\n  ".join(lines) + "\n}\n"


def _attribute(i: int, type_: str, offset: int) -> list[str]:
    """%a<i> from the bytes of msl_thread at an offset."""
    vector = re.match(r"<(\d) x i(\d+)>", type_)
    lines = [f"%q{i} = getelementptr i8, ptr %s, i64 {offset}"]
    if vector is None:
        narrow = f"trunc i32 %x{i} to i16" if type_ == "i16" else f"add i32 %x{i}, 0"
        return [*lines, f"%x{i} = load i32, ptr %q{i}", f"%a{i} = {narrow}"]
    value, n = "undef", int(vector[1])
    for j in range(n):
        out = f"%a{i}" if j == n - 1 else f"%v{i}_{j}"
        narrow = f"trunc i32 %x{i}_{j} to i16" if vector[2] == "16" else f"add i32 %x{i}_{j}, 0"
        lines += [
            f"%q{i}_{j} = getelementptr i32, ptr %q{i}, i64 {j}",
            f"%x{i}_{j} = load i32, ptr %q{i}_{j}",
            f"%t{i}_{j} = {narrow}",
            f"{out} = insertelement {type_} {value}, i{vector[2]} %t{i}_{j}, i32 {j}",
        ]
        value = out
    return lines
