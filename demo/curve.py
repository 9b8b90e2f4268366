"""The loss of a training as a picture: ``python -m demo.curve demo/log.csv demo/curve.svg``; needs matplotlib."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from statistics import median

LABELS = {512: "short conversations of all tasks", 4352: "long conversations, mostly recall"}
WINDOW = 7


def read(path: Path) -> dict[int, tuple[list[float], list[float]]]:
    """Minutes and losses of each row width, as medians of neighbouring lines."""
    found: dict[int, tuple[list[float], list[float]]] = {}
    with path.open(newline="") as f:
        for line in csv.DictReader(f):
            minutes, losses = found.setdefault(int(line["width"]), ([], []))
            minutes.append(float(line["trained_s"]) / 60)
            losses.append(float(line["loss"]))
    return {
        width: (minutes[:: WINDOW // 2], [median(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW // 2)])
        for width, (minutes, losses) in found.items()
    }


def draw(log: Path, out: Path) -> None:
    """Loss against minutes of training, one line a width, on a logarithmic scale."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for width, (minutes, losses) in sorted(read(log).items()):
        axes.plot(minutes, losses, label=f"{LABELS.get(width, '')} ({width} tokens)")
    axes.set(xlabel="minutes of training", ylabel="nats a token of thought and answer", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
