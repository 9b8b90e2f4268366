"""One prefill and one token loop: nothing else runs a model over a cache, but for a reason that is named here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("ring_mlx", "metal_kernels", "tui", "benchmarks", "demo")
MODEL = re.compile(r"(^|_)(model|forward)$|^layers$")
LOOPS = "ring_mlx/generation/decoding.py"
# Files that call a model with a cache themselves.
REASONS = {
    "ring_mlx/generation/batch.py": "the step of a batch, whose rows join and leave between any two",
    "ring_mlx/generation/draft_model.py": "steps that may be taken back one by one",
    "ring_mlx/generation/speculation.py": "steps of one token between those of several",
    "ring_mlx/model/tentative.py": "tokens that may be taken back",
    "ring_mlx/bench/engines.py": "mlx-lm's model with the arguments of ours",
    "ring_mlx/tuning/workloads.py": "times some layers and the head",
    "ring_mlx/tuning/kernel_check.py": "asks for kernels and computes nothing",
    "ring_mlx/doctor/report_parts.py": "one forward pass of each shape, for its verdicts",
    "benchmarks/decode_kernels.py": "one step, whose launches are recorded",
    "benchmarks/decode_profile.py": "times the parts of a step one by one, which the loop overlaps",
    "benchmarks/speculation.py": "times steps of each length, each waited for",
    "benchmarks/traffic.py": "one forward pass, whose launches are recorded and not computed",
    "demo/measure.py": "one forward pass over a given answer",
}


def runs_a_model(call: ast.Call) -> bool:
    """Whether something that is called like a model is given something that is called like a cache."""
    name = (call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")).strip("_")
    if any(k.arg == "last_only" for k in call.keywords):
        return True
    given = [n for a in (*call.args, *(k.value for k in call.keywords)) for n in ast.walk(a)]
    words = {getattr(n, "attr", getattr(n, "id", "")).strip("_") for n in given}
    return MODEL.search(name) is not None and bool(words & {"cache", "caches"})


def calls(source: str) -> Iterator[int]:
    """The lines that run a model over a cache."""
    return (n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and runs_a_model(n))


def test_only_the_loop_runs_a_model_over_a_cache():
    files = [f for folder in FOLDERS for f in sorted((ROOT / folder).rglob("*.py"))]
    texts = {str(f.relative_to(ROOT)): f.read_text(encoding="utf-8") for f in files}
    found = {name: list(calls(text)) for name, text in texts.items() if "cache" in text}
    assert {name: lines for name, lines in found.items() if lines and name not in (LOOPS, *REASONS)} == {}
    assert [name for name in (LOOPS, *REASONS) if not found.get(name)] == []


@pytest.mark.parametrize(
    ("source", "is_a_loop"),
    [
        ("for at in range(9): model(ids[None, at:], cache, last_only=True)", True),
        ("while True: y = self._model(y[:, None], self._cache)", True),
        ("logits = [ours.model(part, cache=cache) for part in parts]", True),
        ("net(ids, state, last_only=True)", True),
        ("model(ids, model.make_cache())", False),
        ("model(ids, cache.copy())", True),
        ("model(ids[:, :-1])", False),
        ("for _ in prefill(ids, model, cache, sizes): pass", False),
        ("generate_step(ids, model, cache)", False),
    ],
)
def test_what_counts_as_running_a_model_over_a_cache(source, is_a_loop):
    assert any(calls(source)) == is_a_loop
