"""Which decay a checkpoint was trained with, by how likely a text is under each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ring_mlx.doctor.decay_text import Part
from ring_mlx.doctor.finding import NOTE, OK, PROBLEM, Finding
from ring_mlx.errors import OptionError
from ring_mlx.evaluation.perplexity import Floats, nats, scored_logits
from ring_mlx.generation.decoding import prefill, step_sizes
from ring_mlx.model.config import RingConfig
from ring_mlx.model.config_values import DECAY_KEY, DECAY_OFFSETS, shown
from ring_mlx.model.decay import decay_rate
from ring_mlx.model.model import Model
from ring_mlx.system.progress import Progress

SECTION, KEY = "decay", DECAY_KEY
BLOCK_TOKENS, STEP_TOKENS, PROBE_TOKENS = 64, 256, 64
# Differences of fewer standard errors, or over fewer blocks of text, are not told from chance. Four rather than two, as
# blocks of one text depend on each other, and as the best of three is compared with both others.
SIGMAS, LEAST_BLOCKS = 4.0, 8
# A text of a kind that the model was not trained on surprises it more than it expects, and forgetting wrongly may then
# help: in models trained under each formula by up to a seventh of that excess. A lead must be more than a quarter of it.
MISFIT = 0.25
# Numbers that nobody uses, beyond the others on either side. Some text rewards what forgets soonest, or latest, whatever a
# model was trained with; so what leads must be likelier than these too.
CONTROLS: dict[int | str, str] = dict.fromkeys((1, -2), "nobody computes so: a control")
FORMULAS = DECAY_OFFSETS | CONTROLS
_KNOWN_TEXT = "give --text FILE of a kind that it was trained on, such as answers from its authors' own service"
# About a minute's text, within these bounds.
READ_S, LEAST_TOKENS, MOST_TOKENS = 60.0, 1024, 16384
Offset = int | str


class Blocks(NamedTuple):
    """Of blocks of text [n]: nats, how many the model expected, and tokens."""

    nats: Floats
    expected: Floats
    tokens: Floats


@dataclass(frozen=True)
class Measured:
    """A formula's nats a token, and how much more that is than the least, with the standard error of that."""

    nats: float
    behind: float
    error: float

    @property
    def sigmas(self) -> float:
        return self.behind / self.error if self.error else math.inf if self.behind > 0 else 0.0


@dataclass(frozen=True)
class Verdict:
    """What was measured of each formula, over how much text, and how many nats a token the model did not expect."""

    measured: dict[Offset, Measured]
    tokens: int
    blocks: int
    excess: float

    @property
    def near(self) -> list[Offset]:
        """Those, controls too, that chance or the kind of text may have put behind; all where there is too little."""
        least = MISFIT * self.excess if self.blocks >= LEAST_BLOCKS else math.inf
        return [k for k, m in self.measured.items() if m.behind <= max(SIGMAS * m.error, least)]

    @property
    def possible(self) -> list[Offset]:
        """The formulas that are not ruled out: those that are near, or all if a control is."""
        return list(DECAY_OFFSETS) if any(k in CONTROLS for k in self.near) else self.near

    @property
    def decided(self) -> Offset | None:
        """The only one that is possible, or None."""
        return self.possible[0] if len(self.possible) == 1 else None


@contextmanager
def decays(model: Model, offset: Offset) -> Iterator[None]:
    """Let the model forget by another formula as long as the context lasts."""
    layers = [(i, layer.attention) for i, layer in enumerate(model.layers) if layer.is_linear]
    kept, c = [attention._decay_rate for _, attention in layers], model.config
    try:
        for i, attention in layers:
            attention._decay_rate = decay_rate(c.num_attention_heads, i, c.num_hidden_layers, offset)
        yield
    finally:
        for (_, attention), rates in zip(layers, kept, strict=True):
            attention._decay_rate = rates


