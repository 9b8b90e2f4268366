"""What all connections of a server share."""

from __future__ import annotations

from typing import Protocol

from ring_mlx.engine.metrics import Metrics
from ring_mlx.serve.calls import Calls
from ring_mlx.serve.hosts import Hosts
from ring_mlx.serve.large import LargeTurns
from ring_mlx.serve.left_out import Log
from ring_mlx.serve.models import Models
from ring_mlx.serve.request_log import RequestLog
from ring_mlx.serve.responses.stored import Stored
from ring_mlx.serve.slots import Slots


class Shared(Protocol):
    """`ring_mlx.serve.server.Server` describes each."""

    models: Models
    metrics: Metrics
    hosts: Hosts
    slots: Slots
    stored: Stored
    calls: Calls
    left_out: Log
    large: LargeTurns
    api_key: bytes | None
    max_body_bytes: int
    strict: bool
    log_requests: bool
    request_log: RequestLog | None
    created: int
