"""Converts SOURCE again and again, killed at random moments and resumed.

``python -m tests.kill_and_resume SOURCE SCRATCH KILLS SEED [OPTIONS]``; the last is JSON, options of `convert` beside these.

Each attempt is a process forked from this one, which has imported everything but computed nothing; half of them are
killed when a random time has passed, the others before a random write, rename or sync. Prints one JSON object: the
hashes of an uninterrupted conversion and of each killed and resumed one, and how many attempts died.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ring_mlx.convert import convert, shard_files, writer

OPTIONS = {"quantize": True, "bits": 4, "group_size": 32, "fit": "rtn", "shard_bytes": 100_000}


def run(work: Callable[[], object], kill_after_s: float | None = None) -> tuple[int, float]:
    """Do something in a child; the exit status (-9 if it was killed) and how long it took."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as e:  # noqa: BLE001 a child may not return into the parent's code
            print(repr(e), file=sys.stderr)
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), time.perf_counter() - started


def killed_before(step: int, work: Callable[[], object]) -> None:
    """Do something, and die before the step-th file operation of the writer."""
    left = [step]

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    shard_files.ShardFile.write = counted(shard_files.ShardFile.write)
    Path.mkdir = counted(Path.mkdir)
    for name in ("replace", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    work()
    print(step - left[0])


def main() -> None:
    """The command line: source, an empty folder, how many kills, a seed."""
    source, scratch, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rng, options = random.Random(seed), OPTIONS | json.loads(sys.argv[5] if len(sys.argv) > 5 else "{}")
    status, whole_s = run(lambda: convert(source, scratch / "whole", **options))
    assert status == 0
    hashes, died = [], 0
    for i in range(kills):
        target = scratch / str(i)

        def work(target: Path = target) -> object:
            return convert(source, target, resume=True, **options)

        if i % 2:
            code, _ = run(work, rng.uniform(0.02, whole_s))
        else:
            step = rng.randrange(1, 260)
            code, _ = run(lambda step=step, work=work: killed_before(step, work))
        died += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        if target.exists():
            writer.verify(target)
        status, _ = run(work)
        assert status == 0
        hashes.append(folder_hashes(target))
    print(json.dumps({"whole": folder_hashes(scratch / "whole"), "resumed": hashes, "died": died}))


def folder_hashes(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    return {p.name: writer.sha256(p) for p in sorted(folder.iterdir())}


if __name__ == "__main__":
    main()
