"""Every kernel as its CUDA twin: the text runs here on the CPU and agrees with the plain forms, and NVRTC compiles it."""

from __future__ import annotations

import functools

import mlx.core as mx
import pytest

from metal_kernels import launch
from metal_kernels.twin.cuda_source import Variant, cuda_source
from metal_kernels.twin.nvrtc import compile_cubin, find_nvrtc
from metal_kernels.twin.spec import KernelSpec
from ring_mlx.bench.operations import cases, difference
from ring_mlx.bench.shapes import TINY
from ring_mlx.model.config import RingConfig
from tests.metal_sim.cuda_host import run_cuda_on_host
from tests.metal_sim.marks import needs_simulator

CONFIG = RingConfig.from_dict(TINY | {"hidden_size": 128, "moe_intermediate_size": 64, "head_dim": 64})
ARCHITECTURE = "sm_90"


@functools.cache
def cubin_bytes(text, name):
    """The size of a kernel's machine code, which is compiled once for all tests."""
    return len(compile_cubin(text, name, ARCHITECTURE)[0])


def recording_backend(compiled):
    """A backend that runs the CUDA text on the CPU, and compiles the same text for a GPU where NVRTC is installed."""

    def constructor(*, name, input_names, output_names, source, header=""):
        spec = KernelSpec(name, input_names, output_names, source, header)

        def call(*, inputs, output_dtypes, grid, threadgroup, template, **others):
            block = tuple(min(a, b) for a, b in zip(threadgroup, grid, strict=True))
            is_ragged = any(g % t for g, t in zip(grid, block, strict=True))
            types = tuple((x.dtype, x.ndim) for x in inputs)
            text = cuda_source(spec, Variant(types, tuple(output_dtypes), tuple(template), block, is_ragged))
            if find_nvrtc() is not None:
                compiled[name] = cubin_bytes(text.text, text.name)
            others |= {"inputs": inputs, "output_dtypes": output_dtypes, "template": template}
            return run_cuda_on_host(spec, grid=grid, threadgroup=threadgroup, **others)

        return call

    return launch.Backend("cuda", constructor)


@needs_simulator
@pytest.mark.parametrize(("tokens", "bits"), [(1, 4), pytest.param(2, 8, marks=pytest.mark.slow), (18, 4)])
def test_the_cuda_text_agrees_with_the_plain_forms_and_compiles(tokens, bits):
    mx.random.seed(0)
    compiled = {}
    with launch.use(recording_backend(compiled)):
        for name, call, x in cases(CONFIG, tokens, 2, bits):
            assert difference(call, x) < 2e-2, name
    if find_nvrtc() is None:
        pytest.skip("agrees, but NVRTC is not installed (pip's nvidia-cuda-nvrtc), so nothing was compiled")
    expected = {"ring_fused_recurrent", "ring_qk_norm_rope", "ring_linear_gate", "ring_router"}
    expected |= {"ring_decode_gate_up", "ring_decode_down", "ring_norm_router", "ring_tall_qmv"}
    if tokens > 8:
        expected = {"ring_simd_chunk", "ring_plan", "ring_grouped_gate_up", "ring_grouped_down", "ring_combine"}
    assert expected <= set(compiled)
    assert all(compiled.values())
