"""Starts a rank on a host that ssh reached: ``python -P -m ring_mlx.distributed.boot``.

Its first line of standard input says all in JSON, so that no shell there reads any of it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress

from ring_mlx.distributed.failure import LOST
from ring_mlx.distributed.heartbeat import VARIABLE


def main() -> int:
    """Turn into the command, with its folder, variables and files; returns only where that fails."""
    with open(0, "rb", buffering=0, closefd=False) as told:
        line = told.readline()  # byte by byte: what follows is for the command
    if not line.endswith(b"\n"):
        return LOST
    given = json.loads(line)
    for stream in (1, 2):
        os.write(stream, given["mark"].encode() + b"\n")  # what a shell has said before is no output of the command
    with suppress(OSError):
        os.chdir(given["cwd"])
    os.environ.update(given["env"])
    files = {}
    for name, text in given["files"].items():
        handle, files[name] = tempfile.mkstemp(prefix="ring-mlx-")
        with open(handle, "w", encoding="utf-8") as f:
            f.write(text)
    os.environ.update(files | {VARIABLE: os.pathsep.join(files.values())})
    try:
        os.execvp(given["python"], [given["python"], "-P", "-m", "ring_mlx", *given["command"]])
    except (OSError, ValueError) as e:
        print(
            f"ring-mlx: [distributed] {given['python']} could not be run ({e}); name another --python.", file=sys.stderr
        )
    return 2


if __name__ == "__main__":
    sys.exit(main())
