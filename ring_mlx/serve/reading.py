"""One request before its first token: its prompt is read a step at a time, from the deepest snapshot on."""

from __future__ import annotations

from ring_mlx.engine.branches import branch_points
from ring_mlx.engine.events import PrefillProgress
from ring_mlx.engine.reading import Reader
from ring_mlx.model.cache import HybridCache
from ring_mlx.serve.job import Job


class Reading:
    """A prompt that is being read, all but its last token: with that one the request joins the batch.

    Args:
        job: The request.
        reader: A reader of its own, whose snapshots all requests share.
    """

    def __init__(self, job: Job, reader: Reader) -> None:
        self.job, self._reader = job, reader
        self._ids = job.prompt.ids[:-1]
        self.cached = reader.start(self._ids)
        self._known = self.cached
        points: dict[int, str] = {}
        if job.renderer is not None and self._known < len(self._ids):
            assert isinstance(job.asked.prompt, list)
            points = branch_points(job.renderer, job.asked.prompt, job.prompt, self._known)  # type: ignore[arg-type]
            points = {min(at, len(self._ids)): kind for at, kind in points.items()}
        self._steps = reader.read(self._ids, points, job.cancelled.is_set)
        self._tell()

    @property
    def done(self) -> bool:
        """Whether the request can join."""
        return self._known == len(self._ids)

    @property
    def cache(self) -> HybridCache:
        """What the model knows of the prompt; whoever takes it owns it."""
        return self._reader.live.cache

    def step(self) -> int:
        """Read a step; returns how many tokens it had."""
        before = self._known
        self._known = next(self._steps, before)
        self._tell()
        return self._known - before

    def settle(self) -> None:
        """Let the snapshots go that only this prompt needed, within their budget."""
        self._reader.settle()

    def _tell(self) -> None:
        self.job.events.put(PrefillProgress(self._known, len(self._ids), self.cached, None))
