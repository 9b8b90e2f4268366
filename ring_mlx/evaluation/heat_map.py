"""Recall over length and depth as a PNG; uses matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ring_mlx.errors import OptionError
from ring_mlx.evaluation.recall import Grid, axes
from ring_mlx.system.files import check_named, write_named
from ring_mlx.system.install import command_for


def check_plot(path: Path) -> None:
    """Raises OptionError, before anything is measured, where matplotlib is missing or the file cannot be written."""
    if find_spec("matplotlib") is None:
        raise OptionError(f"--plot needs matplotlib; install it: {command_for('matplotlib')}")
    if not path.parent.is_dir():
        raise OptionError(f"--plot {path} is in a folder that does not exist; make {path.parent} first.")
    with _written(path):
        check_named(path)


def plot(grid: Grid, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    lengths, depths = axes(grid)
    by_place = {(c.length, c.depth): c.right / c.asked for c in grid.cells}
    rows = [[by_place[length, d] for length in lengths] for d in depths]
    figure = Figure(figsize=(2 + 0.9 * len(lengths), 1.8 + 0.5 * len(depths)), layout="constrained")
    chart = figure.subplots()
    image = chart.imshow(rows, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.6)
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            chart.text(x, y, f"{share:.0%}", ha="center", va="center")
    chart.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    chart.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    chart.set(xlabel="length, tokens", ylabel="depth of the fact")
    chart.set_title(title, fontsize=9)
    figure.colorbar(image, label="recalled")
    with _written(path):
        write_named(path, lambda name: figure.savefig(name, dpi=120, format="png"))


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as e:
        raise OptionError(f"--plot {path} cannot be written ({e}); give another file.") from None
