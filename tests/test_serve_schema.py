"""Requests that schemathesis makes from what the server documents: right ones and wrong ones."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from ring_mlx import demo_model_path
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.server import Server
from tests.fuzz.profile import TIMES
from tests.serve_openapi import DOCUMENT

schemathesis = pytest.importorskip("schemathesis")
schema = schemathesis.openapi.from_dict(DOCUMENT)
schema.config.phases.coverage.enabled = TIMES > 1  # hundreds of requests, one for each bound of each field


@pytest.fixture(scope="module")
def address():
    server = Server(Settings(demo_model_path(), "toy", store=False, max_tokens=3, read_ahead=False), port=0)
    server.start()
    server.engine.wait_until_loaded(30)
    yield f"http://127.0.0.1:{server.server_port}"
    assert server.close()


@schema.parametrize()
@settings(
    max_examples=12 * TIMES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
def test_what_is_documented_is_what_happens(case, address):
    case.call_and_validate(base_url=address, timeout=60)
