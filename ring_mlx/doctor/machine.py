"""Chip, memory, operating system and MLX's backend; knows no package version and no model."""

from __future__ import annotations

import os
import platform

from ring_mlx import install
from ring_mlx.doctor.finding import NOTE, OK, PROBLEM, Finding
from ring_mlx.machine_fit import unfit_system

SECTION = "machine"
GB = 1e9


def check() -> list[Finding]:
    """Look at all of them."""
    return [system(), chip(), *memory(), backend()]


def system() -> Finding:
    """The operating system and how Python was built for it."""
    if platform.system() != "Darwin":
        seen = f"{platform.system()} {platform.release()}, {platform.machine()}"
        return Finding(
            SECTION, "system", NOTE, seen, "made for Apple Silicon Macs; elsewhere commands work, speeds say little"
        )
    if reason := unfit_system():
        return Finding(SECTION, "system", PROBLEM, reason.seen, reason.remedy)
    return Finding(SECTION, "system", OK, f"macOS {platform.mac_ver()[0]}, {platform.machine()}")


def chip() -> Finding:
    """Its name, as MLX gives it."""
    import mlx.core as mx

    name = str(mx.device_info().get("device_name") or platform.processor() or platform.machine())
    return Finding(SECTION, "chip", OK, f"{name}, {os.cpu_count()} cores")


def memory() -> list[Finding]:
    """All of it, and how much of it a model should take."""
    import mlx.core as mx

    from ring_mlx.memory import budget_bytes

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    room = budget_bytes()
    is_recommended = bool(mx.device_info().get("max_recommended_working_set_size"))
    what = "recommended working set" if is_recommended else "nine tenths of what the device has"
    return [
        Finding(SECTION, "memory", OK, f"{total / GB:.1f} GB", data={"bytes": total}),
        Finding(SECTION, "for models", OK, f"{room / GB:.1f} GB, {what}", data={"bytes": room}),
    ]


def backend() -> Finding:
    """What MLX computes on."""
    import mlx.core as mx

    if mx.metal.is_available():
        if mx.default_device() == mx.gpu:
            return Finding(SECTION, "backend", OK, "Metal")
        return Finding(
            SECTION, "backend", NOTE, "Metal, but the default device is the CPU", "unset MLX's default device"
        )
    if platform.system() == "Darwin":
        return Finding(
            SECTION, "backend", PROBLEM, "Metal is not available", "run on the Mac itself, not in a virtual machine"
        )
    if mx.cuda.is_available():
        return Finding(SECTION, "backend", OK, "CUDA")
    remedy = f"for correctness only; with an NVIDIA GPU: {install.command_for_extra(install.CUDA)}"
    return Finding(SECTION, "backend", NOTE, "CPU", remedy)
