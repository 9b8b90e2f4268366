"""The source we generate around a kernel's body equals MLX's own, which MLX prints while it traces for export."""

from __future__ import annotations

import ctypes
import re
import sys

import mlx.core as mx
import pytest

from metal_kernels.twin.spec import KernelSpec

F32, BF16 = mx.float32, mx.bfloat16
CASES = {
    "everything": (
        KernelSpec(
            "k1",
            ("x", "w", "s", "c"),
            ("o", "p"),
            "o[thread_position_in_grid.x] = x[x_shape[0] + x_strides[1]] + w_ndim + s + c[0] + simdgroups_per_threadgroup;",
            header="// hi\n",
        ),
        [mx.zeros((4, 5)), mx.zeros((9,), BF16), mx.array(1.0), mx.zeros((3,), mx.int32)],
        [("T", BF16), ("N", 4), ("B", True), ("M", -3)],
        [mx.float16, mx.uint8],
    ),
    "no_template": (KernelSpec("k2", ("x",), ("o",), "o[0]=x[0];"), [mx.zeros((4, 5), mx.int64)], [], [mx.int64]),
    "atomic_and_overlapping_names": (
        KernelSpec(
            "k3",
            ("x", "x_b"),
            ("o",),
            "atomic_fetch_add_explicit(&o[0], x[0] + x_b[0] + x_b_shape[0], memory_order_relaxed);",
            atomic_outputs=True,
        ),
        [mx.zeros((40,)), mx.zeros((4,))],
        [("T", F32)],
        [F32],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_source_is_that_of_mlx(name, capfd, tmp_path):
    spec, inputs, template, dtypes = CASES[name]
    kernel = mx.fast.metal_kernel(
        name=spec.name,
        input_names=spec.input_names,
        output_names=spec.output_names,
        source=spec.source,
        header=spec.header,
        atomic_outputs=spec.atomic_outputs,
    )

    def call(*arrays):
        return kernel(
            inputs=list(arrays),
            template=template,
            output_shapes=[(1,)] * len(dtypes),
            output_dtypes=dtypes,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            verbose=True,
            stream=mx.gpu,
        )

    capfd.readouterr()
    mx.export_function(str(tmp_path / "kernel.mlxfn"), call, *inputs)
    ctypes.CDLL(None).fflush(None)
    sys.stdout.flush()
    printed = re.search(r"```\n(.*)\n```", capfd.readouterr().out, re.DOTALL)
    assert printed is not None
    assert spec.metal_function(inputs, dtypes, template)[0] == printed.group(1)


def test_an_output_is_required():
    with pytest.raises(ValueError, match="at least one output"):
        KernelSpec("k", ("x",), (), "")


def test_counts_are_checked():
    with pytest.raises(ValueError, match="Expected `inputs` to have size 1 but got size 0"):
        KernelSpec("k", ("x",), ("o",), "").check_counts([], [(1,)], [F32])
