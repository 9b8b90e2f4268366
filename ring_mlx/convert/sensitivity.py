"""How much each module's quantization alone changes a model's predictions, measured one layer of the source in memory.

The residual stream of the model as it is, and one for each module that is quantized, go through a layer together.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ring_mlx.convert.calibration import bounded
from ring_mlx.convert.fit import dequantize, quantize
from ring_mlx.convert.plan import Output, Plan
from ring_mlx.convert.recipes import AFFINE_BITS, Setting
from ring_mlx.convert.report import Batch, make_batches
from ring_mlx.convert.sources import Source
from ring_mlx.convert.streams import FloatStream
from ring_mlx.evaluation.divergence import divergence
from ring_mlx.system.progress import Progress

# Tokens of the text, at most, so that the streams of a hundred modules fit into a gigabyte at mini's width.
MOST_TOKENS = 1024
MEASURED_BITS = 3
SAMPLED_WEIGHTS = 1 << 18
# Modules whose products are one dispatch have the same bits.
TOGETHER = (("query_key_value", "g_proj"), ("gate_proj", "up_proj"))


def group_of(path: str) -> str:
    """Modules of a group get the same bits; the name of the group is that of its first."""
    for first, second in TOGETHER:
        path = re.sub(rf"\.{second}$", f".{first}", path)
    return path


def groups(plan: Plan) -> dict[str, list[Output]]:
    """The outputs of each group that is to be quantized."""
    found: dict[str, list[Output]] = {}
    for o in plan.outputs:
        if o.setting is not None and o.setting.mode == "affine" and not o.copied:
            found.setdefault(group_of(o.path), []).append(o)
    return found


def measure(
    source: Source, plan: Plan, rows: Sequence[Mapping[str, Any]], progress: Progress | None = None
) -> dict[str, dict[int, float]]:
    """The mean KL divergence in nats a token that each group adds, by its bits.

    It is measured with MEASURED_BITS; other bits change it as they change the squared error of the weights.
    """
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    batches = bounded(make_batches(source.folder, rows, "--calibrate"), MOST_TOKENS)
    todo, count = groups(plan), source.config.num_hidden_layers
    errors: dict[str, dict[int, float]] = {}

    def rounded(module: nn.Module, path: str, group: str) -> None:
        output = next(o for o in todo[group] if o.path == path)
        assert output.setting is not None
        shape, flat = module.weight.shape, module.weight.reshape(-1, module.weight.shape[-1])
        if group not in errors:
            errors[group] = _errors(flat, output.setting)
        setting = replace(output.setting, bits=MEASURED_BITS)
        packed = quantize(flat, setting, output.dtype, "rtn")
        module.weight = dequantize(packed, setting).astype(dtype).reshape(shape)
        mx.eval(module.weight)

    with tempfile.TemporaryDirectory() as scratch:
        stream = FloatStream(source, dtype, scratch=Path(scratch))
        try:
            embedding = stream.embedding()
            states = {"": [embedding(b.tokens).astype(mx.float32) for b in batches]}
            if (path := "model.word_embeddings") in todo:
                kept = embedding.weight
                rounded(embedding, path, path)
                states[path] = [embedding(b.tokens).astype(mx.float32) for b in batches]
                embedding.weight = kept
            mx.eval(states)
            for layer in range(count):
                prefix = f"model.layers.{layer}."
                module = stream.layer(layer)
                own: dict[str, list[mx.array]] = {}
                for group in (g for g in todo if g.startswith(prefix)):
                    named = {o.path: _inside(module, o.path.removeprefix(prefix)) for o in todo[group]}
                    floats = {p: m.weight for p, m in named.items()}
                    for p, m in named.items():
                        rounded(m, p, group)
                    own[group] = _through(module, states[""])
                    for p, m in named.items():
                        m.weight = floats[p]
                for name, stream_states in states.items():
                    states[name] = _through(module, stream_states)
                states |= own
                stream.drop(layer)
                if progress:
                    progress(plan.nbytes * (layer + 1) / (count + 1), plan.nbytes, f"sensitivities of layer {layer}")
            found = _divergences(stream, states, batches, rounded if "lm_head" in todo else None)
        finally:
            stream.close()
    if progress:
        progress(plan.nbytes, plan.nbytes, "sensitivities")
    return {
        group: {bits: found[group] * e / errors[group][MEASURED_BITS] for bits, e in errors[group].items()}
        for group in todo
    }


def _divergences(
    stream: FloatStream, states: Mapping[str, Sequence[mx.array]], batches: Sequence[Batch], rounded: Any
) -> dict[str, float]:
    """Mean divergence of each stream's predictions from those of the first, and of the first's with the head rounded."""

    def logits(own: Sequence[mx.array]) -> Iterator[tuple[mx.array, mx.array]]:
        for batch, x in zip(batches, own, strict=True):
            for row, (_, end) in enumerate(batch.spans):
                yield stream.logits(x[row, : end - 1]), batch.tokens[row, 1:end]

    def mean(own: Sequence[mx.array]) -> float:
        rows = [divergence(a, b, t)[0] for a, (b, t) in zip(exact, logits(own), strict=True)]
        return max(float(sum(r.sum() for r in rows)) / max(1, sum(map(len, rows))), 1e-12)

    exact = [a for a, _ in logits(states[""])]
    found = {name: mean(own) for name, own in states.items()}
    if rounded is not None:
        rounded(stream.head, "lm_head", "lm_head")
        found["lm_head"] = mean(states[""])
    return found


def _through(module: nn.Module, states: Sequence[mx.array]) -> list[mx.array]:
    found = []
    for x in states:
        found.append(module(x, None if module.is_linear else "causal", None, 0))
        mx.eval(found[-1])
    return found


def _inside(module: Any, path: str) -> nn.Module:
    for part in path.split("."):
        module = module[part]
    found: nn.Module = module
    return found


def _errors(w: mx.array, setting: Setting) -> dict[int, float]:
    """Squared error of some rows with each number of bits."""
    step = max(1, math.ceil(w.size / SAMPLED_WEIGHTS))
    rows = w[::step].astype(mx.float32)
    found = {}
    for bits in AFFINE_BITS:
        form = replace(setting, bits=bits)
        found[bits] = float(mx.square(dequantize(quantize(rows, form, mx.bfloat16, "rtn"), form) - rows).sum()) + 1e-30
    return found
