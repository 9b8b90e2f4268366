"""Asks macOS what only it knows. On other systems every answer is None, False or empty.

Can be imported on every system, also by a Python that is too old.
"""

from __future__ import annotations

import functools
import platform
import sys
from contextlib import suppress
from typing import Any

# The values of `memory_pressure`; XNU turns its own levels into them.
NORMAL, WARNING, CRITICAL = 1, 2, 4
MOST_BYTES = 256


def release() -> tuple[int, ...]:
    """The version of macOS, such as (15, 1)."""
    return tuple(int(n) for n in platform.mac_ver()[0].split(".") if n.isdigit())


def chip() -> str | None:
    """The processor's name, such as "Apple M2 Pro"."""
    raw = _sysctl("machdep.cpu.brand_string")
    return None if raw is None else raw.rstrip(b"\0").decode(errors="replace") or None


def is_translated() -> bool:
    """Whether this process runs under Rosetta."""
    return _integer("sysctl.proc_translated") == 1


def is_virtual() -> bool:
    """Whether this is a virtual machine, whose GPU is not the chip's own."""
    return _integer("kern.hv_vmm_present") == 1


def memory_pressure() -> int | None:
    """`NORMAL`, `WARNING` or `CRITICAL`, as the kernel judges the whole machine."""
    return _integer("kern.memorystatus_vm_pressure_level")


def available_bytes() -> int | None:
    """Memory that is available without writing other programs' memory to disk."""
    percent, total = _integer("kern.memorystatus_level"), _integer("hw.memsize")
    return None if percent is None or total is None else total * percent // 100


def wired_limit_mb() -> int | None:
    """The value of ``sysctl iogpu.wired_limit_mb``; 0 is macOS's own choice."""
    return _integer("iogpu.wired_limit_mb")


def flush_disk(handle: int) -> bool:
    """Flush a file past the disk's own cache, as fsync does not do on macOS; False where the file system cannot."""
    import fcntl

    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):
            fcntl.fcntl(handle, full)
            return True
    return False


def _integer(name: str) -> int | None:
    raw = _sysctl(name)
    return None if raw is None else int.from_bytes(raw, sys.byteorder)


def _sysctl(name: str) -> bytes | None:
    """A value of the kernel, or None where there is none of that name; takes microseconds."""
    import ctypes

    ask = _sysctlbyname()
    buffer, length = ctypes.create_string_buffer(MOST_BYTES), ctypes.c_size_t(MOST_BYTES)
    if ask is None or ask(name.encode(), buffer, ctypes.byref(length), None, 0) != 0:
        return None
    return buffer.raw[: length.value]


@functools.lru_cache
def _sysctlbyname() -> Any:
    """The C library's function, or None on Linux."""
    import ctypes

    function = getattr(ctypes.CDLL(None), "sysctlbyname", None)
    if function is not None:
        text, size = ctypes.c_char_p, ctypes.c_size_t
        function.argtypes = [text, ctypes.c_void_p, ctypes.POINTER(size), ctypes.c_void_p, size]
    return function
