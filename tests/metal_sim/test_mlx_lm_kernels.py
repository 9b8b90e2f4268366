"""Every kernel of mlx-lm against MLX ops: in the simulator, as CUDA text on the simulator's runtime, and in NVRTC."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metal_kernels.twin.cuda_source import Variant, cuda_source
from metal_kernels.twin.nvrtc import compile_cubin, find_nvrtc
from metal_kernels.twin.spec import KernelSpec
from tests.metal_sim import MetalRunError, metal_kernel
from tests.metal_sim.cuda_host import run_cuda_on_host
from tests.metal_sim.marks import needs_simulator

pytestmark = [needs_simulator, pytest.mark.slow]

F32, BF16 = mx.float32, mx.bfloat16
Pairs = "list[tuple[mx.array, mx.array]]"


def run(how: str, spec: KernelSpec, *, verbose: bool = False, stream: object = None, **arguments):
    """One call of a kernel: check0, check1, fast, host (CUDA text on this machine) or nvrtc (host, and compiled)."""
    arguments["inputs"] = [x if isinstance(x, mx.array) else mx.array(x) for x in arguments["inputs"]]
    if how in ("host", "nvrtc"):
        if how == "nvrtc":
            compile_for_gpu(spec, arguments)
        return run_cuda_on_host(spec, **arguments)
    fixed = (spec.name, spec.input_names, spec.output_names, spec.source, spec.header, spec.ensure_row_contiguous)
    order = int(how[-1]) if how.startswith("check") else 0
    return metal_kernel(*fixed, spec.atomic_outputs, mode=how.rstrip("01"), order=order)(**arguments)


def compile_for_gpu(spec, arguments):
    types = tuple((x.dtype, x.ndim) for x in arguments["inputs"])
    block = tuple(min(t, g) for t, g in zip(arguments["threadgroup"], arguments["grid"], strict=True))
    is_ragged = any(g % t for g, t in zip(arguments["grid"], block, strict=True))
    template = tuple(arguments.get("template") or ())
    source = cuda_source(spec, Variant(types, tuple(arguments["output_dtypes"]), template, block, is_ragged))
    assert compile_cubin(source.text, spec.name, "sm_90")[0]


@pytest.fixture(scope="module")
def how() -> Iterator[list[str]]:
    """mlx-lm imported afresh as on a Mac; the list's only item says how its kernels run."""
    current = ["fast"]

    def constructor(name, input_names, output_names, source, header="", ensure_row_contiguous=True, **rest):
        names = tuple(input_names), tuple(output_names)
        spec = KernelSpec(name, *names, source, header, ensure_row_contiguous, rest.get("atomic_outputs", False))
        return lambda **arguments: run(current[0], spec, **arguments)

    def unload() -> dict[str, object]:
        return {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] == "mlx_lm"}

    loaded = unload()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", constructor)
        patch.setattr(mx.metal, "is_available", lambda: True)
        utils = importlib.import_module("mlx_lm.utils")
        if hasattr(utils, "can_run_metal"):
            patch.setattr(utils, "can_run_metal", lambda: True)
        yield current
    unload()
    sys.modules.update(loaded)


def model(name: str):
    return importlib.import_module(f"mlx_lm.models.{name}")


def normal(*shape: int, dtype: mx.Dtype = F32) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def gated_delta(
    form: str, T: int = 33, K: int = 128, dtype: mx.Dtype = F32, vector: bool = False, masked: bool = False
):
    B, G, H, V = 1, 2, 4, 64
    q, k, v = (normal(B, T, n, d, dtype=dtype) for n, d in ((G, K), (G, K), (H, V)))
    q, k = q * 0.1, k * 0.1
    g = mx.random.uniform(0.8, 1.0, (B, T, H, K) if vector else (B, T, H))
    beta, state = mx.random.uniform(0, 1, (B, T, H)), normal(B, H, V, K)
    mask = mx.random.uniform(0, 1, (B, T)) > 0.3 if masked else None
    y, s = model("gated_delta").gated_delta_ops(q, k, v, g, beta, state, mask)
    if mask is not None:
        y = y * mask[..., None, None].astype(y.dtype)
    ours = getattr(model("gated_delta"), form)(q, k, v, g, beta, state, mask)
    return list(zip(ours, (y, s), strict=True))


def ssm_update():
    b, h, d, g, n = 2, 8, 64, 2, 128
    x, A, B, C, D = normal(b, 1, h, d), normal(h), normal(b, 1, g, n), normal(b, 1, g, n), normal(h)
    dt, bias, state = normal(b, 1, h), normal(h), normal(b, h, d, n)
    ours = model("ssm").ssm_update_kernel(x, A, B, C, D, dt, bias, state, (0.001, 100.0))
    return list(zip(ours, model("ssm").ssm_attn(x, A, B, C, D, dt, bias, state), strict=True))


