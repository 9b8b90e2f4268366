"""The hardware and software that a result was measured on."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx

from metal_kernels import launch
from ring_mlx import __version__


def describe() -> dict[str, str]:
    """Date, device, kernel backend and versions, as every output holds them."""
    kernels = launch.backend()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": str(mx.device_info().get("device_name", platform.machine())),
        "backend": "cpu" if mx.default_device() == mx.cpu else "metal" if mx.metal.is_available() else "cuda",
        "kernels": "none" if kernels is None else kernels.name,
        "ring_mlx": __version__,
        "mlx": _version("mlx"),
        "mlx_lm": _version("mlx-lm"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
