"""Fixtures of the fuzz tests."""

from __future__ import annotations

import pytest

from tests.fuzz.server import Forks


@pytest.fixture(scope="session")
def forks():
    """The process that forks for each example."""
    made = Forks()
    yield made
    made.close()
