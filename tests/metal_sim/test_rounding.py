"""The simulator rounds alike on every processor."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels.twin.spec import KernelSpec
from tests.metal_sim import metal_kernel, toolchain
from tests.metal_sim.cuda_host import run_cuda_on_host
from tests.metal_sim.marks import needs_simulator

ROOT = Path(__file__).parents[2]
SOURCE = """
  uint i = thread_position_in_grid.x;
  T a = x[i], b = y[i];
  device T* o = out + i * 4;
  o[0] = a * b + a; o[1] = a / b; o[2] = a - b * b; o[3] = T(float(a) * 0.1f);
"""
CONTRACTED = "out[0] = x[0] * x[0] + y[0];"


def _narrow(x, dtype):
    """float32 rounded to the type and back."""
    return np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32))


def _backends(spec):
    """The Metal text in two modes, and the CUDA text."""
    for mode in ("fast", "check"):
        yield metal_kernel(spec.name, list(spec.input_names), list(spec.output_names), spec.source, mode=mode)
    yield lambda **call: run_cuda_on_host(spec, **call)


@needs_simulator
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_each_narrow_operation_rounds_by_itself(dtype):
    mx.random.seed(4)
    x, y = (mx.random.uniform(0.1, 2.0, (256,)).astype(dtype) for _ in range(2))
    x[:4] = mx.array([1e-7, 3e-6, 1e-40, 0.0]).astype(dtype)  # numbers without a leading one, too
    a, b = (np.array(v.astype(mx.float32)) for v in (x, y))
    product, square = _narrow(a * b, dtype), _narrow(b * b, dtype)
    expected = [product + a, a / b, a - square, a * np.float32(0.1)]
    expected = _narrow(np.stack(expected, axis=1), dtype)
    for run in _backends(KernelSpec("narrow", ("x", "y"), ("out",), SOURCE)):
        (out,) = run(
            inputs=[x, y],
            template=[("T", dtype)],
            grid=(256, 1, 1),
            threadgroup=(64, 1, 1),
            output_shapes=[(256, 4)],
            output_dtypes=[dtype],
        )
        np.testing.assert_array_equal(np.array(out.astype(mx.float32)), expected)


@needs_simulator
def test_a_float_product_and_sum_of_one_expression_round_once():
    x, y = mx.array([1 + 2**-12], mx.float32), mx.array([-(1 + 2**-11)], mx.float32)
    one = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": [mx.float32]}
    for run in _backends(KernelSpec("contracted", ("x", "y"), ("out",), CONTRACTED)):
        (out,) = run(inputs=[x, y], **one)
        assert out.item() == 2**-24


def test_nothing_is_compiled_for_the_processor_at_hand():
    assert "-march=x86-64-v3" in toolchain.TARGET
    chosen = re.compile(r"-m(arch|cpu|tune)[=\s](?!\{PROCESSOR\})[\w-]*")
    files = [
        p for folder in ("tests", "metal_kernels", "ring_mlx", "benchmarks") for p in (ROOT / folder).rglob("*.py")
    ]
    found = {
        str(p.relative_to(ROOT)): chosen.findall(p.read_text(encoding="utf-8")) for p in files if p != Path(__file__)
    }
    assert not {name: flags for name, flags in found.items() if flags}


def test_a_processor_that_lacks_instructions_is_told_which(monkeypatch, tmp_path):
    listed = tmp_path / "cpuinfo"
    monkeypatch.setattr(toolchain, "CPUINFO", listed)
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(toolchain.sys, "platform", "linux")
    listed.write_text("flags\t\t: fpu abm bmi2 fma movbe sse2\n")
    assert toolchain.why_unavailable() == "the Metal simulator needs a processor with avx2, f16c"
    listed.write_text("flags\t\t: fpu abm avx2 bmi2 f16c fma movbe sse2\n")
    assert toolchain._why_not_here() is None
