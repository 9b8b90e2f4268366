"""The simulator's parts by themselves: rewriter, lint, parameters, line tables, cache."""

from __future__ import annotations

import re

import pytest

from metal_kernels import fused_qmv
from metal_kernels.twin.tokens import RewriteError
from tests.metal_sim import toolchain
from tests.metal_sim.build import KERNELS, MLX_INCLUDE, build, mlx_headers, rewrite_parts
from tests.metal_sim.dialects import Dialect, rewrite
from tests.metal_sim.entry import Parameter, kernel_parameters
from tests.metal_sim.lint import lint
from tests.metal_sim.marks import needs_simulator
from tests.metal_sim.symbols import symbolize
from tests.metal_sim.toolchain import MetalCompileError, staged

ALL = list(Dialect)


@pytest.mark.parametrize("dialect", ALL)
def test_rewriting_keeps_every_line_of_mlxs_headers(dialect):
    for header in sorted((MLX_INCLUDE / KERNELS).rglob("*.h")):
        source = header.read_text(encoding="utf-8")
        text, _ = rewrite(source, header.name, dialect)
        assert text.count("\n") == source.count("\n"), header


@pytest.mark.parametrize("dialect", ALL)
def test_a_kernels_parts_are_rewritten_alike_alone_and_together(dialect):
    header, body = fused_qmv.fused.KERNEL.source()
    body += "metal::vec<float, 4> v = float4(1.0h);"
    source = (
        f"{header}template <int K> [[kernel]] void k(constant int s[2], uint i [[thread_position_in_grid]]) {{{body}}}"
    )

    def without_ids(text):
        return re.sub(r"\(\d+u, ", "(", text)

    whole, parts = rewrite(source, "f", dialect), rewrite_parts(source, "f", dialect, (header, body))
    assert without_ids(parts[0]) == without_ids(whole[0]) != source
    assert parts[1] == whole[1]


def test_an_error_in_a_part_names_the_line_of_the_whole():
    body = "\n int x [[no_such]];"
    with pytest.raises(RewriteError, match=r"^f:3: unknown Metal attribute 'no_such'"):
        rewrite_parts(f"\n{{{body}}}", "f", Dialect.ERASED, (body,))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("float4(a, b)", "msl_mk<float4 >(a, b)"),
        ("metal::half2(x)", "msl_mk<metal::half2 >(x)"),
        ("vec<T, 4>(1)", "msl_mk<vec<T, 4> >(1)"),
        ("float2 v;", "float2 v;"),
        ("x = 1.5h + 2bf;", "x = ((half)1.5f) + ((bfloat)2f);"),
        ("0x1h", "0x1h"),
        ("f(constant int s[2])", "f(constant int *s )"),
        ("uint i [[thread_position_in_grid]]", "uint i"),
        ("[[unlikely]]", "[[unlikely]]"),
        ("constant bool flag [[function_constant(7)]];", "static constexpr bool flag  = MSL_FC_7;"),
    ],
)
def test_erased_text(source, expected):
    assert rewrite(source, "f", Dialect.ERASED)[0].rstrip() == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{ threadgroup float a[4], b; }",
            "{ __shared__ __align__(16) float a[4]; __shared__ __align__(16) float b; }",
        ),
        ("{ threadgroup float* p = a; }", "{  float* p = a; }"),
        ("device const float* x", " const float* x"),
        ("constant float K[2] = {1, 2};", "const float K[2] = {1, 2};"),
        ("float4(a, b)", "float4(a, b)"),
        ("void f(device T* p) {}\nvoid f(threadgroup T* p) {}", "void f( T* p) {}\n"),
    ],
)
def test_cuda_text(source, expected):
    assert rewrite(source, "f", Dialect.CUDA)[0].rstrip(" ") == expected


def test_zeroed_threadgroup_variables_have_no_cuda_form():
    source = "{ threadgroup float a[4] = {}; }"
    assert ", true)" in rewrite(source, "f", Dialect.ERASED)[0]
    with pytest.raises(RewriteError, match="'a'"):
        rewrite(source, "f", Dialect.CUDA)


