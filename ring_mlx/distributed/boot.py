"""Turns into a rank: ``python -P -m ring_mlx.distributed.boot``, with all that it needs as JSON on standard input.

No shell interprets any of it.
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
    """Become the command, with its folder, variables and files; returns only if that fails."""
    with open(0, "rb", buffering=0, closefd=False) as told:
        line = told.readline()  # byte by byte: what follows is for the command
    if not line.endswith(b"\n"):
        return LOST
    given = json.loads(line)
    for stream in (1, 2) if given["mark"] else ():
        os.write(stream, given["mark"].encode())  # what a shell has said before is no output of the command
    with suppress(OSError):
        os.chdir(given["cwd"])
    files = {}
    for name, text in given["files"].items():
        handle, files[name] = tempfile.mkstemp(prefix="ring-mlx-", dir=given["scratch"])
        with open(handle, "w", encoding="utf-8") as f:
            f.write(text)
    os.environ.update(given["env"] | files | {VARIABLE: os.pathsep.join(files.values())})
    python = given["python"]
    try:
        os.execvp(python, [python, "-P", "-m", "ring_mlx", *given["command"]])
    except (OSError, ValueError) as e:
        print(f"ring-mlx: [distributed] {python} could not be run ({e}); name another --python.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
