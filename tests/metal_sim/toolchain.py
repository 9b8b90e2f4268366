"""Finds clang and a linker, and runs them; knows no Metal.

The compiler is the clang inside pip's `ziglang`, called directly (`zig clang`, `zig ld.lld`): no headers, no C++
library and no root are needed. Where that package is absent, a clang of the system serves.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIN_CLANG = 19
CPUINFO = Path("/proc/cpuinfo")
CLANGS = ("clang++-19", "clang++-20", "clang++-21", "clang++")
# One processor for every machine: a newer one has half arithmetic of its own, which rounds otherwise.
PROCESSOR = "x86-64-v3"
PROCESSOR_FEATURES = frozenset({"abm", "avx2", "bmi2", "f16c", "fma", "movbe"})
TARGET = ("-target", "x86_64-unknown-linux-gnu", f"-march={PROCESSOR}", "-nostdinc", "-nostdinc++")


class MetalCompileError(Exception):
    """The kernel does not compile; the message is the compiler's."""


@dataclass(frozen=True)
class Toolchain:
    """Commands that compile one file and link a shared library."""

    compiler: tuple[str, ...]
    linker: tuple[str, ...]
    version: str

    @property
    def major(self) -> int:
        """Version of clang."""
        found = re.search(r"clang version (\d+)", self.version)
        return int(found.group(1)) if found else 0

    @property
    def identity(self) -> tuple[str, ...]:
        """What a compiled file depends on beside its text and flags."""
        return (self.version, *TARGET)

    def compile(self, flags: Sequence[str], source: Path, output: Path | None) -> str:
        """Compile to ``output``, or only check if there is none; returns the warnings."""
        end = ["-fsyntax-only"] if output is None else ["-o", str(output)]
        command = [*self.compiler, *TARGET, *flags, str(source), *end]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MetalCompileError(done.stderr)
        return done.stderr

    def link(self, objects: Sequence[Path], output: Path, libraries: Sequence[Path] = ()) -> None:
        """A shared library; what it does not define is looked up when it is loaded."""
        command = [*self.linker, "-shared", "-o", str(output), *map(str, objects), *map(str, libraries)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MetalCompileError(done.stderr)


@functools.cache
def find_toolchain() -> Toolchain | None:
    """The first toolchain that works here, or None."""
    if _why_not_here() is not None:
        return None
    found = importlib.util.find_spec("ziglang")
    if found is not None and found.origin is not None and "RING_MLX_SIM_CLANG" not in os.environ:
        zig = str(Path(found.origin).parent / "zig")
        return _working((zig, "clang"), (zig, "ld.lld"))
    for name in [os.environ.get("RING_MLX_SIM_CLANG", ""), *CLANGS]:
        path = shutil.which(name) if name else None
        found_clang = None if path is None else _working((path,), (path, "-nostdlib"))
        if found_clang is not None:
            return found_clang
    return None


def _working(compiler: tuple[str, ...], linker: tuple[str, ...]) -> Toolchain | None:
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    found = Toolchain(compiler, linker, done.stdout)
    return found if done.returncode == 0 and found.major >= MIN_CLANG else None


def _why_not_here() -> str | None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the Metal simulator runs on x86-64 Linux only"
    listed = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
    lacking = PROCESSOR_FEATURES - set(listed[1].split() if listed else ())
    return f"the Metal simulator needs a processor with {', '.join(sorted(lacking))}" if lacking else None


def why_unavailable() -> str | None:
    """Why the simulator cannot run here, or None if it can."""
    reason = _why_not_here()
    if reason is not None:
        return reason
    if find_toolchain() is None:
        return f"the Metal simulator needs pip's ziglang or a clang of version {MIN_CLANG} or newer"
    return None


def toolchain() -> Toolchain:
    """The toolchain; raises RuntimeError if there is none."""
    found = find_toolchain()
    if found is None:
        raise RuntimeError(why_unavailable())
    return found


@functools.cache
def cache_folder() -> Path:
    """Where compiled things stay between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "ring-mlx" / "metal_sim"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path beside ``target`` that is moved there when the block succeeds, so that no reader sees half a file."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".staged-") as folder:
        path = Path(folder) / target.name
        yield path
        try:
            path.replace(target)
        except OSError:
            if not target.exists():  # a folder that another process moved there first
                raise
