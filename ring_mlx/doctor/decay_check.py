"""Which decay a checkpoint was trained with, by how likely a text is under each; knows formulas and statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ring_mlx.decay import alibi_slopes, decay_rate
from ring_mlx.doctor.decay_text import Part
from ring_mlx.doctor.finding import NOTE, OK, PROBLEM, Finding
from ring_mlx.errors import OptionError
from ring_mlx.evaluation.scoring import STEP_TOKENS, Floats, token_nats
from ring_mlx.model import Model

SECTION = "decay"
BLOCK_TOKENS = 64
# Differences of fewer standard errors, or over fewer pieces of text, are not told from chance. Four rather than two, as
# pieces of one conversation depend on each other.
SIGMAS, LEAST_PIECES = 4.0, 8
Formula = Callable[[int, int, int], mx.array]
Progress = Callable[[int, int], None]


def one_based(heads: int, layer: int, layers: int) -> mx.array:
    """``slope_h * (1 - max(0, i - 1) / (N - 1) + 1e-5)``; same contract as `decay_rate`."""
    factor = 1 - max(0, layer - 1) / max(1, layers - 1) + 1e-5
    return mx.array([slope * factor for slope in alibi_slopes(heads)], dtype=mx.float32)


def rounded(formula: Formula) -> Formula:
    """The formula's rates after ``exp(-s)`` went through bfloat16, where it may have become 1."""

    def rates(heads: int, layer: int, layers: int) -> mx.array:
        kept = mx.exp(-formula(heads, layer, layers)).astype(mx.bfloat16).astype(mx.float32)
        return mx.maximum(-mx.log(kept), 0)

    return rates


OURS = "0-based"
FORMULAS: dict[str, Formula] = {
    OURS: decay_rate,
    "1-based": one_based,
    "0-based, bfloat16": rounded(decay_rate),
    "1-based, bfloat16": rounded(one_based),
}
ABOUT = {
    OURS: "layers counted from 0, float32: what ring-mlx computes",
    "1-based": "max(0, i - 1) for i, float32",
    "0-based, bfloat16": "exp(-s) rounded to bfloat16",
    "1-based, bfloat16": "both, as mlx-lm 0.32.2 computes",
}


class Pieces(NamedTuple):
    """Nats [n] and tokens [n] of pieces of text that are looked at one by one."""

    nats: Floats
    tokens: Floats


@dataclass(frozen=True)
class Measured:
    """A formula's nats a token, and how much more that is than the best's, with the standard error of that."""

    nats: float
    behind: float
    error: float

    @property
    def sigmas(self) -> float:
        """Standard errors behind the best."""
        return self.behind / self.error if self.error else math.inf if self.behind > 0 else 0.0

    @property
    def is_ruled_out(self) -> bool:
        """Whether chance does not explain that it is behind."""
        return self.sigmas > SIGMAS


@dataclass(frozen=True)
class Verdict:
    """What was measured of each formula, the best of them, and over how much text."""

    measured: dict[str, Measured]
    best: str
    tokens: int
    pieces: int

    @property
    def possible(self) -> list[str]:
        """The best, and those that cannot be told from it."""
        if self.pieces < LEAST_PIECES:
            return list(self.measured)
        return [name for name, m in self.measured.items() if not m.is_ruled_out]


@contextmanager
def decays(model: Model, formula: Formula) -> Iterator[None]:
    """Let the model forget by another formula as long as the context lasts."""
    layers = [(i, layer.attention) for i, layer in enumerate(model.layers) if layer.is_linear]
    kept = [attention._decay_rate for _, attention in layers]
    try:
        for i, attention in layers:
            attention._decay_rate = formula(model.config.num_attention_heads, i, model.config.num_hidden_layers)
        yield
    finally:
        for (_, attention), rates in zip(layers, kept, strict=True):
            attention._decay_rate = rates


def compare(
    model: Model,
    parts: Sequence[Part],
    formulas: Mapping[str, Formula] = FORMULAS,
    progress: Progress | None = None,
) -> Verdict:
    """Score the same text under every formula.

    Args:
        model: The model.
        parts: From `decay_text`.
        formulas: By name.
        progress: Called with (parts scored, all of all formulas).

    Raises:
        OptionError: If the model has no linear layer.
    """
    if not any(layer.is_linear for layer in model.layers):
        raise OptionError(f"--check-decay needs linear layers, and {model.model_type!r} has none; give a linear model.")
    found = {}
    for n, (name, formula) in enumerate(formulas.items()):
        with decays(model, formula):
            scored = []
            for done, part in enumerate(parts, 1):
                scored.append(score(model, part))
                if progress:
                    progress(n * len(parts) + done, len(formulas) * len(parts))
            found[name] = Pieces(*(np.concatenate(arrays) for arrays in zip(*scored, strict=True)))
    return judge(found)


