"""Apple's compiler against the shim: the same kernel from MLX's metallib and from its source, on the same runtime."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_sim.air import Metallib
from tests.metal_sim.marks import needs_simulator
from tests.metal_sim.mlx_kernels import CASES, make
from tests.metal_sim.runtime import Options, dispatch
from tests.metal_sim.toolchain import cache_folder, staged

pytestmark = needs_simulator

WHEEL = ["--no-deps", "--only-binary=:all:", "--platform", "macosx_15_0_arm64", "--python-version", "3.11", "--quiet"]
MEMBER = "mlx/lib/mlx.metallib"
MAX_BUFFERS = 32


@pytest.fixture(scope="module")
def metallib(tmp_path_factory):
    """The library of this MLX version, out of its macOS wheel, which is downloaded once."""
    path = cache_folder() / f"mlx-{mx.__version__}.metallib"
    if not path.exists():
        folder = tmp_path_factory.mktemp("wheel")
        command = [sys.executable, "-m", "pip", "download", *WHEEL, "--dest", folder, f"mlx-metal=={mx.__version__}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"MLX's macOS wheel could not be downloaded: {done.stderr.strip()[-200:]}")
        (wheel,) = folder.glob("*.whl")
        with staged(path) as target, zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(MEMBER))
    return Metallib(path)


@pytest.mark.parametrize("name", CASES)
def test_source_and_apple_bitcode_agree_to_the_bit(metallib, name):
    case = make(name)
    library = metallib.build(case.air_name, case.constants)
    placed, outputs = case.buffers(MAX_BUFFERS, {})
    dispatch(library, placed, case.grid, case.threadgroup, "fast", Options(strict_divergence=False))
    for (buffer, output), ours in zip(outputs, case.run("fast", Options()), strict=True):
        theirs = buffer.array().reshape(output.shape)
        np.testing.assert_array_equal(theirs.view(np.uint8), ours.view(np.uint8))
