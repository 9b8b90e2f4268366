"""Chip, memory, operating system and MLX's backend."""

from __future__ import annotations

import os
import platform
from functools import partial

from ring_mlx.doctor.finding import NOTE, OK, PROBLEM, Finding
from ring_mlx.system import install, macos
from ring_mlx.system.machine_fit import unfit_system

GB = 1e9
_finding = partial(Finding, "machine")


def check() -> list[Finding]:
    return [system(), chip(), *memory(), backend()]


def system() -> Finding:
    """The operating system and how Python was built for it."""
    if platform.system() != "Darwin":
        seen = f"{platform.system()} {platform.release()}, {platform.machine()}"
        remedy = "made for Apple Silicon Macs; elsewhere commands work, speeds say little"
        return _finding("system", NOTE, seen, remedy)
    if reason := unfit_system():
        return _finding("system", PROBLEM, reason.seen, reason.remedy)
    return _finding("system", OK, f"macOS {platform.mac_ver()[0]}, {platform.machine()}")


def chip() -> Finding:
    import mlx.core as mx

    known = mx.device_info().get("device_name") or macos.chip() or platform.processor() or platform.machine()
    seen = f"{known}, {os.cpu_count()} cores"
    if macos.is_virtual():
        remedy = "its GPU is not the chip's own: speeds say little"
        return _finding("chip", NOTE, f"{seen}, a virtual machine", remedy)
    return _finding("chip", OK, seen)


def memory() -> list[Finding]:
    """All of it, the part that a model may take, and what MLX keeps for reuse."""
    import mlx.core as mx

    from ring_mlx.model.memory import budget_bytes, cache_limit_bytes, most_working_set_bytes

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    left, room = macos.available_bytes(), budget_bytes()
    is_recommended = bool(mx.device_info().get("max_recommended_working_set_size"))
    what = "nine tenths of what the device has"
    if is_recommended:
        what = (
            "the working set that Metal recommends: beyond it macOS moves memory to the disk, and a token takes seconds"
        )
    others = "" if left is None else f", of which others leave {left / GB:.1f} GB now"
    kept = f"{cache_limit_bytes(room) / GB:.1f} GB of freed memory that MLX keeps for reuse, at most"
    found = [
        _finding("memory", OK, f"{total / GB:.1f} GB{others}", data={"bytes": total, "left_bytes": left}),
        _finding("for models", OK, f"{room / GB:.1f} GB, {what}", data={"bytes": room}),
        _finding("cache limit", OK, kept),
    ]
    return [*found, working_set(most_working_set_bytes(), room), *pressure()] if is_recommended else found


def working_set(most_bytes: int, room: int) -> Finding:
    """Who chose the working set, now ``room`` bytes, and how it can be raised to ``most_bytes``."""
    name, most = "iogpu.wired_limit_mb", most_bytes >> 20
    now = macos.wired_limit_mb()
    seen = f"{name}={now} chose the working set" if now else "macOS chose the working set"
    lost = f", and a restart puts back what macOS chooses{' itself' if now else ''}"
    if room < most_bytes:
        seen += f"; sudo sysctl {name}={most} gives {most_bytes / GB:.1f} GB, the most that leaves macOS enough"
    return _finding("working set", OK, seen + lost, data={"wired_limit_mb": now, "most_mb": most})


def pressure() -> list[Finding]:
    """How short of memory the whole machine is."""
    level = macos.memory_pressure()
    if level is None:
        return []
    words = {macos.NORMAL: "normal", macos.WARNING: "warning", macos.CRITICAL: "critical"}.get(level, str(level))
    is_normal = level <= macos.NORMAL
    remedy = "" if is_normal else "close other programs; snapshots are dropped meanwhile"
    return [_finding("memory pressure", OK if is_normal else NOTE, words, remedy, {"level": level})]


def backend() -> Finding:
    import mlx.core as mx

    if mx.metal.is_available():
        if mx.default_device() == mx.gpu:
            return _finding("backend", OK, "Metal")
        return _finding("backend", NOTE, "Metal, but the default device is the CPU", "unset MLX's default device")
    if platform.system() == "Darwin":
        remedy = "run on the Mac itself, not in a virtual machine"
        return _finding("backend", PROBLEM, "Metal is not available", remedy)
    if mx.cuda.is_available():
        return _finding("backend", OK, "CUDA")
    remedy = f"for correctness only; with an NVIDIA GPU: {install.command_for_extra(install.CUDA)}"
    return _finding("backend", NOTE, "CPU", remedy)