def score(model: Model, part: Part) -> Pieces:
    """A part's pieces: its probes, or blocks of the text itself."""
    if not part.probes:
        found = token_nats(model, part.shared, 1)
        starts = np.arange(0, len(found), BLOCK_TOKENS)
        sizes = np.diff(np.append(starts, len(found))).astype(np.float64)
        return Pieces(np.add.reduceat(found, starts), sizes)
    cache, shared = model.make_cache(), mx.array(part.shared, dtype=mx.int32)
    for at in range(0, shared.size, STEP_TOKENS):
        model(shared[None, at : at + STEP_TOKENS], cache, last_only=True)
        mx.eval(cache.state)
    nats = [token_nats(model, p.ids, p.first, cache.copy()) for p in part.probes]
    return Pieces(np.array([n.sum() for n in nats]), np.array([float(len(n)) for n in nats]))


def judge(found: Mapping[str, Pieces]) -> Verdict:
    """Compare the formulas piece by piece: pieces differ far more from each other than formulas do.

    ::

        behind = sum(nats - nats of the best) / sum(tokens),  error = std(differences) / sqrt(n) / mean(tokens)
    """
    means = {name: float(p.nats.sum() / p.tokens.sum()) for name, p in found.items()}
    best = min(means, key=lambda name: means[name])
    measured = {}
    for name, pieces in found.items():
        n, differences = len(pieces.nats), pieces.nats - found[best].nats
        spread = float(differences.std(ddof=1)) if n > 1 else math.inf
        error = spread / math.sqrt(n) / float(pieces.tokens.mean()) if name != best else 0.0
        measured[name] = Measured(means[name], float(differences.sum() / pieces.tokens.sum()), error)
    return Verdict(measured, best, int(found[best].tokens.sum()), len(found[best].nats))


def findings(verdict: Verdict) -> list[Finding]:
    """A line for each formula, then what follows from them."""
    lines = []
    for name, m in verdict.measured.items():
        behind = "the least" if name == verdict.best else f"{m.behind:+.5f} of it, standard error {m.error:.5f}"
        seen = f"{m.nats:.5f} nats a token, perplexity {math.exp(min(m.nats, 700.0)):.5f}; {behind} ({ABOUT[name]})"
        lines.append(Finding(SECTION, name, OK, seen, data=asdict(m)))
    return [*lines, conclusion(verdict)]


def conclusion(verdict: Verdict) -> Finding:
    """Which formula the weights were trained with, as far as the text tells."""
    possible, data = verdict.possible, {"best": verdict.best, "possible": verdict.possible}
    counted = f"over {verdict.tokens:,} tokens in {verdict.pieces} pieces"
    rivals = [name for name in possible if name != verdict.best]
    if OURS not in possible:
        seen = f"trained with {' or '.join(repr(p) for p in possible)}, not {OURS!r}, {counted}"
        remedy = "ring-mlx will answer worse the longer the text; please report this checkpoint"
        return Finding(SECTION, "verdict", PROBLEM, seen, remedy, data)
    if rivals:
        leads = ", ".join(f"{name!r} ({verdict.measured[name].sigmas:.1f} standard errors behind)" for name in rivals)
        seen = f"{verdict.best!r} is likeliest, but this text cannot tell it from {leads}, {counted}"
        remedy = "give more or longer text of the kind that the model knows: --tokens, --text FILE"
        return Finding(SECTION, "verdict", NOTE, seen, remedy, data)
    others = [m for name, m in verdict.measured.items() if name != verdict.best]
    margin = min(others, key=lambda m: m.behind)
    seen = (
        f"trained with {OURS!r}, as ring-mlx computes; the next is {margin.behind:.5f} nats a token behind, "
        f"{margin.sigmas:.1f} standard errors, {counted}"
    )
    return Finding(SECTION, "verdict", OK, seen, data=data | {"margin_nats": margin.behind, "sigmas": margin.sigmas})
