"""Integer codes and the words that hold them."""

from __future__ import annotations

import mlx.core as mx


def unpack(words: mx.array, bits: int) -> mx.array:
    """Codes [n, m * (32 // bits)] uint32 of words [n, m] that each hold whole codes, lowest bits first."""
    shifts = (mx.arange(32 // bits) * bits).astype(mx.uint32)
    return ((_unsigned(words)[..., None] >> shifts) & ((1 << bits) - 1)).reshape(words.shape[0], -1)


def unpack_stream(words: mx.array, bits: int) -> mx.array:
    """Codes [n, m * 32 // bits] uint32 of words [n, m] that are one stream of bits, lowest first, as `pack` writes it."""
    n, m = words.shape
    groups = mx.pad(_unsigned(words), [(0, 0), (0, -m % bits)]).reshape(n, -1, bits)
    codes = []
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = groups[..., word] >> shift
        if shift + bits > 32:
            code = code | (groups[..., word + 1] << (32 - shift))
        codes.append(code & ((1 << bits) - 1))
    return mx.stack(codes, axis=-1).reshape(n, -1)[:, : m * 32 // bits]


def _unsigned(words: mx.array) -> mx.array:
    return words.view(mx.uint32) if words.dtype == mx.int32 else words


def pack(codes: mx.array, bits: int) -> mx.array:
    """MLX's packing of codes [n, cols] to words [n, cols * bits / 32]: one stream of bits, lowest first."""
    groups = codes.astype(mx.uint32).reshape(codes.shape[0], -1, 32)
    words = [mx.zeros(groups.shape[:2], mx.uint32)] * bits
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | (groups[..., i] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (groups[..., i] >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(codes.shape[0], -1)
