"""Calibrated quantization of a whole model: one layer of the source in memory, the text's activations beside it.

A stage is the embedding, a layer, or the norm and the head. Its shards are written before the next one begins, which gets the residual
stream that the written shards give: so a conversion that goes on after an interruption computes what it would have.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.checkpoint.weights import FLOAT32
from ring_mlx.convert.activations import HESSIAN_NUMBERS, SOLVED_WEIGHTS, LayerQuantizer, hessian
from ring_mlx.convert.calibration_time import kind_of, stage_seconds
from ring_mlx.convert.fit import dequantize
from ring_mlx.convert.plan import LAST_STAGE, Output, Plan, stage_of
from ring_mlx.convert.report import Batch, make_batches
from ring_mlx.convert.sources import Source
from ring_mlx.convert.streams import FloatStream
from ring_mlx.errors import ConvertError
from ring_mlx.model.memory import GB, budget_bytes
from ring_mlx.system.progress import TimeLeft, duration

TEXT = Path(__file__).parent / "calibration_text.jsonl"
# Of the text; what comes after them is left out, so that memory is bounded.
MOST_TOKENS = 32768
# Arrays of double precision that a Hessian is prepared in, and of weights while they are solved for.
PREPARED, SOLVING = 12, 12
# Copies of the residual stream that a layer needs, in float32.
STATES = 5


def digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


def memory_bytes(plan: Plan, tokens: int, dtype: mx.Dtype) -> int:
    """Of a calibrated conversion, at most: a layer in float, its largest stack again, what is solved for, activations."""
    stages: dict[int, int] = {}
    for o in plan.outputs:
        stages[stage_of(o.name)] = stages.get(stage_of(o.name), 0) + o.count * dtype.size + o.nbytes
    largest = max(o.count for o in plan.outputs) * dtype.size
    widest = max(o.shape[-1] for o in plan.outputs)
    solving = PREPARED * 8 * max(HESSIAN_NUMBERS, widest**2) + SOLVING * 4 * SOLVED_WEIGHTS
    hidden = next(o.shape[-1] for o in plan.outputs if "word_embeddings" in o.name)
    return max(stages.values()) + largest + solving + STATES * 4 * tokens * hidden


class Calibration:
    """Quantizes a plan's matrices stage by stage, for the activations of a text.

    Args:
        rows: From `report.read_text`.
        fit: As of `fit.quantize`.

    Raises:
        ConvertError: If this machine has too little memory.
        OptionError: If the text has no two tokens.
    """

    def __init__(self, source: Source, plan: Plan, rows: Sequence[Mapping[str, Any]], fit: str) -> None:
        dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
        batches = bounded(make_batches(source.folder, rows, "--calibrate"), MOST_TOKENS)
        self._tokens = [b.tokens for b in batches]
        self._lengths = [[end for _, end in b.spans] for b in batches]
        self.tokens = sum(map(sum, self._lengths))
        needed, given = memory_bytes(plan, self.tokens, dtype), budget_bytes()
        if needed > given:
            raise ConvertError(
                f"calibrating needs about {needed / GB:.1f} GB of memory, but this machine can give {given / GB:.1f} GB; "
                "leave --calibrate out, or convert on a larger machine."
            )
        self._source, self._fit, self._dtype, self._needed = source, fit, dtype, needed
        self._outputs: dict[int, list[Output]] = {}
        for o in plan.outputs:
            self._outputs.setdefault(stage_of(o.name), []).append(o)
        self._states: list[mx.array] = []
        self._seconds: dict[str, float] = {}
        self.unreached = 0

    def told(self) -> str:
        """How long it will take; a sample of some seconds is measured."""
        self._seconds = stage_seconds(
            [o for some in self._outputs.values() for o in some], self._source.config, self.tokens
        )
        whole = sum(self._seconds[kind_of(stage, some)] for stage, some in self._outputs.items())
        return (
            f"time: about {duration(whole)} on this machine to calibrate on {self.tokens:,} tokens, one layer in memory "
            f"(at most {self._needed / GB:.1f} GB)"
        )

    def time_left(self, stages: Iterable[int]) -> TimeLeft:
        """Of these stages."""
        return TimeLeft(self._seconds, **Counter(self.kind_of(stage) for stage in stages))

    def kind_of(self, stage: int) -> str:
        """Of `time_left`."""
        return kind_of(stage, self._outputs[stage])

    def begin(self, files: TensorFiles) -> None:
        """Read from these files of the source; what is read counts there as one use of each matrix."""
        self._stream = FloatStream(self._source, self._dtype, files)

    def solve(self, stage: int) -> dict[str, dict[str, mx.array]]:
        """The packed matrices of a stage, by path."""
        outputs = self._outputs[stage]
        layer = 1 <= stage < LAST_STAGE
        prefix = f"model.layers.{stage - 1}." if layer else ""
        quantizer = LayerQuantizer({o.path.removeprefix(prefix): o for o in outputs}, self._fit)
        if layer:
            quantizer.layer(self._stream.layer(stage - 1), self._states, self._lengths)
        elif stage == 0:
            module = self._stream.embedding()
            quantizer.matrices({"model.word_embeddings": module}, self._stream.readers_of_embedding())
        else:
            norm, head = self._stream.norm_and_head()
            if head is not None:
                x = (
                    [norm(s[row, :n]) for row, n in enumerate(ends)]
                    for s, ends in zip(self._states, self._lengths, strict=True)
                )
                quantizer.matrices({"lm_head": head}, hessian(rows for batch in x for rows in batch))
        self.unreached += quantizer.unreached
        mx.clear_cache()
        return {prefix + path: packed for path, packed in quantizer.packed.items()}

    def advance(self, stage: int, shards: Sequence[Path]) -> None:
        """Take the residual stream through what was written of a stage."""
        stored: dict[str, mx.array] = {}
        for shard in shards:
            loaded: Any = mx.load(str(shard))
            stored |= loaded
        arrays = {}
        for o in self._outputs[stage]:
            if o.setting is None:
                array = stored[o.name]
            else:
                array = dequantize({n: stored[f"{o.path}.{n}"] for n in ("weight", "scales", "biases")}, o.setting)
            dtype = mx.float32 if o.name.endswith(FLOAT32) else self._stream.dtype
            arrays[o.name] = array.astype(dtype)
            mx.eval(arrays[o.name])
        if stage == 0:
            self._states = self._stream.embed(self._tokens, arrays)
        else:
            self._stream.advance(stage - 1, self._states, arrays)


def bounded(batches: Sequence[Batch], most: int) -> list[Batch]:
    """Rows of every length, evenly, with so many tokens in all; at least one row, cut there."""
    total, taken, passed, kept = sum(end for b in batches for _, end in b.spans), 0, 0, list[Batch]()
    for batch in batches:
        rows = []
        for row, (_, end) in enumerate(batch.spans):
            passed += end
            if (taken + end) * total <= passed * min(most, total):
                rows.append(row)
                taken += end
        if rows:
            kept.append(
                Batch(batch.tokens[mx.array(rows)], [batch.spans[r] for r in rows], [batch.kinds[r] for r in rows])
            )
    return kept or [Batch(batches[0].tokens[:1, :most], [(0, min(batches[0].spans[0][1], most))], ["text"])]
