"""Fixtures of the fuzz tests."""

from __future__ import annotations

import sys

import pytest

from tests.fuzz.server import Forks


@pytest.fixture(scope="session")
def forks():
    """The process that forks for each example."""
    if sys.platform == "darwin":
        pytest.skip("Metal does not survive a fork")
    made = Forks()
    yield made
    made.close()
