"""Brings the live cache to the end of a prompt; reads only what no snapshot covers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from ring_mlx.engine.snapshots import BLOCK_TOKENS, Live, Snapshot, SnapshotTree, Store, common_prefix
from ring_mlx.engine.snapshots.blocks import softmax_layers
from ring_mlx.engine.snapshots.live import of_form
from ring_mlx.engine.snapshots.tree import PLACE
from ring_mlx.errors import CacheFileError
from ring_mlx.generation.decoding import prefill, prefill_step_or_default
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.kv_quantization import KVQuantization
from ring_mlx.model.model import Model


class PromptReader:
    """The live cache with its snapshots in memory (``tree``) and on disk (``store``).

    A step has at most ``step_tokens``, by default `prefill_step_or_default`; a snapshot is taken at each multiple of
    ``every_tokens``.
    """

    def __init__(
        self,
        model: Model,
        tree: SnapshotTree,
        store: Store | None = None,
        *,
        step_tokens: int | None = None,
        every_tokens: int = 4096,
        kv_quantization: KVQuantization | None = None,
    ) -> None:
        self._model, self.tree, self.store = model, tree, store
        self._step_tokens, self._every_tokens = prefill_step_or_default(step_tokens), every_tokens
        self.kv_quantization = kv_quantization
        self.live = Live(partial(_empty_cache, model, kv_quantization))
        self.logits: mx.array | None = None
        self.read_tokens, self.tps = 0, 0.0

    def start(self, ids: Sequence[int]) -> int:
        """Go to the deepest snapshot of a prompt, in memory or on disk; returns its number of tokens."""
        found = self.tree.deepest(ids)
        if self.store is not None:
            on_disk = self.store.deepest(ids, found.offset if found else 0)
            found = self.tree.add(on_disk, self) if on_disk else found
            if found is not None and found.saved:
                self.store.note_use(found)
        self.live.restore(found)
        if found is not None:
            *before, last = self.tree.path(found.tokens)[-2:] or [found]
            is_spare = last.kind == "prompt" and before and before[0].kind == "answer"
            self.tree.hold(self, before[0] if is_spare else last)
        self.logits = found.logits if found else None
        return len(self.live.tokens)

    def read(
        self,
        ids: Sequence[int],
        points: Mapping[int, str],
        stopped: Callable[[], bool],
        step_tokens: int | None = None,
        look: Callable[[mx.array], None] | None = None,
    ) -> Iterator[int]:
        """Read the rest of a prompt after `start`, taking snapshots; leaving early leaves a usable cache.

        When ``stopped`` turns true the present step is finished, and a snapshot keeps the tokens read so far.

        Args:
            ids: The whole prompt.
            points: Where snapshots are wanted, and why; one is taken at the end whatever it says.
            stopped: Called between steps.
            step_tokens: Instead of the usual.
            look: Given the logits of all positions of each step [n, vocab] float32.

        Yields:
            Tokens of the prompt that are known, after each step.
        """
        tokens, begin = np.asarray(ids, dtype=np.int32), len(self.live.tokens)
        ends = self._ends(begin, len(ids), points, step_tokens or self._step_tokens)
        sizes = np.diff([begin, *ends]).tolist()
        every = look is not None
        steps = prefill(
            mx.array(tokens[begin:]), self._model, self.live.cache, sizes, self.kv_quantization, every_position=every
        )
        for done, logits in steps:
            if look is not None:
                look(logits[0])
                logits = logits[:, -1]
            self.read_tokens += begin + done - len(self.live.tokens)
            self.live.advance(tokens[: begin + done])
            at_end = begin + done == len(ids)
            self.logits = logits if at_end else None
            halted = not at_end and stopped()
            if at_end or halted or begin + done in points or (begin + done) % self._every_tokens == 0:
                self._keep(points.get(begin + done, "prompt" if at_end else "stopped" if halted else "long"))
            yield begin + done
            if halted:
                return

    def forget(self) -> None:
        """Drop the live cache; snapshots are values and stay."""
        self.live.restore(None)

    def settle(
        self, ids: Sequence[int] | None = None, generated: Snapshot | None = None, is_open: bool = False
    ) -> None:
        """End the prompt that was read.

        Args:
            ids: What the conversation's next prompt starts with; None where that is not known.
            generated: What was known after the answer.
            is_open: Whether that answer may still be continued.
        """
        if generated is not None:
            goes_on = ids is not None and common_prefix(generated.tokens, np.asarray(ids)) == generated.offset
            rank = PLACE if is_open or ids is None else None
            self.tree.add(generated, self if goes_on else None, rank)
        held = self.tree.held(self)
        self.tree.settle(ids if ids is not None else held.tokens if held is not None else [], self)

    def adopt(self, cache: HybridCache, ids: Sequence[int]) -> None:
        """Go on from a cache that holds these tokens, instead of `start`."""
        self.live.cache, self.logits = cache, None
        self.live.advance(np.asarray(ids, dtype=np.int32))

    def tell_if_short(self) -> None:
        """Say once that the memory budget does not hold two snapshots of the latest conversation, and which would."""
        tree, s = self.tree, self.tree.latest
        if s is None or tree.told_short or not 0 < tree.budget_bytes < s.nbytes + s.own_bytes:
            return
        tree.told_short = True
        kv_bytes = sum(part.nbytes for part in s.parts)
        longest = self._model.config.context_tokens + BLOCK_TOKENS
        enough = 2 * (s.nbytes - kv_bytes) + longest * -(-kv_bytes // s.offset)
        warnings.warn(
            f"[cache] {tree.budget_bytes:,} bytes of memory do not hold two snapshots of this conversation, so what is "
            f"edited or answered again is read again; give {enough} (--cache-memory, memory_budget_bytes) to hold them at "
            "any length.",
            stacklevel=2,
        )

    def _keep(self, kind: str) -> None:
        """Keep what the live cache knows now, to go on from unless that is the place of the answer just before."""
        if not self.tree.budget_bytes:
            return
        held = self.tree.held(self)
        goes_on = kind != "prompt" or held is None or held.kind != "answer"
        self.tree.add(self.live.snapshot(kind, self.logits, durable=kind != "prompt"), self if goes_on else None)

    def save(self) -> int:
        """Write to disk what is worth it and not there; returns how many snapshots."""
        if self.store is None:
            return 0
        return self.store.save([s for s in self.tree if s.durable and not s.saved])

    def try_to_save(self) -> CacheFileError | None:
        """As `save`, but gives back a failure, and after it saves no more: reading does not depend on the disk."""
        try:
            self.save()
        except CacheFileError as e:
            self.leave_disk()
            return e
        return None

    def leave_disk(self) -> None:
        """Read and write no snapshots on disk from now on, also of what is dropped from memory."""
        self.store = self.tree.save_first = None

    def _ends(self, begin: int, end: int, points: Mapping[int, str], step_tokens: int) -> list[int]:
        every = self._every_tokens
        forced = {*points, *range((begin // every + 1) * every, end, every), end}
        ends, at = [], begin
        for place in sorted(p for p in forced if begin < p <= end):
            while place - at > step_tokens:
                at += step_tokens
                ends.append(at)
            ends.append(place)
            at = place
        return ends


def _empty_cache(model: Model, kv: KVQuantization | None) -> HybridCache:
    """A cache that is quantized from the first token, if wanted, so that steps of any size give the same result."""
    cache = model.make_cache()
    if kv is None or kv.start > 0:
        return cache
    return of_form(cache, ((kv.bits, kv.group_size),) * len(softmax_layers(cache)))
