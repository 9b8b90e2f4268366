"""Benchmarks only what is right: ``python -m benchmarks.report [--tests PATH ...] -- --random mini -p 512,2048``.

Runs the tests first, then ``ring-mlx bench`` with what follows ``--``; where a test fails, nothing is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from ring_mlx.cli import main as ring_mlx

TESTS = ("tests/test_goldens.py", "tests/test_pitfalls.py", "tests/test_model.py")
RED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: the benchmark's, or 1 where a test fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", nargs="+", default=TESTS, help=f"what pytest runs ({' '.join(TESTS)})")
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:at])
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *args.tests], check=False).returncode
    if code:
        print(f"report: [bench] the tests are red (pytest exit code {code}), so nothing is measured; mend them first.")
        return RED
    return ring_mlx(["bench", *given[at + 1 :]])


if __name__ == "__main__":
    sys.exit(main())
