"""Compiles CUDA source to a cubin with NVRTC, without a GPU and without the CUDA toolkit."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

SHIM = Path(__file__).parent / "cuda"
UNUSED = "--diag-suppress=177,550"  # a kernel need not name every template argument
OPTIONS = ("--device-as-default-execution-space", "--std=c++17", UNUSED)
LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")


class CudaCompileError(Exception):
    """The source does not compile; the message is NVRTC's."""


def _candidates() -> Iterator[str]:
    """MLX's CUDA wheel brings NVRTC in pip's nvidia packages; then the system."""
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or ()) if nvidia is not None else ():
        yield from sorted(map(str, Path(folder).glob("*/lib/libnvrtc.so.*")), reverse=True)
    yield from LIBRARIES
    found = ctypes.util.find_library("nvrtc")
    if found is not None:
        yield found


@functools.cache
def find_nvrtc() -> ctypes.CDLL | None:
    """The first NVRTC library that loads, or None."""
    for path in _candidates():
        try:
            _load_builtins(Path(path))
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def _load_builtins(library: Path) -> None:
    """Load what NVRTC asks for by name alone: some of its releases do not look for it beside themselves."""
    for path in sorted(library.parent.glob("libnvrtc-builtins.so.*")) if library.is_absolute() else ():
        ctypes.CDLL(str(path))


@functools.cache
def shim_headers() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(SHIM.glob("*.cuh"))}


def compile_cubin(source: str, name: str, architecture: str, options: Sequence[str] = ()) -> tuple[bytes, str]:
    """The cubin of a translation unit that may include the shim, and the compiler's log.

    Args:
        source: CUDA text.
        name: File name in messages, without its ending.
        architecture: Such as ``sm_90``.
        options: Further options of NVRTC.

    Raises:
        CudaCompileError: With the log.
        RuntimeError: If no NVRTC is found.
    """
    nvrtc = find_nvrtc()
    if nvrtc is None:
        raise RuntimeError("[metal_kernel] NVRTC was not found; install nvidia-cuda-nvrtc.")
    headers = shim_headers()
    program = ctypes.c_void_p()
    strings = ctypes.c_char_p * len(headers)
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        source.encode(),
        f"{name}.cu".encode(),
        len(headers),
        strings(*headers.values()),
        strings(*(key.encode() for key in headers)),
    )
    if status:
        raise RuntimeError(f"[metal_kernel] NVRTC could not be started (error {status}).")
    try:
        flags = [f"--gpu-architecture={architecture}", *OPTIONS, *options]
        encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        status = nvrtc.nvrtcCompileProgram(program, len(flags), encoded)
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if status:
            raise CudaCompileError(log)
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    n = ctypes.c_size_t()
    size(program, ctypes.byref(n))
    buffer = ctypes.create_string_buffer(n.value)
    get(program, buffer)
    return buffer.raw
