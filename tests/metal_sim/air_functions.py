"""LLVM text of the air.* functions that Apple's compiler calls, written on the simulator's runtime."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tests.metal_sim.toolchain import MetalCompileError

TYPES = {
    "f32": "float",
    "f16": "half",
    "bf16": "bfloat",
    "i1": "i1",
    "i8": "i8",
    "i16": "i16",
    "i32": "i32",
    "i64": "i64",
    "v2i32": "<2 x i32>",
}
SIZES = {"float": 4, "half": 2, "bfloat": 2, "i8": 1, "i16": 2, "i32": 4, "<2 x i32>": 8}
UNARY = "acos acosh asin asinh atan atanh ceil cos cosh exp exp2 fabs floor log log2 log10 rint round sin sinh sqrt tan"
LIBM = {name: f"{name}f" for name in [*UNARY.split(), "tanh", "trunc"]}
LIBM2 = {name: f"{name}f" for name in ("atan2", "copysign", "fmax", "fmin", "fmod", "pow")}
REDUCTIONS = ("sum", "product", "min", "max", "and", "or", "xor")
SHUFFLES = ("shuffle", "shuffle_xor", "shuffle_up", "shuffle_down", "shuffle_rotate_up", "shuffle_rotate_down")
SITE = "ptr null, i32 1"
LANE_OFFSET = 88  # of msl_thread::lane

RUNTIME_DECLARATIONS = """
@msl_self = external global ptr
declare void @msl_reduce(ptr, i32, i32, i32, ptr, i32)
declare void @msl_scan(ptr, i32, i32, i32, ptr, i32)
declare void @msl_shuffle(ptr, i32, i32, i32, ptr, i32, i32, ptr, i32)
declare void @msl_mma(ptr, ptr, ptr, ptr, ptr, i32)
declare void @msl_tg_barrier(i32, ptr, i32)
declare void @msl_sg_barrier(i32, ptr, i32)
declare i32 @msl_ballot(i1 zeroext, ptr, i32)
"""
Lines = list[str]


def _widen(type_: str, value: str, out: str) -> str:
    """A float from any float type."""
    return f"{out} = fadd float {value}, -0.0" if type_ == "float" else f"{out} = fpext {type_} {value} to float"


def _narrow(type_: str, value: str, out: str) -> str:
    return f"{out} = fadd float {value}, -0.0" if type_ == "float" else f"{out} = fptrunc float {value} to {type_}"


def _reduce(m: re.Match[str], _: Sequence[str]) -> Lines:
    width, op, type_ = (32 if m[1] == "simd" else 4), REDUCTIONS.index(m[2]), TYPES[m[4]]
    if type_ in ("float", "half"):
        call = f"call void @msl_reduce(ptr %v, i32 {int(type_ == 'half')}, i32 {op}, i32 {width}, {SITE})"
        load = ["%r = load float, ptr %v", _narrow(type_, "%r", "%out"), f"ret {type_} %out"]
        return ["%v = alloca float", _widen(type_, "%0", "%w"), "store float %w, ptr %v", call, *load]
    extend, kind = ("sext", 2) if m[3] == "s" else ("zext", 3)
    wide = "%w = add i32 %0, 0" if type_ == "i32" else f"%w = {extend} {type_} %0 to i32"
    call = f"call void @msl_reduce(ptr %v, i32 {kind}, i32 {op}, i32 {width}, {SITE})"
    narrow = "%out = add i32 %r, 0" if type_ == "i32" else f"%out = trunc i32 %r to {type_}"
    load = ["%r = load i32, ptr %v", narrow, f"ret {type_} %out"]
    return ["%v = alloca i32", wide, "store i32 %w, ptr %v", call, *load]


def _scan(m: re.Match[str], _: Sequence[str]) -> Lines:
    type_ = TYPES[m[4]]
    kind = 0 if type_ == "float" else 2 if m[3] == "s" else 3
    flags = f"i32 {kind}, i32 {int(m[2] == 'product')}, i32 {int(m[1] == 'exclusive')}"
    return [
        f"%v = alloca {type_}",
        f"store {type_} %0, ptr %v",
        f"call void @msl_scan(ptr %v, {flags}, {SITE})",
        f"%r = load {type_}, ptr %v",
        f"ret {type_} %r",
    ]


def _shuffle(m: re.Match[str], arguments: Sequence[str]) -> Lines:
    type_, width = arguments[0], 32 if m[1] == "simd" else 4
    mode = 0 if m[2] == "broadcast" else SHUFFLES.index(m[2])
    rest = f"i32 {mode}, i32 %k, ptr null, i32 0, i32 {width}, {SITE}"
    return [
        f"%v = alloca {type_}",
        f"store {type_} %0, ptr %v",
        "%k = zext i16 %1 to i32",
        f"call void @msl_shuffle(ptr %v, i32 {SIZES[type_]}, {rest})",
        f"%r = load {type_}, ptr %v",
        f"ret {type_} %r",
    ]


def _barrier(m: re.Match[str], _: Sequence[str]) -> Lines:
    function = "msl_tg_barrier" if m[1] == "wg" else "msl_sg_barrier"
    return [f"call void @{function}(i32 %0, {SITE})", "ret void"]


def _vote(m: re.Match[str], _: Sequence[str]) -> Lines:
    flip, test = ("0", "ne") if m[1] == "any" else ("1", "eq")
    vote = [f"%n = xor i1 %0, {flip}", f"%b = call i32 @msl_ballot(i1 zeroext %n, {SITE})"]
    return [*vote, f"%r = icmp {test} i32 %b, 0", "ret i1 %r"]


def _multiply(m: re.Match[str], _: Sequence[str]) -> Lines:
    lines = ["%d = alloca [2 x float]"]
    for i, name in enumerate("abc"):
        type_ = TYPES[m[i + 2]]
        lines.append(f"%{name} = alloca [2 x float]")
        for j in (0, 1):
            lines += [
                f"%{name}{j} = extractelement <64 x {type_}> %{i}, i32 {j}",
                _widen(type_, f"%{name}{j}", f"%{name}f{j}"),
                f"%{name}p{j} = getelementptr float, ptr %{name}, i32 {j}",
                f"store float %{name}f{j}, ptr %{name}p{j}",
            ]
    type_, value = TYPES[m[1]], "undef"
    lines.append(f"call void @msl_mma(ptr %d, ptr %a, ptr %b, ptr %c, {SITE})")
    for j in (0, 1):
        lines += [
            f"%dp{j} = getelementptr float, ptr %d, i32 {j}",
            f"%df{j} = load float, ptr %dp{j}",
            _narrow(type_, f"%df{j}", f"%dt{j}"),
            f"%r{j} = insertelement <64 x {type_}> {value}, {type_} %dt{j}, i32 {j}",
        ]
        value = f"%r{j}"
    return [*lines, f"ret <64 x {type_}> %r1"]


def _fill(m: re.Match[str], _: Sequence[str]) -> Lines:
    type_ = TYPES[m[1]]
    return [
        f"%r0 = insertelement <64 x {type_}> undef, {type_} %0, i32 0",
        f"%r1 = insertelement <64 x {type_}> %r0, {type_} %0, i32 1",
        f"ret <64 x {type_}> %r1",
    ]


def _lane() -> Lines:
    return [
        "%s = load ptr, ptr @msl_self",
        f"%lp = getelementptr i8, ptr %s, i64 {LANE_OFFSET}",
        "%l32 = load i32, ptr %lp",
    ]


def _matrix_memory(m: re.Match[str], _: Sequence[str]) -> Lines:
    """load(pointer, i64 row elements, <2 x i64> origin, i1 transpose); store has the matrix first."""
    type_, is_store = TYPES[m[2]], m[1] == "store"
    at = 1 if is_store else 0
    lines = [*_lane(), "%l = zext i32 %l32 to i64", "%q = lshr i64 %l, 2", "%q4 = and i64 %q, 4"]
    lines += ["%h = lshr i64 %l, 1", "%h3 = and i64 %h, 3", "%row = add i64 %q4, %h3", "%q2 = and i64 %q, 2"]
    lines += ["%c2 = shl i64 %q2, 1", "%l1 = and i64 %l, 1", "%l2 = shl i64 %l1, 1", "%col = add i64 %c2, %l2"]
    lines += ["%col1 = add i64 %col, 1"]
    lines += [f"%o{axis} = extractelement <2 x i64> %{at + 2}, i32 {i}" for i, axis in enumerate("xy")]
    for j, column in ((0, "%col"), (1, "%col1")):
        lines += [
            f"%r_{j} = select i1 %{at + 3}, i64 {column}, i64 %row",
            f"%c_{j} = select i1 %{at + 3}, i64 %row, i64 {column}",
            f"%ra{j} = add i64 %r_{j}, %oy",
            f"%rb{j} = mul i64 %ra{j}, %{at + 1}",
            f"%ca{j} = add i64 %c_{j}, %ox",
            f"%i{j} = add i64 %rb{j}, %ca{j}",
            f"%p{j} = getelementptr {type_}, ptr %{at}, i64 %i{j}",
        ]
    if is_store:
        for j in (0, 1):
            lines += [f"%e{j} = extractelement <64 x {type_}> %0, i32 {j}", f"store {type_} %e{j}, ptr %p{j}"]
        return [*lines, "ret void"]
    return [
        *lines,
        f"%e0 = load {type_}, ptr %p0",
        f"%e1 = load {type_}, ptr %p1",
        f"%r0 = insertelement <64 x {type_}> undef, {type_} %e0, i32 0",
        f"%r1 = insertelement <64 x {type_}> %r0, {type_} %e1, i32 1",
        f"ret <64 x {type_}> %r1",
    ]


def _convert(m: re.Match[str], _: Sequence[str]) -> Lines:
    to, from_ = TYPES[m[2]], TYPES[m[4]]
    if m[1] == m[3] == "f":
        if "float" not in (to, from_):
            return [f"%x = fpext {from_} %0 to float", f"%r = fptrunc float %x to {to}", f"ret {to} %r"]
        operation = "fpext" if to == "float" else "fptrunc"
    elif m[1] == "f":
        operation = "sitofp" if m[3] == "s" else "uitofp"
    elif to == "i1":
        return [f"%r = fcmp une {from_} %0, 0.0", "ret i1 %r"]
    else:
        operation = "fptosi" if m[1] == "s" else "fptoui"
    return [f"%r = {operation} {from_} %0 to {to}", f"ret {to} %r"]


def _integer_bound(m: re.Match[str], _: Sequence[str]) -> Lines:
    test = f"{m[2]}{'lt' if m[1] == 'min' else 'gt'}"
    return [f"%c = icmp {test} {m[3]} %0, %1", f"%r = select i1 %c, {m[3]} %0, {m[3]} %1", f"ret {m[3]} %r"]


def _math(m: re.Match[str], _: Sequence[str]) -> Lines:
    name = m[1]
    if name in LIBM:
        return [f"%r = call float @{LIBM[name]}(float %0)", "ret float %r"]
    if name in LIBM2:
        return [f"%r = call float @{LIBM2[name]}(float %0, float %1)", "ret float %r"]
    if name == "rsqrt":
        return ["%s = call float @sqrtf(float %0)", "%r = fdiv float 1.0, %s", "ret float %r"]
    if name == "fma":
        return ["%r = call float @llvm.fma.f32(float %0, float %1, float %2)", "ret float %r"]
    raise MetalCompileError(f"air.{m[0]}")


FUNCTIONS: list[tuple[str, Callable[[re.Match[str], Sequence[str]], Lines]]] = [
    (rf"(simd|quad)_({'|'.join(REDUCTIONS)})\.(?:([su])\.)?(\w+)", _reduce),
    (r"simd_prefix_(inclusive|exclusive)_(sum|product)\.(?:([su])\.)?(f32|i32)", _scan),
    (rf"(simd|quad)_({'|'.join(SHUFFLES)}|broadcast)\.(?:[su]\.)?(\w+)", _shuffle),
    (r"(wg|simdgroup)\.barrier", _barrier),
    (r"simd_(any|all)", _vote),
    (r"simdgroup_matrix_8x8_multiply_accumulate\.v64(\w+)\.v64(\w+)\.v64(\w+)\.v64(\w+)", _multiply),
    (r"simdgroup_matrix_8x8_init_filled\.v64(\w+)\.\w+", _fill),
    (r"simdgroup_matrix_8x8_(load|store)\.v64(\w+)\.p\d\w+", _matrix_memory),
    (r"convert\.([fsu])\.([a-z]+\d+)\.([fsu])\.(\w+)", _convert),
    (r"(min|max)\.([su])\.(i\d+)", _integer_bound),
    (r"is_uniform.*", lambda m, a: ["ret i1 1"]),
    (
        r"normalize_function_constant_predicate\.i8",
        lambda m, a: ["%c = icmp ne i8 %0, 0", "%r = zext i1 %c to i8", "ret i8 %r"],
    ),
    (r"get_simdgroup_size\.i16", lambda m, a: ["ret i16 32"]),
    (r"get_thread_index_in_simdgroup\.i16", lambda m, a: [*_lane(), "%r = trunc i32 %l32 to i16", "ret i16 %r"]),
    (r"(?:fast_)?(\w+)\.f32", _math),
]


def air_function(name: str, result: str, arguments: Sequence[str]) -> str:
    """The definition of one air.* function, given its result and argument types."""
    for pattern, lines in FUNCTIONS:
        found = re.fullmatch(pattern, name.removeprefix("air."))
        if found is not None:
            head = ", ".join(f"{t} %{i}" for i, t in enumerate(arguments))
            body = "\n".join(f"  {line}" for line in lines(found, arguments))
            return f"define internal {result} @{name}({head}) alwaysinline {{\n{body}\n}}\n"
    raise MetalCompileError(f"no definition of {name}")