def check_linear(config: RingConfig) -> None:
    if not config.has_linear:
        raise OptionError(
            f"--check-decay needs linear layers, and {config.model_type!r} has none; give a linear model."
        )


def tokens_a_second(model: Model) -> float:
    """How fast the model is read, from a short try; the first, which compiles, is not counted."""
    ids = [i % model.config.vocab_size for i in range(min(PROBE_TOKENS, model.config.context_tokens))]
    for _ in range(2):
        began = time.perf_counter()
        score(model, Part(ids, []))
    return len(ids) / (time.perf_counter() - began)


def affordable(tps: float) -> int:
    """Tokens that are read under every formula in about a minute, as a power of two within bounds."""
    tokens = max(LEAST_TOKENS, min(MOST_TOKENS, int(tps * READ_S / len(FORMULAS))))
    return 1 << (tokens.bit_length() - 1)


def announcement(parts: Sequence[Part], tps: float) -> str:
    """What is said before it starts: how much is read, and how long that should take."""
    tokens = sum(part.tokens for part in parts)
    about = f"about {max(1, round(len(FORMULAS) * tokens / tps))} s"
    return (
        f"reading {tokens:,} tokens under each of {len(DECAY_OFFSETS)} decays and {len(CONTROLS)} controls, {about} ..."
    )


def compare(model: Model, parts: Sequence[Part], progress: Progress | None = None) -> Verdict:
    """Score the same text under every formula; ``progress`` is called with (parts scored, all of all formulas)."""
    check_linear(model.config)
    found = {}
    for n, offset in enumerate(FORMULAS):
        with decays(model, offset):
            scored = []
            for part in parts:
                scored.append(score(model, part))
                if progress:
                    progress(n * len(parts) + len(scored), len(FORMULAS) * len(parts), f"decay {shown(offset)}")
            found[offset] = _joined(scored)
    return judge(found)


def score(model: Model, part: Part) -> Blocks:
    """A part's blocks: its probes, after the text before them was read once, or the text itself, cut."""
    if not part.probes:
        return _blocks(_seen(model, part.shared, 1, None), BLOCK_TOKENS)
    cache, shared = model.make_cache(), mx.array(part.shared, dtype=mx.int32)
    for _ in prefill(shared, model, cache, step_sizes(shared.size, STEP_TOKENS)):
        pass
    return _joined([_blocks(_seen(model, p.ids, p.first, cache.copy()), len(p.ids)) for p in part.probes])


def _joined(parts: Sequence[Blocks]) -> Blocks:
    return Blocks(*map(np.concatenate, zip(*parts, strict=True)))


def _seen(model: Model, ids: Sequence[int], first: int, cache: Any) -> Floats:
    """Nats of each of ``ids[first:]``, and how many the model expected, [2, n]."""
    seen = []
    for logits, targets in scored_logits(model, ids, first, cache, STEP_TOKENS):
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        entropy = -(mx.exp(logs) * mx.maximum(logs, -1e4)).sum(axis=-1)
        seen.append(np.array(mx.stack([nats(logits, targets), entropy]), dtype=np.float64))
    return np.concatenate(seen, axis=1)


def _blocks(seen: Floats, size: int) -> Blocks:
    starts = np.arange(0, seen.shape[1], size)
    sums = np.add.reduceat(seen, starts, axis=1)
    return Blocks(sums[0], sums[1], np.diff(np.append(starts, seen.shape[1])).astype(np.float64))