def bitlinear():
    n, m = 256, 128
    layer = model("bitlinear_layers").BitLinear(n, m, bias=False)
    w = np.random.default_rng(0).integers(0, 3, (4, m // 4, n))
    layer.weight = mx.array((w[0] | w[1] << 2 | w[2] << 4 | w[3] << 6).astype(np.uint8))
    x = normal(3, n)
    return [(layer(x), x @ mx.array((w.reshape(m, n) - 1).astype(np.float32)).T)]


def kernels():
    return importlib.import_module("mlx_lm.kernels")


def expert_routing():
    logits, bias = normal(6, 96), normal(96) * 0.1
    chosen, weights = kernels().expert_routing(logits, bias, top_k=8, multiplier=1.0, score_eps=1e-6, route_scale=2.0)
    scores = mx.sigmoid(logits)
    expected = mx.argsort(-(scores + bias), axis=-1)[..., :8]
    w = mx.take_along_axis(scores, expected, -1)
    return [(chosen, expected), (weights, w / (w.sum(-1, keepdims=True) + 1e-6) * 2.0)]


def rms(x: mx.array) -> mx.array:
    return x * mx.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def norm_add_norm(D: int, dtype: mx.Dtype):
    branch, stream, alpha, beta, post = (
        normal(5, D, dtype=dtype),
        normal(5, D),
        normal(D),
        normal(D),
        normal(D, dtype=dtype),
    )
    norm = nn.RMSNorm(D, 1e-6)
    norm.weight = normal(D, dtype=dtype)
    out, normed = kernels().norm_add_norm(
        branch, stream, alpha=alpha, beta=beta, post_weight=post, post_eps=1e-6, next_norm=norm
    )
    weighted = (post.astype(F32) * branch.astype(F32)).astype(dtype).astype(F32)
    expected = alpha * stream + beta * rms(weighted).astype(dtype).astype(F32)
    expected_normed = (rms(expected) * norm.weight.astype(F32)).astype(dtype)
    return [(out, expected), (normed, expected_normed), (kernels().pre_norm(out, norm, dtype=dtype), normed)]


def post_expert_norm_combine():
    x, w, weight = normal(3, 4, 768, dtype=BF16), mx.random.uniform(0, 1, (3, 4)), normal(768, dtype=BF16)
    out = kernels().post_expert_norm_combine(x, w, norm_weight=weight, eps=1e-6)
    value = rms(x.astype(F32) * weight.astype(F32)) * w.astype(BF16).astype(F32)[..., None]
    return [(out, value.sum(-2))]


def qk_norm(is_rotated: bool):
    H, G, D = 4, 2, 64
    x = normal(2, 5, 2 * (H + G) * D)
    sizes = {"n_heads": H, "n_kv_heads": G, "head_dim": D, "eps": 1e-6, "query_scale": 0.125}
    q = mx.fast.rms_norm(x[..., : H * D].reshape(2, 5, H, D), None, 1e-6) * 0.125
    k = mx.fast.rms_norm(x[..., H * D : (H + G) * D].reshape(2, 5, G, D), None, 1e-6)
    if not is_rotated:
        return list(zip(kernels().qk_norm(x, **sizes), (q, k), strict=True))

    def rotated(z):
        turned = mx.fast.rope(z.transpose(0, 2, 1, 3), D, traditional=True, base=10000.0, scale=1.0, offset=7)
        return turned.transpose(0, 2, 1, 3)

    ours = kernels().qk_norm_rope(x, **sizes, rope_base=10000.0, offset=7)
    return list(zip(ours, (rotated(q), rotated(k)), strict=True))


def rms_norm_sigmoid_gate():
    B, H, L, D = 2, 3, 5, 64
    x, gate = normal(B, L, H, D).transpose(0, 2, 1, 3), normal(B, L, H * D)
    expected = mx.fast.rms_norm(x, None, 1e-6).transpose(0, 2, 1, 3).reshape(B, L, H * D) * mx.sigmoid(gate)
    return [(kernels().rms_norm_sigmoid_gate(x, gate, eps=1e-6), expected)]


def rwkv7():
    B, T, H, D = 1, 9, 2, 64
    r, w, k, v, a, b = (normal(B, T, H, D) * 0.3 for _ in range(6))
    state = normal(B, H, D, D)
    ours = model("rwkv7").wkv7_kernel(r, w, k, v, a, b, state)
    outputs = []
    for t in range(T):
        read = (state @ a[:, t][..., None]) * b[:, t][:, :, None, :]
        state = state * w[:, t][:, :, None, :] + v[:, t][..., None] * k[:, t][:, :, None, :] + read
        outputs.append((state @ r[:, t][..., None])[..., 0])
    return list(zip(ours, (mx.stack(outputs, 1), state), strict=True))


def kimi_attn_res():
    K, n, D = 3, 4, 512
    raw, partial, weight, inverse = normal(K, n, D), normal(n, D), normal(D), mx.random.uniform(0.5, 1, (K, n))
    (out,) = model("kimi_k3")._attn_res_kernel(
        inputs=[raw, inverse, partial, weight, mx.array([1e-6]), n],
        template=[("InT", F32), ("K", K), ("D", D), ("THREADS", 512)],
        grid=(512, n, 1),
        threadgroup=(512, 1, 1),
        output_shapes=[(n, D)],
        output_dtypes=[F32],
    )
    logits = mx.concatenate([(raw @ weight) * inverse, (rms(partial) @ weight)[None]], 0)
    p = mx.softmax(logits, 0)
    return [(out, (p[:-1, :, None] * raw).sum(0) + p[-1, :, None] * partial)]


def deepseek_sinkhorn():
    c = mx.random.uniform(0.1, 1, (7, 4, 4))
    (out,) = model("deepseek_v41")._sinkhorn_kernel(
        inputs=[c, mx.array([1e-6])],
        template=[("HC", 4), ("ITERS", 5)],
        grid=(7, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[c.shape],
        output_dtypes=[F32],
    )
    return [(out, model("deepseek_v41")._sinkhorn(c, iters=5, eps=mx.array([1e-6])))]


CASES: dict[str, tuple[Callable[[], Pairs], float]] = {
    "gated_delta": (lambda: gated_delta("gated_delta_kernel"), 1e-4),
    "gated_delta_bf16": (lambda: gated_delta("gated_delta_kernel", dtype=BF16), 2e-2),
    "gated_delta_unpacked": (lambda: gated_delta("gated_delta_kernel_unpacked"), 1e-4),
    "gated_delta_xtree": (lambda: gated_delta("gated_delta_kernel_xtree"), 1e-4),
    "gated_delta_mask": (lambda: gated_delta("gated_delta_kernel", masked=True), 1e-4),
    "gated_delta_vector": (lambda: gated_delta("gated_delta_kernel", K=64, vector=True), 1e-4),
    "gated_delta_vector_mask": (lambda: gated_delta("gated_delta_kernel", K=64, vector=True, masked=True), 1e-4),
    "ssm_update": (ssm_update, 1e-4),
    "bitlinear": (bitlinear, 1e-4),
    "expert_routing": (expert_routing, 1e-4),
    "norm_add_norm_bf16": (lambda: norm_add_norm(1536, BF16), 2e-2),
    "norm_add_norm_f32": (lambda: norm_add_norm(100, F32), 1e-4),
    "post_expert_norm_combine": (post_expert_norm_combine, 3e-2),
    "qk_norm": (lambda: qk_norm(False), 1e-5),
    "qk_norm_rope": (lambda: qk_norm(True), 1e-4),
    "rms_norm_sigmoid_gate": (rms_norm_sigmoid_gate, 1e-5),
    "rwkv7": (rwkv7, 1e-4),
    "kimi_attn_res": (kimi_attn_res, 1e-4),
    "deepseek_sinkhorn": (deepseek_sinkhorn, 1e-5),
}
HOWS = ("check0", "check1", "fast", "nvrtc" if find_nvrtc() is not None else "host")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", HOWS)
def test_against_ops(name, mode, how):
    make, tolerance = CASES[name]
    how[0] = mode
    mx.random.seed(0)
    for ours, expected in make():
        a, e = (np.array(x.astype(F32)) for x in (ours, expected))
        assert np.abs(a - e).max() <= tolerance * max(1.0, float(np.abs(e).max()))


@pytest.mark.parametrize("name", ["kl_forward", "js_forward", "kl_backward"])
def test_the_races_of_mlx_lms_loss_kernels_are_found(name, how):
    """They read threadgroup memory that other SIMD-groups overwrite without a barrier between (mlx-lm 0.32.2)."""
    how[0] = "check0"
    kernel = getattr(importlib.import_module("mlx_lm.tuner.losses"), f"_{name}_kernel")
    inputs = [normal(3, 5000), normal(3, 5000), *([normal(3)] if name == "kl_backward" else [])]
    shapes = {"kl_forward": [(3,)], "js_forward": [(3,)] * 2, "kl_backward": [(3, 5000)]}[name]
    with pytest.raises(MetalRunError, match="race"):
        kernel(
            inputs=inputs,
            output_shapes=shapes,
            output_dtypes=[F32] * len(shapes),
            template=[("T", F32), ("V", 5000)],
            grid=(1024, 3, 1),
            threadgroup=(1024, 1, 1),
        )
