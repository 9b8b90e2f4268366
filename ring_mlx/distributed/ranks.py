"""The ranks that share a model, and how a rank goes on when another is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


class Ranks:
    """This process's place among all.

    Args:
        group: The ranks.
    """

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group: mx.distributed.Group | None = group
        self.rank, self.size = group.rank(), group.size()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Without the other ranks, which need not do the same."""
        group, self._group = self._group, None
        try:
            yield
        finally:
            self._group = group
