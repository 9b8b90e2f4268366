"""Keeps the processes of a distributed benchmark in step; a single process needs none of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Company:
    """The processes that share the model.

    Args:
        ranks: How many.
        mode: How they share it, which is settled when the model is made; empty where one is alone.
        greatest: The greatest of a number over all; returns once all have come as far.
        agree: Tokens of the first, on all; None where one is alone.
        together: Work that fails on all if it fails on one.
    """

    ranks: int = 1
    mode: Callable[[], str] = str
    greatest: Callable[[int], int] = int
    agree: Callable[[Any], Any] | None = None
    together: Callable[[], AbstractContextManager[Any]] = nullcontext

    def words(self) -> str:
        """For a model's name; nothing where one is alone."""
        return f", {self.mode()} over {self.ranks} processes" if self.ranks > 1 else ""


ALONE = Company()
