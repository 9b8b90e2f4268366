"""The one way that tests compare arrays: exact shape and dtype, finite, relative RMS."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt


def to_numpy(x: mx.array | npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Any float array as float64."""
    return np.asarray(x.astype(mx.float32) if isinstance(x, mx.array) else x, dtype=np.float64)


def relative_rms(actual: mx.array, expected: mx.array | npt.NDArray[np.generic]) -> float:
    """sqrt(mean (a - e)^2 / mean e^2)."""
    a, e = to_numpy(actual), to_numpy(expected)
    return float(np.sqrt(np.mean((a - e) ** 2) / max(np.mean(e**2), 1e-300)))


def assert_close(
    actual: mx.array,
    expected: mx.array | npt.NDArray[np.generic],
    tolerance: float = 1e-5,
    dtype: mx.Dtype = mx.float32,
) -> None:
    """Same shape, the given dtype, nothing that is not finite, and relative RMS within the tolerance."""
    assert tuple(actual.shape) == tuple(expected.shape)
    assert actual.dtype == dtype
    assert np.isfinite(to_numpy(actual)).all()
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"relative RMS {error:.3g} exceeds {tolerance:.3g}"