def judge(found: Mapping[Offset, Blocks]) -> Verdict:
    """Compare the formulas block by block: blocks differ far more from each other than formulas do.

    ::

        behind = sum(nats - nats of the best) / sum(tokens),  error = std(differences) / sqrt(n) / mean(tokens)
    """
    total = {offset: float(b.nats.sum()) for offset, b in found.items()}
    best = min(total, key=lambda offset: total[offset])
    n, tokens = len(found[best].nats), float(found[best].tokens.sum())
    measured = {}
    for offset, blocks in found.items():
        differences = blocks.nats - found[best].nats
        spread = float(differences.std(ddof=1)) if n > 1 else math.inf
        error = 0.0 if offset == best else spread * math.sqrt(n) / tokens
        measured[offset] = Measured(total[offset] / tokens, float(differences.sum()) / tokens, error)
    excess = max(0.0, total[best] - float(found[best].expected.sum())) / tokens
    return Verdict(measured, int(tokens), n, excess)


def findings(verdict: Verdict, configured: Offset, model: str) -> list[Finding]:
    """A line for each formula, then what follows from them for a model that is configured with one."""
    lines = []
    for offset, m in verdict.measured.items():
        behind = f"{m.behind:+.5f}, standard error {m.error:.5f}" if m.behind or m.error else "the least"
        seen = f"{m.nats:.5f} nats a token, perplexity {math.exp(min(m.nats, 700.0)):.5f}; {behind}"
        lines.append(Finding(SECTION, str(offset), OK, f"{seen} ({FORMULAS[offset]})", data=asdict(m)))
    return [*lines, conclusion(verdict, configured, model)]


def conclusion(verdict: Verdict, configured: Offset, model: str = "MODEL") -> Finding:
    """Which formula the weights were trained with, as far as the text tells, and what to do."""
    decided, left = verdict.decided, verdict.possible
    data = {"decided": decided, "possible": left, "configured": configured, "excess": verdict.excess}
    counted = f"over {verdict.tokens:,} tokens in {verdict.blocks} blocks"
    if decided is not None:
        margin = min((m for k, m in verdict.measured.items() if k != decided), key=lambda m: m.sigmas)
        seen = f"{KEY} {shown(decided)}: all others are {margin.sigmas:.1f} standard errors or more behind, {counted}"
        if decided == configured:
            return Finding(SECTION, "verdict", OK, f"{seen}; the model has it", data=data)
        remedy = f"the model has {shown(configured)}: ring-mlx doctor --check-decay {model} --write-decay"
        return Finding(SECTION, "verdict", PROBLEM, seen, remedy, data)
    names = " from ".join(map(shown, left)) if len(left) == 2 else ", ".join(map(shown, left))
    seen = f"no verdict: this text cannot tell {names}{'' if len(left) == 2 else ' apart'}, {counted}"
    if configured in left:
        return Finding(SECTION, "verdict", NOTE, seen, _what_would_tell(verdict), data)
    seen += f"; but it is not {shown(configured)}, which the model has"
    remedy = f"try {KEY} {' or '.join(map(shown, left))} in config.json; {_what_would_tell(verdict)}"
    return Finding(SECTION, "verdict", PROBLEM, seen, remedy, data)


def _what_would_tell(verdict: Verdict) -> str:
    best = min(verdict.measured, key=lambda k: verdict.measured[k].behind)
    sigmas = [verdict.measured[k].sigmas for k in verdict.near if k != best]
    if verdict.blocks < LEAST_BLOCKS:
        return f"fewer than {LEAST_BLOCKS} blocks tell nothing; give more: --text FILE, --tokens"
    if best in CONTROLS and min(sigmas, default=math.inf) >= 1:
        return f"{shown(best)}, which nobody computes, is the likeliest, so this text rewards something else; {_KNOWN_TEXT}"
    if max(sigmas, default=0.0) > SIGMAS:
        return (
            f"it costs {verdict.excess:.3f} nats a token more than the model expects, which may decide; {_KNOWN_TEXT}"
        )
    if min(sigmas, default=0.0) < 1:
        return "more of it will hardly help: give longer text that refers far back, or a model that forgets more"
    factor = (SIGMAS / min(sigmas)) ** 2
    return f"about {math.ceil(factor * verdict.tokens / 1000):,},000 tokens of its kind may: --text FILE, --tokens"
