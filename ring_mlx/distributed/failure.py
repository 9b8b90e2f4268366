"""The one error of this package; knows no cause."""

from __future__ import annotations

from ring_mlx.errors import RingError


class DistributedError(RingError):
    """Processes that cannot work together: no group, a model that cannot be cut so, a rank that differs or is gone."""

    origin = "distributed"
