"""The errors of this package."""

from __future__ import annotations

from ring_mlx.errors import RingError


class DistributedError(RingError):
    """Processes that cannot work together: no group, a model that cannot be cut so, a rank that differs or is gone."""

    origin = "distributed"


class LostError(DistributedError):
    """A rank is gone while the others work; the command ends with the exit code for that."""
