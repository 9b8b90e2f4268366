"""How long a conversion takes on this machine, from a sample of its own matrices."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.convert.encoding import CHUNK_WEIGHTS, encode
from ring_mlx.convert.fit import EFFORTS, dequantize
from ring_mlx.convert.plan import ROUTED, Output, Plan
from ring_mlx.convert.recipes import Setting
from ring_mlx.convert.sources import Source, as_matrix
from ring_mlx.model.memory import GB
from ring_mlx.system.progress import TimeLeft, duration

# Below this a conversion is over in about a second.
LEAST_WEIGHTS = 16 << 20
# A kind of less than this share of the weights is sampled with fewer of them.
LARGE_SHARE, SMALL_WEIGHTS = 0.05, CHUNK_WEIGHTS // 16
# Up to which relative error of the weights a model is what: 8, 6, 5, 4, 3 and 2 bits have about 0.6, 2, 4.5, 9, 20 and 45 %.
QUALITY = (
    (0.012, "hardly to be told from the source"),
    (0.032, "very close to the source"),
    (0.065, "close to the source"),
    (0.14, "usual for 4 bits: hard tasks lose some points"),
    (0.3, "usual for 3 bits: clearly worse, easy tasks still go well"),
    (math.inf, "too much for most models"),
)
# Of TimeLeft: bytes that are hashed and brought to the disk once a shard is written.
FINISHING = "finishing"


@dataclass(frozen=True)
class Sample:
    """What a second's work on this machine took.

    Attributes:
        read_rate: Bytes of the source a second, of what was not read before.
        seconds: A weight, by kind of matrix and by fit, with reading.
        finishing_s: A byte of the result.
        errors: What each fit changes in matrices of the largest kind that is fitted, root mean square over that of the weights; empty
            if none is.
    """

    read_rate: float
    seconds: dict[str, dict[str, float]]
    finishing_s: float
    errors: dict[str, float]

    def expected(self, fit: str) -> dict[str, float]:
        """Seconds a unit, for `TimeLeft` of `work`."""
        return {kind: times[fit] for kind, times in self.seconds.items()} | {FINISHING: self.finishing_s}

    def total_s(self, plan: Plan, fit: str) -> float:
        """Of a whole conversion."""
        expected = self.expected(fit)
        return sum(amount * expected[kind] for kind, amount in work(plan.outputs).items())


def kind_of(output: Output) -> str:
    """Matrices of one kind take as long for each of their weights."""
    form = "copied" if output.copied else output.setting or "float"
    return f"{type(output.matrix).__name__} {form}"


def work(outputs: Iterable[Output]) -> dict[str, float]:
    """Weights of each kind, and bytes to be finished."""
    found: Counter[str] = Counter()
    for output in outputs:
        found[kind_of(output)] += output.count
        found[FINISHING] += output.nbytes
    return dict(found)


def time_left(outputs: Sequence[Output], sample: Sample | None, fit: str) -> TimeLeft:
    """Of a conversion that has these outputs to write."""
    return TimeLeft(sample.expected(fit) if sample else None, **work(outputs))


def measure(source: Source, plan: Plan, fits: Sequence[str] = tuple(EFFORTS)) -> Sample | None:
    """Convert a few rows of each kind of matrix; None if that is no small part of all, or the source is not here."""
    total = sum(o.count for o in plan.outputs)
    if source.repo is not None or total < LEAST_WEIGHTS:
        return None
    largest: dict[str, Output] = {}
    for o in plan.outputs:
        # Experts before ends, which may be larger each, but are few.
        largest[kind_of(o)] = max(largest.get(kind_of(o), o), o, key=lambda o: (ROUTED in o.name, o.count))
    share = {kind: count / total for kind, count in work(plan.outputs).items()}
    seconds: dict[str, dict[str, float]] = {}
    errors: dict[str, float] = {}
    read_bytes, read_s, hashed_bytes, hashing_s = 0, 0.0, 0, 0.0
    with closing(TensorFiles()) as files:
        for kind, o in sorted(largest.items(), key=lambda item: share[item[0]]):
            rows, cols = as_matrix(o.shape)
            step = min(rows, max(1, (CHUNK_WEIGHTS if share[kind] >= LARGE_SHARE else SMALL_WEIGHTS) // cols))
            at = (rows - step) // 2, (rows - step) // 2 + step
            w, first_s = _read(o, files, *at)
            read_bytes, read_s = read_bytes + w.nbytes, read_s + first_s
            late_s = max(0.0, first_s - _read(o, files, *at)[1])
            is_fitted = o.setting is not None and not o.copied and o.setting.mode == "affine"
            packed: dict[str, mx.array] = {}
            for fit in fits if is_fitted else fits[:1]:
                encode(o, files, *at, fit)  # kernels are compiled and proven once
                started = time.perf_counter()
                packed, _ = encode(o, files, *at, fit)
                took_s = time.perf_counter() - started + late_s
                seconds.setdefault(kind, dict.fromkeys(fits, 0.0))[fit] = took_s / w.size
                if is_fitted and o.setting is not None:
                    errors[fit] = _error(packed, o.setting, w)
            if not is_fitted:
                seconds[kind] = dict.fromkeys(fits, seconds[kind][fits[0]])
            started = time.perf_counter()
            for part in packed.values():
                plain: Any = mx.contiguous(part.view(mx.uint8))
                hashlib.sha256(memoryview(plain)).digest()
                hashed_bytes += part.nbytes
            hashing_s += time.perf_counter() - started
    return Sample(read_bytes / read_s, seconds, hashing_s / hashed_bytes, errors)


def told(sample: Sample, plan: Plan, fit: str) -> str:
    """How long it will take, and what each other fit would change."""
    whole_s = sample.total_s(plan, fit)
    lines = [f"time: about {duration(whole_s)} on this machine, which reads {sample.read_rate / GB:.2g} GB a second"]
    for other in sample.errors:
        if other != fit:
            more = sample.errors[other] / sample.errors[fit] if sample.errors[fit] else 1.0
            lines.append(f"--q-fit {other}: about {duration(sample.total_s(plan, other))}, error {more:.2f} times")
    return "; ".join(lines)


def quality(error: float, is_calibrated: bool = False) -> str:
    """How good the result will be, in words, from the relative error of its weights."""
    words = next(words for most, words in QUALITY if error <= most)
    more = "; calibrating leaves about half of the divergence that this gives" if is_calibrated else ""
    return f"quality: weights are off by {error:.1%} (root mean square of the sample), which is {words}{more}"


def _read(o: Output, files: TensorFiles, start: int, stop: int) -> tuple[mx.array, float]:
    started = time.perf_counter()
    w = o.matrix.read(files, start, stop)
    mx.eval(w)
    return w, time.perf_counter() - started


def _error(packed: dict[str, mx.array], setting: Setting, w: mx.array) -> float:
    exact = w.astype(mx.float32)
    return float(mx.linalg.norm(dequantize(packed, setting) - exact) / mx.maximum(mx.linalg.norm(exact), 1e-30))
