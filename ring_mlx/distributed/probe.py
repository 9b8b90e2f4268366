"""Reports a host's versions and weights before a launch: ``python -m ring_mlx.distributed.probe``; loads no weights."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint.fingerprint import fingerprint
from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.loading import demo_model_path
from ring_mlx.checkpoint.shards import find_shards
from ring_mlx.distributed.hosts import versions
from ring_mlx.errors import RingError
from ring_mlx.model.config import read_config


def probe(model: str | None, revision: str | None = None) -> dict[str, Any]:
    """Host, versions, and the fingerprint of the model's files, or why there is none."""
    said: dict[str, Any] = {"host": socket.gethostname(), "versions": versions(), "weights": "", "error": None}
    try:
        folder = resolve_model(model or demo_model_path(), revision)
        config, _ = read_config(folder)
        # In one dtype everywhere: what the files hold is compared, not what each host would make of it.
        said["weights"] = fingerprint(config, find_shards(folder), mx.bfloat16, False)
    except RingError as e:
        said["error"] = str(e)
    return said


if __name__ == "__main__":
    # The question is JSON on standard input, so that no shell on the way reads a path.
    asked = json.load(sys.stdin)
    with suppress(OSError):
        os.chdir(asked["cwd"])
    print(json.dumps(probe(asked["model"], asked["revision"])))
