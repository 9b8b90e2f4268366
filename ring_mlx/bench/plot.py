"""Speed against context as a PNG; the only one that imports matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ring_mlx.bench.config import BenchError
from ring_mlx.system.install import command_for


def check_plot() -> None:
    """Raises BenchError where matplotlib is missing, before anything is measured."""
    if find_spec("matplotlib") is None:
        raise BenchError(f"--plot needs matplotlib; install it: {command_for('matplotlib')}")


def plot(rows: Sequence[dict[str, Any]], title: str, path: str) -> None:
    """Prefill and decode side by side, one line an engine and batch size, with the spread as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        key = f"{name}_tps"
        for engine, batch in dict.fromkeys((r["engine"], r["batch"]) for r in rows):
            line = [r for r in rows if (r["engine"], r["batch"]) == (engine, batch) and r[f"{key}_median"]]
            if not line:
                continue
            at = [r["context"] for r in line]
            axes.plot(at, [r[f"{key}_median"] for r in line], marker="o", label=f"{engine}, batch {batch}")
            axes.fill_between(at, [r[f"{key}_min"] for r in line], [r[f"{key}_max"] for r in line], alpha=0.2)
        axes.set(xlabel="context, tokens", ylabel="tok/s", title=name, ylim=(0, None))
        axes.set_xscale("log", base=2)
        contexts = sorted({r["context"] for r in rows})
        axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
        axes.legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120, format="png")
