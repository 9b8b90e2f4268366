"""Machine code in the wrapping that CUDA's loader takes compressed.

MLX hashes a precompiled kernel's bytes at every launch, and copies them where a call is not compiled, so a third of the
bytes is worth having. The block is LZ4's (https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md); the headers are as
CUDA 13's fatbinary writes them.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from itertools import takewhile

MAGIC, VERSION, KIND_CUBIN, HEADER_BYTES = 0xBA55ED50, 1, 2, 64
FLAGS = 0x2011  # 64-bit code, made on Linux, compressed with LZ4
SHORTEST, FARTHEST = 4, 65535  # of a match
LAST_LITERALS, LAST_MATCH = 5, 12  # bytes before the end that are literals, and in which no match begins
CANDIDATES = 256


def fatbin(cubin: bytes, architecture: str) -> bytes:
    """The cubin of an architecture such as ``sm_90``, wrapped."""
    block = lz4_block(cubin)
    padded = block + bytes(-len(block) % 8)
    number = int("".join(takewhile(str.isdigit, architecture.removeprefix("sm_"))))
    entry = struct.pack(
        "<HHIQIIHHIQQQQ",
        KIND_CUBIN,
        0x101,
        HEADER_BYTES,
        len(padded),
        len(block),
        0,
        8,
        1,
        number,
        0,
        FLAGS,
        0,
        len(cubin),
    )
    body = entry + padded
    return struct.pack("<IHHQ", MAGIC, VERSION, 16, len(body)) + body


def lz4_block(data: bytes) -> bytes:
    """The bytes as one LZ4 block, each match the longest of the nearest places that begin alike."""
    out, seen = bytearray(), defaultdict[bytes, list[int]](list)
    start = at = 0
    while at < len(data) - LAST_MATCH:
        key = data[at : at + SHORTEST]
        length, distance = _longest(data, at, seen[key])
        end = at + max(length, 1)
        if length:
            _sequence(out, data[start:at], length, distance)
            start = end
        for place in range(at, min(end, len(data) - SHORTEST)):
            seen[data[place : place + SHORTEST]].append(place)
        at = end
    _sequence(out, data[start:], 0, 0)
    return bytes(out)


def _longest(data: bytes, at: int, places: list[int]) -> tuple[int, int]:
    best, distance, most = 0, 0, len(data) - LAST_LITERALS - at
    for place in reversed(places[-CANDIDATES:]):
        if at - place > FARTHEST:
            break
        n = SHORTEST
        while n < most and data[place + n] == data[at + n]:
            n += 1
        if n > best:
            best, distance = n, at - place
    return best, distance


def _sequence(out: bytearray, literals: bytes, length: int, distance: int) -> None:
    """Literals, and a match unless its length is 0."""
    matched = length - SHORTEST if length else 0
    out.append(min(len(literals), 15) << 4 | min(matched, 15))
    _extend(out, len(literals))
    out += literals
    if length:
        out += struct.pack("<H", distance)
        _extend(out, matched)


def _extend(out: bytearray, number: int) -> None:
    """What of a length the token's four bits do not hold."""
    if number >= 15:
        whole, rest = divmod(number - 15, 255)
        out += b"\xff" * whole + bytes([rest])
