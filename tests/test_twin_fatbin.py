"""Compressed machine code unpacks to what it was, and its headers are those that CUDA's own tool writes."""

from __future__ import annotations

import random
import struct

import pytest

from metal_kernels.twin.fatbin import fatbin, lz4_block


def unpacked(block):
    """An LZ4 block, read by the letter of its description."""
    out, i = bytearray(), 0

    def length(nibble):
        nonlocal i
        total = nibble
        while nibble == 15:
            more = block[i]
            i, total = i + 1, total + more
            if more != 255:
                break
        return total

    while True:
        token = block[i]
        i += 1
        literals = length(token >> 4)
        out += block[i : i + literals]
        i += literals
        if i == len(block):
            return bytes(out)
        (distance,) = struct.unpack_from("<H", block, i)
        i += 2
        for _ in range(length(token & 15) + 4):
            out.append(out[-distance])


def machine_code(n):
    """Instructions of 16 bytes that resemble each other."""
    rng = random.Random(n)
    words = [rng.randbytes(12) for _ in range(9)]
    return b"".join(rng.choice(words) + rng.randbytes(4) for _ in range(n))


@pytest.mark.parametrize(
    "data", [b"", b"a", b"abcde", b"a" * 13, b"a" * 5000, bytes(range(256)) * 3, machine_code(1200)]
)
def test_a_block_unpacks_to_what_it_was(data):
    assert unpacked(lz4_block(data)) == data


@pytest.mark.parametrize("n", range(40))
def test_short_ends(n):
    for data in (bytes(range(n)), b"abcd" * n, random.Random(n).randbytes(n) * 2):
        block = lz4_block(data)
        assert unpacked(block) == data


def test_farther_than_a_match_reaches():
    data = b"0123456789abcdef" + random.Random(0).randbytes(70_000) + b"0123456789abcdef" + b"the end of it"
    assert unpacked(lz4_block(data)) == data


def test_code_becomes_less():
    code = machine_code(1200)
    assert len(lz4_block(code)) < 0.6 * len(code)


def test_headers():
    image = fatbin(b"x" * 27160, "sm_90")
    size = struct.unpack_from("<I", image, 32)[0]
    padded = -(-size // 8) * 8
    # As fatbinary of CUDA 13 writes a compressed image of 27,160 bytes for sm_90, but for the sizes.
    assert image[:8].hex() == "50ed55ba01001000"
    assert struct.unpack_from("<Q", image, 8) == (64 + padded,)
    assert image[16:24].hex() == "0200010140000000"
    assert struct.unpack_from("<Q", image, 24) == (padded,)
    assert image[36:72].hex() == "00000000080001005a0000000000000000000000112000000000000000000000" + "00000000"
    assert struct.unpack_from("<Q", image, 72) == (27160,)
    assert len(image) == 80 + padded
    assert unpacked(image[80 : 80 + size]) == b"x" * 27160
    assert struct.unpack_from("<I", fatbin(b"", "sm_100a"), 44) == (100,)
