"""A tuning's result as text or Markdown: each choice, the times of its ways, the chosen one and its gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metal_kernels.choices import TABLE, Value
from ring_mlx.tuning.autotune import Tuning
from ring_mlx.tuning.race import Verdict

HEADER = ("choice", "what", "default", "chosen", "gain", "times", "not timed")


def rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    out: list[tuple[str, ...]] = []
    for v in verdicts:
        about = TABLE[v.name].about if v.name in TABLE else "all that was chosen"
        gain = f"{100 * v.gain:.1f} %" if v.gain else ""
        out.append((v.name, about, str(v.default), str(v.chosen), gain, _times(v), _outs(v.out)))
    return out


def _times(verdict: Verdict) -> str:
    order = sorted(verdict.seconds, key=lambda v: verdict.seconds[v])
    return ", ".join(f"{v} {1e3 * verdict.seconds[v]:.3g} ms" for v in order)


def _outs(out: Mapping[Value, str]) -> str:
    if len(out) > 1 and len(set(out.values())) == 1:
        return f"{', '.join(map(str, out))} ({next(iter(out.values()))})"
    return ", ".join(f"{v} ({why})" for v, why in out.items())


def text(tuning: Tuning) -> str:
    """For a terminal: a line for each choice, the times below it."""
    lines = [heading(tuning)]
    for name, about, default, chosen, gain, times, out in rows([*tuning.verdicts, *filter(None, [tuning.buffers])]):
        said = f"{chosen}, not {default}: {gain} less time" if chosen != default else f"{chosen} stays"
        lines.append(f"  {name:17}  {said}")
        lines += [f"  {'':17}    {line}" for line in (about, times, out and f"not timed: {out}") if line]
    return "\n".join(lines)


def markdown(tuning: Tuning) -> str:
    lines = [heading(tuning), "", f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    return "\n".join(
        [*lines, *(f"| {' | '.join(row)} |" for row in rows([*tuning.verdicts, *filter(None, [tuning.buffers])]))]
    )


def heading(tuning: Tuning) -> str:
    changed = len(tuning.chosen)
    return (
        f"{tuning.label} on {tuning.backend}: {changed} of the tables' values changed, timed in {tuning.seconds:.1f} s"
    )
