"""Keeps a model's memory resident on Metal while it computes, and gives it back to macOS when it is idle."""

from __future__ import annotations

import threading

import mlx.core as mx

from ring_mlx.system import macos

OLDEST_MACOS = (15,)  # the first with Metal's residency sets, by which MLX wires memory

_lock = threading.Lock()
_holders, _before = 0, 0


class Wired:
    """Memory stays resident from `hold` to `release`, or within the context; does nothing where there is no Metal.

    Of several at once, the first raises MLX's wired limit to Metal's recommended working set, and the last puts it back.
    """

    def __init__(self) -> None:
        self._stream: mx.Stream | None = None

    def hold(self) -> None:
        """Wire; a second call changes nothing."""
        global _holders, _before
        if self._stream is not None or (most := _most_bytes()) is None:
            return
        with _lock:
            if _holders == 0:
                try:
                    _before = mx.set_wired_limit(most)
                except (ValueError, RuntimeError):  # the system's limit is lower now; answers only get slower
                    return
            _holders += 1
        self._stream = mx.default_stream(mx.default_device())

    def release(self) -> None:
        """Give back; a second call changes nothing."""
        global _holders
        stream, self._stream = self._stream, None
        if stream is None:
            return
        try:
            mx.synchronize(stream)  # the limit must not change under a computation
        finally:
            with _lock:
                _holders -= 1
                if _holders == 0:
                    mx.set_wired_limit(_before)

    def __enter__(self) -> None:
        self.hold()

    def __exit__(self, *_: object) -> None:
        self.release()


def _most_bytes() -> int | None:
    if not mx.metal.is_available() or macos.release() < OLDEST_MACOS:
        return None
    most = mx.device_info().get("max_recommended_working_set_size")
    return None if most is None else int(most)
