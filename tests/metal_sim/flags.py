"""Flags of clang: what makes it a compiler of Metal, and what each mode adds; toolchain.py names the processor."""

from shlex import split

BASE = split(
    "-std=c++17 -Xclang -cl-single-precision-constant -Xclang -ffloat16-excess-precision=none"
    " -Xclang -fbfloat16-excess-precision=none -ffp-contract=on -fno-math-errno -fno-exceptions -fPIC"
    " -Wno-unknown-attributes -Wno-unknown-pragmas -Wno-c++11-narrowing -Wno-unused -Wno-vla-extension"
    " -Wno-pass-failed -Wno-duplicate-decl-specifier -Wno-undefined-inline -Wno-psabi -Wimplicit-float-conversion"
)
# Unrolled tiles take seconds to compile.
ROLLED = split("-fno-vectorize -fno-slp-vectorize -mllvm -unroll-threshold=0 -mllvm -unroll-full-max-count=0")
MODES = {
    "strict": split("-DMSL_STRICT"),
    "fast": split("-O1 -DMSL_ERASE -fsanitize=integer-divide-by-zero") + ROLLED,
    "check": split(
        "-O1 -DMSL_ERASE -gline-tables-only -fno-vectorize -fno-slp-vectorize -ftrivial-auto-var-init=pattern"
        " -fsanitize=thread -mllvm -tsan-instrument-func-entry-exit=0"
        " -fsanitize=bounds,alignment,integer-divide-by-zero,shift-exponent,float-cast-overflow"
        " -fsanitize=local-bounds -fno-sanitize-trap=local-bounds"
        " -mllvm -tsan-compound-read-before-write=1"  # x += 1 reads as well
        " -mllvm -disable-vector-combine"  # which reads a vector's elements one by one
        " -mllvm -fast-isel -mllvm -regalloc=fast -mllvm -optimize-regalloc=false"  # compiling takes longer than running
        " -mllvm -experimental-debug-variable-locations=0"  # messages name lines, no variables
    )
    + ROLLED,
}
# Private arrays behind pointers: before this version clang could only end the process there.
LOCAL_BOUNDS_VERSION = 20
OLD_CHECK = split("-fno-sanitize=local-bounds")

RUNTIME = split("-std=c++17 -O2 -fPIC -fno-exceptions -fno-rtti")
CUDA_HOST = (
    split(
        "-std=c++17 -O1 -fno-math-errno -fno-exceptions -fPIC -ffp-contract=on -Wno-unknown-pragmas"
        " -Wno-return-type-c-linkage"
    )
    + ROLLED
)