@pytest.mark.parametrize("source", ["f(int a [[no_such_thing]])", "{ threadgroup float a[4; }"])
def test_unreadable_source_is_an_error_with_its_line(source):
    with pytest.raises(RewriteError, match=r"^f:2: "):
        rewrite("\n" + source, "f", Dialect.ERASED)


def test_function_constants_are_found():
    assert rewrite("constant int a [[function_constant(3)]];", "f", Dialect.STRICT)[1] == {3}


def test_kernel_parameters():
    source = """
    [[kernel]] void k(device const float* x [[buffer(2)]], constant int& n, uint3 p [[thread_position_in_grid]]) {}
    """
    assert kernel_parameters(source, "k") == [
        Parameter(2, "x"),
        Parameter(3, "n"),
        Parameter(None, "thread_position_in_grid"),
    ]
    with pytest.raises(RewriteError, match="other not found"):
        kernel_parameters(source, "other")
    with pytest.raises(RewriteError, match="without attribute"):
        kernel_parameters("kernel void k(uint i) {}", "k")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("void f(device float* x);", []),
        ("int a = b * c;", ["f:1: a program-scope variable must be in the constant address space"]),
        ("constant int a = 1; using F = float;", []),
        ("void f() { long long a; }", ["f:1: 'long long' does not exist in Metal"]),
        ("void f() {\n T* p; }", ["f:2: 'T*' needs an address space (device, constant, threadgroup or thread)"]),
        ("void f() { thread T* p; float y = a * b; }", []),
    ],
)
def test_lint(source, expected):
    assert lint(source, "f", ["T"]) == expected


def test_staged_files_appear_whole_or_not_at_all(tmp_path):
    def fail():
        with staged(tmp_path / "out") as path:
            path.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "out") as path:
        path.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_machine_is_told_why_it_cannot(monkeypatch):
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "arm64")
    assert toolchain.why_unavailable() == "the Metal simulator runs on x86-64 Linux only"


@needs_simulator
def test_compiled_kernels_are_kept():
    source = "[[kernel]] void k(device float* x [[buffer(0)]]) { x[0] = 1; }"
    first = build(source, "k", kernel_parameters(source, "k"), "check", "kept")
    before = first.stat().st_mtime_ns
    assert build(source, "k", kernel_parameters(source, "k"), "check", "kept") == first
    assert first.stat().st_mtime_ns == before
    assert build(source, "k", kernel_parameters(source, "k"), "fast", "kept") != first
    assert symbolize(first, [1]) == {1: "?"}


@needs_simulator
def test_all_of_mlxs_headers_can_be_rewritten():
    folder, constants = mlx_headers(Dialect.STRICT)
    assert constants
    assert not [h for h in folder.rglob("*.h") if h.read_text(encoding="utf-8").startswith("#error")]


HEADERS = (
    "quantized.h sdpa_vector.h softmax.h gemv.h sort.h gated_delta_update.h"
    " steel/gemm/gemm.h steel/attn/kernels/steel_attention.h"
)


@needs_simulator
@pytest.mark.parametrize("header", HEADERS.split())
def test_mlxs_headers_type_check_with_address_spaces(header):
    if not (MLX_INCLUDE / KERNELS / header).exists():
        pytest.skip(f"this MLX has no {header}")
    needed = ["steel/gemm/gemm.h", "quantized_utils.h"] if "quantized" in header else []
    includes = tuple(f'"{KERNELS}/{h}"' for h in ["utils.h", *needed, header])
    source = "[[kernel]] void k(device float* x [[buffer(0)]]) { x[0] = 1; }"
    build(source, "k", kernel_parameters(source, "k"), "strict", "header", includes=includes)


@needs_simulator
def test_compile_errors_are_the_compilers():
    source = "[[kernel]] void k(device float* x [[buffer(0)]]) {\n x[0] = no_such_name; }"
    with pytest.raises(MetalCompileError, match=r"broken.metal:2:.*no_such_name"):
        build(source, "k", kernel_parameters(source, "k"), "strict", "broken")
