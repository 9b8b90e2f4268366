"""Compiles Metal source to a shared library in one of three modes, and keeps what it compiled.

- ``strict``: types are checked with address spaces kept; nothing runs.
- ``fast``: optimised.
- ``check``: every memory access calls the runtime, undefined behaviour is reported, locals start poisoned.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from metal_kernels.twin import tokens
from metal_kernels.twin.tokens import RewriteError
from tests.metal_sim.dialects import Dialect, rewrite
from tests.metal_sim.entry import Parameter, entry_source
from tests.metal_sim.flags import BASE, LOCAL_BOUNDS_VERSION, MODES, OLD_CHECK, RUNTIME
from tests.metal_sim.toolchain import MetalCompileError, cache_folder, staged, toolchain

HERE = Path(__file__).parent
TWIN = Path(tokens.__file__).parent
# MLX's wheels carry its Metal headers on every platform.
MLX_INCLUDE = Path(mx.__file__).parent / "include"
KERNELS = "mlx/backend/metal/kernels"
UTILS = (f'"{KERNELS}/utils.h"',)


def digest(*parts: object) -> str:
    """A short name for these parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@functools.cache
def _shim_digest() -> str:
    """Identifies everything outside of a kernel that shapes its code."""
    files = [
        *sorted((HERE / "shim").iterdir()),
        *sorted((TWIN / "cuda").glob("common_*")),
        HERE / "runtime" / "interface.h",
    ]
    files += [HERE / f"{module}.py" for module in ("build", "dialects", "entry", "flags")]
    files += [TWIN / f"{module}.py" for module in ("attributes", "declarations", "overloads", "rewrite", "tokens")]
    return digest([f.read_bytes() for f in files if f.is_file()], toolchain().identity, str(HERE))


@functools.cache
def runtime_library() -> Path:
    """The runtime as a shared library."""
    sources = sorted((HERE / "runtime").iterdir())
    library = cache_folder() / f"runtime-{digest([s.read_bytes() for s in sources], RUNTIME, toolchain().identity)}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            objects = []
            for source in sources:
                if source.suffix == ".cpp":
                    objects.append(Path(folder) / f"{source.stem}.o")
                    toolchain().compile([*RUNTIME, "-c"], source, objects[-1])
            with staged(library) as path:
                toolchain().link(objects, path)
    return library


@functools.cache
def mlx_headers(dialect: Dialect) -> tuple[Path, frozenset[int]]:
    """A rewritten copy of MLX's Metal headers: its include folder, and the ids of function constants."""
    key = digest(str(MLX_INCLUDE), mx.__version__, _shim_digest())
    folder = cache_folder() / f"mlx-{dialect.name.lower()}-{key}"
    listed = folder / "function_constants"
    if not listed.exists():
        with staged(folder) as path:
            constants: set[int] = set()
            for header in sorted((MLX_INCLUDE / KERNELS).rglob("*.h")):
                name = header.relative_to(MLX_INCLUDE)
                try:
                    text, ids = rewrite(header.read_text(encoding="utf-8"), str(name), dialect)
                except RewriteError as error:
                    text, ids = f'#error "{error}"\n', frozenset()
                constants |= ids
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_text(text, encoding="utf-8")
            (path / "function_constants").write_text(" ".join(map(str, sorted(constants))))
    return folder, frozenset(int(i) for i in listed.read_text().split())


def _prelude(flags: list[str], includes: tuple[str, ...]) -> Path:
    """The headers, compiled ahead."""
    key = digest(flags, includes, _shim_digest())
    compiled = cache_folder() / f"prelude-{key}.pch"
    if not compiled.exists():
        header = cache_folder() / f"prelude-{key}.h"
        with staged(header) as path:
            path.write_text("".join(f"#include {name}\n" for name in includes))
        with staged(compiled) as path:
            toolchain().compile(["-x", "c++-header", "-Xclang", "-fno-pch-timestamp", *flags], header, path)
    return compiled


def rewrite_parts(source: str, file: str, dialect: Dialect, shared: Sequence[str]) -> tuple[str, frozenset[int]]:
    """As `rewrite`; what all variants of a kernel share is rewritten apart, and so only once."""
    parts = []
    for text in filter(None, shared):
        before, found, source = source.partition(text)
        parts += [before, found]
    try:
        done = [rewrite(part, f"{file}:{i}", dialect) for i, part in enumerate([*parts, source])]
    except RewriteError:
        return rewrite("".join([*parts, source]), file, dialect)  # for the right line in the message
    return "".join(text for text, _ in done), frozenset().union(*(ids for _, ids in done))


def build(
    source: str,
    kernel: str,
    parameters: list[Parameter],
    mode: str,
    name: str,
    constants: Mapping[int, int] | None = None,
    includes: tuple[str, ...] = UTILS,
    shared: Sequence[str] = (),
) -> Path:
    """The shared library of a kernel; in mode ``strict`` only checked, and the path then means nothing.

    Args:
        source: Metal text.
        kernel: The function to run, with its template arguments.
        parameters: As `kernel_parameters` found them.
        mode: strict, fast or check.
        name: File name in messages, without its ending.
        constants: Values of function constants; the others are 0.
        includes: What `#include` names before the source.
        shared: Parts of the source, in order, that the kernel's other variants have too.

    Raises:
        MetalCompileError: With the compiler's words.
    """
    dialect = Dialect.STRICT if mode == "strict" else Dialect.ERASED
    headers, ids = mlx_headers(dialect)
    entry = entry_source(kernel, parameters)
    key = digest(source, entry, mode, name, sorted((constants or {}).items()), includes, str(headers), _shim_digest())
    library = cache_folder() / f"{name[:40]}-{key}.{'ok' if mode == 'strict' else 'so'}"
    if library.exists():
        return library
    text, own_ids = rewrite_parts(source, f"{name}.metal", dialect, shared)
    values = {**dict.fromkeys(ids | own_ids, 0), **(constants or {})}
    flags = [*BASE, *MODES[mode], f"-I{HERE / 'shim'}", f"-I{headers}", "-Dis_function_constant_defined(x)=1"]
    if mode == "check" and toolchain().major < LOCAL_BOUNDS_VERSION:
        flags += OLD_CHECK
    flags += [f"-DMSL_FC_{i}={int(v)}" for i, v in sorted(values.items())]
    text = f'#line 1 "{name}.metal"\n{text}\n{entry}'
    prelude = _prelude(flags, includes)
    with staged(library) as path:
        unit = path.with_suffix(".cpp")
        unit.write_text(text, encoding="utf-8")
        if mode == "strict":
            _refuse_implicit_bfloat(toolchain().compile([*flags, "-include-pch", str(prelude)], unit, None))
            path.touch()
        else:
            compiled = path.with_suffix(".o")
            warnings = toolchain().compile([*flags, "-include-pch", str(prelude), "-c"], unit, compiled)
            _refuse_implicit_bfloat(warnings)
            toolchain().link([compiled], path)
    return library


def _refuse_implicit_bfloat(warnings: str) -> None:
    """Metal has no implicit conversion to bfloat; clang has one and warns."""
    to_bfloat = re.compile(r"to '(?:bfloat|bfloat16_t|__bf16|[^']*' \(aka '__bf16)")
    found = [
        line
        for line in warnings.splitlines()
        if "implicit conversion" in line and "floating-point precision" in line and to_bfloat.search(line)
    ]
    if found:
        raise MetalCompileError("\n".join(found))
