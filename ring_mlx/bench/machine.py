"""The hardware and software that a result was measured on."""

from __future__ import annotations

import platform
import time

import mlx.core as mx

from metal_kernels import launch
from ring_mlx import __version__
from ring_mlx.system.install import version_of


def describe() -> dict[str, str]:
    """Date, device, kernel backend and versions, as every output holds them."""
    kernels = launch.backend()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": str(mx.device_info().get("device_name", platform.machine())),
        "backend": "cpu" if mx.default_device() == mx.cpu else "metal" if mx.metal.is_available() else "cuda",
        "kernels": "none" if kernels is None else kernels.name,
        "ring_mlx": __version__,
        "mlx": version_of("mlx") or "?",
        "mlx_lm": version_of("mlx-lm") or "?",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
