"""Chip, memory, operating system and MLX's backend."""

from __future__ import annotations

import os
import platform

from ring_mlx.doctor.finding import NOTE, OK, PROBLEM, Finding
from ring_mlx.system import install, macos
from ring_mlx.system.machine_fit import unfit_system

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

    known = mx.device_info().get("device_name") or macos.chip() or platform.processor() or platform.machine()
    seen = f"{known}, {os.cpu_count()} cores"
    if macos.is_virtual():
        return Finding(
            SECTION, "chip", NOTE, f"{seen}, a virtual machine", "its GPU is not the chip's own: speeds say little"
        )
    return Finding(SECTION, "chip", OK, seen)


def memory() -> list[Finding]:
    """All of it, how much of it a model should take, and what MLX keeps for reuse."""
    import mlx.core as mx

    from ring_mlx.system.memory import budget_bytes, cache_limit_bytes, most_working_set_bytes

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    left, room = macos.available_bytes(), budget_bytes()
    is_recommended = bool(mx.device_info().get("max_recommended_working_set_size"))
    what = "nine tenths of what the device has"
    if is_recommended:
        what = (
            "the working set that Metal recommends: beyond it macOS moves memory to the disk, and a token takes seconds"
        )
    seen = (
        f"{total / GB:.1f} GB" if left is None else f"{total / GB:.1f} GB, of which others leave {left / GB:.1f} GB now"
    )
    kept = cache_limit_bytes(room)
    found = [
        Finding(SECTION, "memory", OK, seen, data={"bytes": total, "left_bytes": left}),
        Finding(SECTION, "for models", OK, f"{room / GB:.1f} GB, {what}", data={"bytes": room}),
        Finding(SECTION, "cache limit", OK, f"{kept / GB:.1f} GB of freed memory that MLX keeps for reuse, at most"),
    ]
    return [*found, working_set(most_working_set_bytes(), room), *pressure()] if is_recommended else found


def working_set(most_bytes: int, room: int) -> Finding:
    """Who chose the working set, and how it is raised.

    Args:
        most_bytes: What it should be raised to at most.
        room: What it is.
    """
    name, most = "iogpu.wired_limit_mb", most_bytes >> 20
    now = macos.wired_limit_mb()
    seen = f"{name}={now} chose the working set" if now else "macOS chose the working set"
    lost = f", and a restart puts back what macOS chooses{' itself' if now else ''}"
    if room < most_bytes:
        seen += f"; sudo sysctl {name}={most} gives {most_bytes / GB:.1f} GB, the most that leaves macOS enough"
    return Finding(SECTION, "working set", OK, seen + lost, data={"wired_limit_mb": now, "most_mb": most})


def pressure() -> list[Finding]:
    """How short of memory the whole machine is."""
    level = macos.memory_pressure()
    if level is None:
        return []
    words = {macos.NORMAL: "normal", macos.WARNING: "warning", macos.CRITICAL: "critical"}.get(level, str(level))
    is_normal, data = level <= macos.NORMAL, {"level": level}
    remedy = "" if is_normal else "close other programs; snapshots are dropped meanwhile"
    return [Finding(SECTION, "memory pressure", OK if is_normal else NOTE, words, remedy, data)]


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
