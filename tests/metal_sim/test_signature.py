"""The source we generate around a kernel's body equals MLX's own, which MLX prints while it traces for export."""

from __future__ import annotations

import ctypes
import re
import sys

import mlx.core as mx
import pytest

from metal_kernels.twin.spec import METAL_TYPES, KernelSpec
from tests.metal_sim import MetalCompileError, metal_kernel
from tests.metal_sim.lint import lint_name
from tests.metal_sim.signature import metal_function

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
    assert metal_function(spec, inputs, dtypes, template)[0] == printed.group(1)


def test_an_output_is_required():
    with pytest.raises(ValueError, match="at least one output"):
        KernelSpec("k", ("x",), (), "")


def test_counts_are_checked():
    with pytest.raises(ValueError, match="Expected `inputs` to have size 1 but got size 0"):
        KernelSpec("k", ("x",), ("o",), "").check_counts([], [(1,)], [F32])


@pytest.mark.parametrize(
    "value", [1.5, -0.5, float("inf"), float("nan"), 2**31, -(2**31) - 1, "a", None, mx.float64], ids=str
)
def test_template_values_that_mlx_refuses_are_refused_in_its_words(value):
    spec, kernel = (
        KernelSpec("k", ("x",), ("o",), "o[0] = x[0];"),
        mx.fast.metal_kernel("k", ["x"], ["o"], "o[0] = x[0];"),
    )
    x = mx.zeros((9,))
    with pytest.raises(ValueError, match="Invalid template argument") as ours:
        metal_function(spec, [x], [F32], [("N", value)])
    one = (1, 1, 1)
    with pytest.raises(Exception, match=r"\[metal_kernel\]|float64") as mlxs:
        kernel(
            inputs=[x], template=[("N", value)], grid=one, threadgroup=one, output_shapes=[(1,)], output_dtypes=[F32]
        )
    if value is not mx.float64:
        assert str(ours.value) == str(mlxs.value)


@pytest.mark.parametrize("value", [True, False, -1, -(2**31), 2**31 - 1, *METAL_TYPES], ids=str)
def test_every_template_value_makes_a_name_that_metal_takes(value):
    name = metal_function(KernelSpec("k", ("x",), ("o",), ""), [mx.zeros((9,))], [F32], [("N", value)])[1]
    assert lint_name(name) == []


def test_names_that_no_function_can_have_are_refused():
    assert lint_name("custom_kernel_a-b") == ["'custom_kernel_a-b' is not a name that a Metal function can have"]
    assert lint_name("custom_kernel_ä")
    assert "1038 characters" in lint_name("custom_kernel_" + 1024 * "n")[0]
    with pytest.raises(MetalCompileError, match=r"'custom_kernel_a\.b__3_float_float' is not a name"):
        metal_kernel("a.b", ["x"], ["o"], "o[0] = x[0];")(
            inputs=[mx.zeros((9,))],
            template=[("N", 3)],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[F32],
        )
