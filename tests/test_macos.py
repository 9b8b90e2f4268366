"""What is asked of macOS, through a C function like its own."""

from __future__ import annotations

import ctypes
import platform

import pytest

from ring_mlx.system import machine_fit, macos
from tests.fake_mac import FREE, MEMORY, PRESSURE, Mac


def test_the_kernels_values(monkeypatch):
    mac = Mac(monkeypatch, release="15.2.1", **{PRESSURE: 2, MEMORY: 64 << 30, FREE: 25, "iogpu.wired_limit_mb": 49152})
    mac.values["machdep.cpu.brand_string"] = "Apple M2 Pro"
    assert macos.release() == (15, 2, 1)
    assert macos.chip() == "Apple M2 Pro"
    assert macos.memory_pressure() == macos.WARNING
    assert macos.available_bytes() == 16 << 30
    assert macos.wired_limit_mb() == 49152
    assert not macos.is_virtual()
    mac.values["kern.hv_vmm_present"] = 1
    assert macos.is_virtual()


def test_a_mac_that_has_none_of_them(monkeypatch):
    mac = Mac(monkeypatch)
    mac.values.clear()
    assert [macos.chip(), macos.memory_pressure(), macos.available_bytes(), macos.wired_limit_mb()] == [None] * 4
    assert not macos.is_translated()
    mac.values["machdep.cpu.brand_string"] = "x" * 300  # no room
    assert macos.chip() is None


@pytest.mark.skipif(platform.system() == "Darwin", reason="this is a Mac")
def test_other_systems_have_nobody_to_ask():
    found = [macos.chip(), macos.memory_pressure(), macos.available_bytes(), macos.wired_limit_mb(), macos.release()]
    assert found == [None, None, None, None, ()]


def test_a_c_library_is_opened_once(monkeypatch):
    mac, opened, make = Mac(monkeypatch, **{PRESSURE: 1}), [], ctypes.CDLL
    monkeypatch.setattr("ctypes.CDLL", lambda name: (opened.append(name), make(name))[1])
    assert [macos.memory_pressure() for _ in range(3)] == [macos.NORMAL] * 3
    assert opened == [None]
    assert mac.asked == [PRESSURE] * 3


def test_rosetta(monkeypatch):
    mac = Mac(monkeypatch)
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "Intel chip" in machine_fit.unfit_system().seen
    mac.values["sysctl.proc_translated"] = 1
    assert "Rosetta" in machine_fit.unfit_system().seen
