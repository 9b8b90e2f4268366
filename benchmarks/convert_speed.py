"""Time and memory of conversions beside mlx_lm.convert's from the same source: ``python -m benchmarks.convert_speed``.

The source has random bfloat16 weights at mini's shapes (`benchmarks.convert_memory`) and the toy's tokenizer. Each conversion is a
process of its own, in alternation: CPU seconds (user and system, with the start of Python), wall time, peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common import alternate, arguments, report
from benchmarks.convert_memory import write_source
from ring_mlx import demo_model_path

CHILD = """
import json, resource, runpy, sys, time
started, sys.argv = time.perf_counter(), sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as e:
    assert not e.code, e.code
wall_s, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
from benchmarks.common import resident_peak_bytes
print()
print(json.dumps([used.ru_utime + used.ru_stime, wall_s, resident_peak_bytes()]))
"""
OURS = ["ring_mlx", "convert", "--quiet", "--check-decay", "never"]
WAYS = {
    "mlx_lm.convert -q": ["mlx_lm", "convert", "-q"],
    "ours, --q-fit rtn": [*OURS, "-q", "--q-fit", "rtn"],
    "ours, -q (--q-fit fast)": [*OURS, "-q"],
    "ours, --q-fit best": [*OURS, "-q", "--q-fit", "best"],
    "ours, copied": OURS,
}


def converted(command: list[str], source: Path, target: Path) -> list[float]:
    """CPU seconds, wall seconds and peak bytes of one conversion."""
    shutil.rmtree(target, ignore_errors=True)
    named = [*command, "--hf-path", str(source), "--mlx-path", str(target)]
    result = subprocess.run([sys.executable, "-c", CHILD, *named], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(named)} failed:\n{result.stderr}")
    found: list[float] = json.loads(result.stdout.splitlines()[-1])
    return found


def rows(args: argparse.Namespace, source: Path, target: Path) -> Iterator[dict[str, Any]]:
    """One for each way, each number a list of all repeats; CPU seconds also over mlx-lm's."""
    extra = ["--q-bits", str(args.bits)]
    ways = {name: [*way, *(extra if "-q" in way else [])] for name, way in WAYS.items()}
    found = alternate({n: partial(converted, way, source, target) for n, way in ways.items()}, args.repeats)
    base = [cpu for cpu, _, _ in found["mlx_lm.convert -q"]]
    for name, runs in found.items():
        cpu, wall, peak = (list(column) for column in zip(*runs, strict=True))
        over = [a / b for a, b in zip(cpu, base, strict=True)]
        yield {"conversion": name, "CPU s": cpu, "over mlx-lm's": over, "wall s": wall, "MB": [p / 1e6 for p in peak]}


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--layers", type=int, default=2, help="layer 0 is dense (2)")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=6656)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--dir", help="where to work, by default a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        source = Path(scratch) / "source"
        weights = write_source(source, args.layers, args.experts, args.vocab) // 2
        for file in demo_model_path().glob("*token*"):
            shutil.copy(file, source)
        about = f"{weights / 1e6:.0f}M weights", f"{args.bits} bits", f"mlx-lm {version('mlx-lm')}"
        report(args, rows(args, source, Path(scratch) / "out"), *about)


if __name__ == "__main__":
    main()
