"""Counters of what a scheduler does, and their text form for Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from copy import copy

from ring_mlx.engine.events import Counters

PREFIX = "ring_mlx_"
HELP = {
    "http_requests_total": "HTTP answers by route and status",
    "requests_finished_total": "Generations by how they ended",
    "prompt_tokens_total": "Tokens of all prompts that were answered or begun",
    "cached_tokens_total": "Of these, known from snapshots",
    "model_loads_total": "Models loaded, by name",
    "read_tokens_total": "Prompt tokens run through the model, those read ahead included",
    "ahead_tokens_total": "Of these, read while nobody waited",
    "generated_tokens_total": "Tokens generated",
    "drafted_tokens_total": "Tokens drafted from earlier text and read together with others",
    "accepted_tokens_total": "Of these, those that the model chose too",
    "queue_length": "Requests that wait for a place",
    "reading": "Requests whose prompt is being read",
    "batch_size": "Requests that generate",
    "paused": "Requests whose answer waits for memory",
    "models_loaded": "Models in memory",
    "snapshots": "Snapshots in memory",
    "snapshot_bytes": "Bytes that they take",
    "batch_bytes": "Bytes of the caches of requests that generate",
    "time_to_first_token_seconds": "From a request's arrival to its first token, waiting included",
    "queue_seconds": "From a request's arrival to the begin of work on it",
    "request_seconds": "From a request's arrival to its last token",
}
TOKENS = [name for name in HELP if name.endswith("tokens_total")]
BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters and histograms that any thread may change, and gauges, which the model's thread replaces as a whole."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counter({(name, ""): 0 for name in TOKENS})
        self._buckets: dict[str, list[int]] = {}
        self._sums: Counter[str] = Counter()
        self.gauges: Mapping[str, float] = {}

    def of_one_model(self) -> Metrics:
        """The same counters and histograms with gauges of their own: of several models, each thread has its own."""
        own = copy(self)
        own.gauges = {}
        return own

    def count(self, name: str, by: int = 1, **labels: str) -> None:
        text = ",".join(f'{k}="{_escape(v)}"' for k, v in labels.items())
        with self._lock:
            self._counts[name, text] += by

    def observe(self, name: str, value: float) -> None:
        with self._lock:
            buckets = self._buckets.setdefault(name, [0] * (len(BOUNDS_S) + 1))
            buckets[next((i for i, bound in enumerate(BOUNDS_S) if value <= bound), len(BOUNDS_S))] += 1
            self._sums[name] += value  # type: ignore[assignment]

    def counters(self) -> Counters:
        read, ahead, reused, generated = (
            self._counts[f"{name}_tokens_total", ""] for name in ("read", "ahead", "cached", "generated")
        )
        snapshots, nbytes = (int(self.gauges.get(name, 0)) for name in ("snapshots", "snapshot_bytes"))
        return Counters(read, ahead, reused, generated, snapshots, nbytes)

    def text(self, gauges: Mapping[str, float]) -> str:
        """All metrics, with present gauges."""
        lines: list[str] = []
        with self._lock:
            for name in sorted({name for name, _ in self._counts}):
                lines += _head(name, "counter")
                found = sorted((labels, n) for (other, labels), n in self._counts.items() if other == name)
                lines += [f"{PREFIX}{name}{{{labels}}} {n}" if labels else f"{PREFIX}{name} {n}" for labels, n in found]
            for name, buckets in sorted(self._buckets.items()):
                lines += _head(name, "histogram")
                total = 0
                for bound, n in zip((*map(str, BOUNDS_S), "+Inf"), buckets, strict=True):
                    total += n
                    lines.append(f'{PREFIX}{name}_bucket{{le="{bound}"}} {total}')
                lines += [f"{PREFIX}{name}_sum {self._sums[name]:.6f}", f"{PREFIX}{name}_count {total}"]
        for name, value in gauges.items():
            number = f"{value:g}" if value % 1 else f"{int(value)}"
            lines += [*_head(name, "gauge"), f"{PREFIX}{name} {number}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {HELP[name]}", f"# TYPE {PREFIX}{name} {kind}"]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
