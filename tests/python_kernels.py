"""Kernels in MLX's own operations, for tests that need right ones which can be traced or made wrong, and no compiler."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from metal_kernels import Matrices, Packed
from metal_kernels.ends.naive import naive_embed, naive_peak
from metal_kernels.fused_qmv.naive import naive_add_qmv, naive_gate_qmv, naive_norm_qmv
from metal_kernels.launch import Kernel
from metal_kernels.lightning_attn.chunk import chunk_lightning_attn
from metal_kernels.lightning_attn.naive import naive_qkv_lightning_attn
from metal_kernels.linear_gate.naive import naive_linear_gate
from metal_kernels.norm_router.naive import naive_add_norm, naive_norm_router
from metal_kernels.qk_norm_rope.naive import naive_qk_norm_rope
from metal_kernels.quantized_moe.experts import _gathered
from metal_kernels.router.naive import naive_route

Arrays = dict[str, mx.array]
Template = dict[str, Any]
Spoil = Callable[[str, Template, Sequence[mx.array]], Sequence[mx.array]]


def construct(spoil: Spoil | None = None, told: list[str] | None = None) -> Callable[..., Any]:
    """A backend's constructor; use it with the fixture ``python_kernels``, which hands it the kernel.

    Args:
        spoil: Is given the kernel's name, its template and its right outputs, and returns what it gives instead.
        told: The name of each kernel that is launched is appended.
    """

    def constructor(kernel: Kernel, same: Sequence[int]) -> Callable[..., Any]:
        places = {first: n for n, first in enumerate(dict.fromkeys(same))}

        def call(*, inputs: Any, template: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            named, t = {n: inputs[places[i]] for n, i in zip(kernel.inputs, same, strict=True)}, dict(template)
            found = FORMS[kernel.name.removeprefix("ring_")](named, t)
            full = [mx.zeros(s) if x is None else x for x, s in zip(found, output_shapes, strict=True)]
            out = [x.astype(d).reshape(s) for x, s, d in zip(full, output_shapes, output_dtypes, strict=True)]
            if told is not None:
                told.append(kernel.name)
            return list(spoil(kernel.name, t, out)) if spoil else out

        return call

    return constructor


def hand_over(kernel: Kernel, constructor: Any, same: Sequence[int]) -> Any:
    """In place of `Kernel._build`: the constructor gets the kernel and not its text."""
    return constructor(kernel, same)


def _float(bits: int) -> float:
    found: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    return found


def _packed(named: Arrays, t: Template, name: str) -> Packed:
    w, s, b = (named[f"{name}_{part}"] for part in "wsb")
    if w.ndim == 1:  # a buffer; what lies behind the last expert is never chosen
        rows, groups = t["K"] * t["BITS"] // 32, t["K"] // t["GROUP"] * t["S"].size // 4
        places = [t[f"{name}_{part}".upper()] for part in "wsb"]
        cut = zip(places, (rows, groups, groups), (t["W"], t["S"], t["S"]), strict=True)
        stacks = [
            w[at : at + (w.size - at) // (t["N"] * n) * t["N"] * n].reshape(-1, t["N"], n).view(d) for at, n, d in cut
        ]
        w, s, b = (x[0] if name.startswith("shared") else x for x in stacks)
    if t["MODE"] == 0:
        return Packed(w)
    if t["MODE"] == 1:
        return Packed(w, s, b, t["BITS"], t["GROUP"], "affine")
    return Packed(w, s, None, t["BITS"], t["GROUP"], f"mxfp{t['BITS']}")


def _fused_qmv(a: Arrays, t: Template) -> list[mx.array | None]:
    first, residual = _packed(a, t, "first"), a["residual"] if t["HAS_RESIDUAL"] else None
    eps = _float(t["EPS"])
    if t["PROLOGUE"] == 1:
        both = Matrices(first, _packed(a, t, "second") if t["SECOND"] else None)
        return [*naive_norm_qmv(a["x"], a["weight"], eps, both, t["O"]), None][:2]
    if t["PROLOGUE"] == 2:
        y = naive_gate_qmv(a["x"], a["gate"], a["weight"], t["GROUPS"], eps, Matrices(first), residual)
    else:
        y = naive_add_qmv(a["x"], Matrices(first), residual)
    return [y, None]


def _embed(a: Arrays, t: Template) -> list[mx.array]:
    return [naive_embed(a["tokens"], _packed(a, t, "w"), t["O"])]


def _norm_router(a: Arrays, t: Template) -> list[mx.array | None]:
    r, eps = a["r"] if t["HAS_RESIDUAL"] else None, _float(t["EPS"])
    if not t["E"]:
        return [*naive_add_norm(a["x"], r, a["weight"], eps, t["O"]), None]
    x, *others = naive_norm_router(a["x"], r, a["weight"], _packed(a, t, "router"), eps, t["O"])
    return [None if r is None else x, *others]


def _router(a: Arrays, t: Template) -> Sequence[mx.array]:
    options = t["TOP_K"], t["GROUPS"], t["TOPK_GROUP"], _float(t["SCALING"]), t["NORMALIZE"]
    return naive_route(a["logits"], a["bias"] if t["HAS_BIAS"] else None, *options)


def _norms(a: Arrays, t: Template) -> tuple[mx.array | None, mx.array | None]:
    return (a["q_weight"], a["k_weight"]) if t["NORM"] else (None, None)


def _qk_norm_rope(a: Arrays, t: Template) -> Sequence[mx.array]:
    scale, eps = _float(t["ROPE_SCALE"]), _float(t["EPS"])
    return naive_qk_norm_rope(
        a["qkv"], *_norms(a, t), a["inv_freq"], scale, a["offset"], eps, t["HQ"], t["HKV"]
    )  # fmt: skip


def _fused_recurrent(a: Arrays, t: Template) -> Sequence[mx.array]:
    state, mask = a["state"] if t["HAS_STATE"] else None, a["mask"] if t["HAS_MASK"] else None
    rotation = a["inv_freq"], _float(t["ROPE_SCALE"]), a["offset"]
    numbers = _float(t["SCALE"]), _float(t["EPS"])
    return naive_qkv_lightning_attn(
        a["qkv"], *_norms(a, t), *rotation, a["decay_rate"], *numbers, state, mask, t["EACH"]
    )


def _simd_chunk(a: Arrays, t: Template) -> Sequence[mx.array]:
    state, mask = a["state"] if t["HAS_STATE"] else None, a["mask"] if t["HAS_MASK"] else None
    q, k, v = (a[name].transpose(0, 2, 1, 3) for name in "qkv")
    return chunk_lightning_attn(q, k, v, a["decay_rate"], _float(t["SCALE"]), state, mask)


def _decode_gate_up(a: Arrays, t: Template) -> list[mx.array]:
    picked = _router(a, t) if "logits" in a else []
    x = a["x"].reshape(-1, 1, 1, t["K"]).astype(mx.float32)
    chosen = (picked[0] if picked else a["chosen"]).reshape(-1, t["TOP_K"])
    gate, up = (_gathered(x, _packed(a, t, name), chosen) for name in ("gate", "up"))
    if t["SLOTS"] > t["TOP_K"]:
        shared = (x @ _packed(a, t, f"shared_{name}").dequantize().T for name in ("gate", "up"))
        gate, up = (mx.concatenate(pair, axis=1) for pair in zip((gate, up), shared, strict=True))
    return [gate * mx.sigmoid(gate) * up, *picked]


def _decode_down(a: Arrays, t: Template) -> list[mx.array]:
    k, h = t["TOP_K"], a["h"][..., None, :]
    y = _gathered(h[:, :k], _packed(a, t, "down"), a["chosen"].reshape(-1, k))[:, :, 0]
    y = (y * a["weights"].reshape(-1, k, 1)).sum(axis=1)
    if t["SLOTS"] > k:
        y = y + h[:, k, 0] @ _packed(a, t, "shared_down").dequantize().T
    return [y + a["residual"].reshape(y.shape).astype(mx.float32) if t["HAS_RESIDUAL"] else y]


FORMS: dict[str, Callable[[Arrays, Template], Sequence[mx.array | None]]] = {
    "fused_qmv": _fused_qmv,
    "tall_qmv": _fused_qmv,
    "embed": _embed,
    "peak": lambda a, t: naive_peak(a["x"]),
    "norm_router": _norm_router,
    "router": _router,
    "qk_norm_rope": _qk_norm_rope,
    "fused_recurrent": _fused_recurrent,
    "simd_chunk": _simd_chunk,
    "segment_states": lambda a, t: [None, None],  # which the other one here does not read
    "linear_gate": lambda a, t: [naive_linear_gate(a["x"], a["gate"], a["weight"], t["GROUPS"], _float(t["EPS"]))],
    "decode_gate_up": _decode_gate_up,
    "decode_down": _decode_down,
}
