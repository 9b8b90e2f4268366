"""Stands in for a Mac: the C library's sysctlbyname, and what MLX says of Metal."""

from __future__ import annotations

import ctypes
import functools
import sys
from types import SimpleNamespace

import mlx.core as mx

from ring_mlx.system import macos

ASKED = macos.memory_pressure  # of which `calm` takes the place
PRESSURE, FREE, MEMORY = "kern.memorystatus_vm_pressure_level", "kern.memorystatus_level", "hw.memsize"


class Mac:
    """What macOS answers, for as long as the test lasts.

    ``values`` are the kernel's by name: numbers, or texts. What is not among them is not there.
    """

    def __init__(self, monkeypatch, release="15.2", **values):
        self._patch, self.values, self.asked = monkeypatch, {MEMORY: 64 << 30, FREE: 90} | values, []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_size_t),
            ctypes.c_void_p,
            ctypes.c_size_t,
        )
        self._function = kind(self._sysctlbyname)
        self._function(b"x", None, ctypes.pointer(ctypes.c_size_t(0)), None, 0)
        self.asked.clear()
        monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(sysctlbyname=self._function))
        monkeypatch.setattr(macos, "_sysctlbyname", functools.lru_cache(macos._sysctlbyname.__wrapped__))
        monkeypatch.setattr(macos, "memory_pressure", ASKED)
        monkeypatch.setattr("platform.mac_ver", lambda: (release, ("", "", ""), "arm64"))

    def _sysctlbyname(self, name, buffer, length, new, new_length):
        """As the C function: 0, or -1 where there is no such value or no room for it."""
        self.asked.append(name.decode())
        value = self.values.get(name.decode())
        if value is None or new or new_length:
            return -1
        is_long = name.decode() == MEMORY
        raw = f"{value}\0".encode() if isinstance(value, str) else value.to_bytes(8 if is_long else 4, sys.byteorder)
        if len(raw) > length[0]:
            return -1
        ctypes.memmove(buffer, raw, len(raw))
        length[0] = len(raw)
        return 0

    def metal(self, **info):
        """Let MLX say that there is Metal, of so much memory."""
        known = {"max_recommended_working_set_size": 48 << 30, "memory_size": 64 << 30, "device_name": "Apple M2 Pro"}
        self._patch.setattr(mx.metal, "is_available", lambda: True)
        self._patch.setattr(mx, "device_info", lambda: known | info)
