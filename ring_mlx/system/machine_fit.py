"""Whether ring-mlx can run here at all; can be imported on every system, also by a Python that is too old."""

from __future__ import annotations

import platform
import sys
from typing import NamedTuple

from ring_mlx.system import macos

PYTHONS = ((3, 11), (3, 14))  # from, and below
OLDEST_MACOS = 14  # what MLX's wheels are built for


class Unfit(NamedTuple):
    """Why ring-mlx cannot run here, and what to do."""

    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"[system] {self.seen}; {self.remedy}."


def unfit() -> Unfit | None:
    """Why ring-mlx cannot run with this Python on this machine, or None."""
    if not PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        version = ".".join(map(str, sys.version_info[:3]))
        return Unfit(f"Python {version} is not supported", "make an environment with Python 3.11, 3.12 or 3.13")
    return unfit_system()


def unfit_system() -> Unfit | None:
    """`unfit` for the machine and its operating system alone."""
    system, machine = platform.system(), platform.machine()
    if system == "Windows":
        return Unfit("Windows is not supported", "use Linux in WSL 2 (`wsl --install`), or a Mac with Apple Silicon")
    if system not in ("Darwin", "Linux"):
        return Unfit(f"{system or 'this system'} is not supported", "use macOS or Linux")
    if system == "Linux":
        return None
    version = platform.mac_ver()[0]
    if machine != "arm64" and macos.is_translated():
        return Unfit("this Python is for Intel and runs under Rosetta", "install a Python for arm64 and use that")
    if machine != "arm64":
        return Unfit("MLX does not run on a Mac with an Intel chip", "use a Mac with Apple Silicon, or Linux")
    if version and int(version.split(".")[0]) < OLDEST_MACOS:
        return Unfit(f"macOS {version} is too old for MLX", f"update to macOS {OLDEST_MACOS} or later")
    return None
