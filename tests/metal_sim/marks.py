"""Marks for tests that need parts of the simulator; each skip states its reason."""

import pytest

from metal_kernels.twin.nvrtc import find_nvrtc
from tests.metal_sim.toolchain import why_unavailable

needs_simulator = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
needs_nvrtc = pytest.mark.skipif(find_nvrtc() is None, reason="NVRTC is not installed (pip's nvidia-cuda-nvrtc)")
