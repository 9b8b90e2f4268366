"""The parts of ``ring-mlx doctor --report``, each of which returns what it finds as JSON.

Each runs in a process of its own (`python -m ring_mlx.doctor.report_parts PART FILE`), so that a hang of the GPU or a crash of
its driver costs one part. All share a folder for proofs and choices that is empty at first.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ring_mlx.doctor.finding import Finding

Found = dict[str, Any]
STACK = (
    "ring-mlx",
    "mlx",
    "mlx-metal",
    "mlx-cuda-13",
    "mlx-cpu",
    "mlx-lm",
    "numpy",
    "transformers",
    "safetensors",
    "textual",
)
# Of what MLX says of a device; on CUDA it knows a number of the card too.
DEVICE = ("architecture", "max_buffer_length", "max_recommended_working_set_size", "memory_size", "resource_limit")
# Whether they are set changes what is measured; to what is nobody's business.
SWITCHES = ("RING_MLX_KERNELS", "RING_MLX_TUNE", "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
CONTEXTS, CPU_CONTEXTS, GENERATE, REPEATS = (512, 2048), (128, 512), 64, 2
OPERATION_TOKENS, CALLS = (1, 4, 512), 16
# Of --random mini: all layers, or as many groups of them as fit.
LAYERS = (20, 10, 5)
# Rows and tokens with which every kind of kernel is tried: a prompt of some length, single tokens, few, batches.
TRIED = ((1, 1), (1, 2), (1, 3), (1, 5), (1, 8), (1, 9), (1, 70), (1, 600), (3, 1), (3, 64))


class Part(NamedTuple):
    """What a part is about, how long it may take at most, and how it is made."""

    about: str
    limit_s: float
    make: Callable[[], Found]


def machine() -> Found:
    """Chip, system, memory, versions, and what was chosen here before."""
    import mlx.core as mx

    from ring_mlx.bench.machine import describe
    from ring_mlx.doctor import machine as looked_at
    from ring_mlx.doctor import tuning, versions

    found = [f for f in versions.check() if f.name != "Python"] + looked_at.check() + tuning.check()
    return {
        "on": _undated(describe()),
        "device": {name: value for name, value in mx.device_info().items() if name in DEVICE},
        "stack": {name: version for name in STACK if (version := _version(name))},
        "switches": [name for name in SWITCHES if name in os.environ],
        "findings": _seen(found),
    }


def rates() -> Found:
    """Bytes and operations a second."""
    from ring_mlx.bench.floor import measure_rates

    found = measure_rates()
    return {"bandwidth_gbps": found.bandwidth / 1e9, "matmul_tflops": found.matmul / 1e12, "of": found.matmul_dtype}


def kernels() -> Found:
    """Each operation's kernel against the plain form on small arrays."""
    from ring_mlx.doctor.kernels import check

    return {"findings": _seen(check())}


def operations() -> Found:
    """Each operation of mini's layers with our kernels and with MLX's operations: difference and times."""
    import mlx.core as mx

    from metal_kernels import launch
    from ring_mlx.bench.operations import cases, difference, measure
    from ring_mlx.bench.shapes import MINI
    from ring_mlx.model.config import RingConfig

    if launch.backend() is None:
        return {"skipped": "no backend runs kernels here"}
    rows = []
    for tokens in OPERATION_TOKENS:
        is_few = tokens < 64
        for name, call, x in cases(RingConfig.from_dict(MINI), tokens, 1, 4):
            row: Found = {"operation": name, "tokens": tokens}
            try:
                row["difference"] = difference(call, x)
                plain, ours = measure(call, x, CALLS if is_few else 2, 3, is_few)
                row |= {"mlx_us": plain, "ours_us": ours}
            except Exception as e:  # noqa: BLE001 whatever a compiler or a driver raises
                row["error"] = _said(e)
            rows.append(row)
            mx.clear_cache()
    return {"shape": "mini, 4 bits", "rows": rows}


def tuning() -> Found:
    """What the machine chooses for the toy, and for mini where it fits."""
    from ring_mlx.checkpoint.loading import demo_model_path
    from ring_mlx.doctor.buffers import model_of
    from ring_mlx.tuning import job, table
    from ring_mlx.tuning.race import Budget

    made = []
    for what in ({"folder": str(demo_model_path())}, _mini()):
        if "skipped" in what:
            continue
        model = model_of(what)
        found = job.tune(model, Budget(job.SECONDS))
        job.keep(model, found)
        made.append({"table": table.markdown(found), **found.as_dict()})
        del model
    return {"made": made}


def toy() -> Found:
    """`ring-mlx bench` with the packaged model."""
    from ring_mlx.bench.engines import Engine
    from ring_mlx.checkpoint.loading import demo_model_path, load_model
    from ring_mlx.checkpoint.regular_files import read_json

    folder = demo_model_path()
    return _bench(lambda: (load_model(folder), read_json(folder / "config.json"), "the packaged toy"), Engine)


def mini() -> Found:
    """The same with random weights at mini's shapes, or some of its layers."""
    from ring_mlx.bench.engines import Engine
    from ring_mlx.bench.shapes import MINI, cut
    from ring_mlx.doctor.buffers import model_of

    what = _mini()
    if "skipped" in what:
        return what
    name = f"mini, random 4-bit weights, {what['layers']} of {LAYERS[0]} layers"
    return _bench(lambda: (model_of(what), cut(MINI, what["layers"]), name), Engine)


def proofs() -> Found:
    """The verdicts on all kernels that the other parts launched."""
    from metal_kernels import launch

    where = launch.backend()
    if where is None or where.ledger is None:
        return {"skipped": "no backend runs kernels here"}
    return {"entries": where.ledger.entries()}


PARTS = {
    "machine": Part("chip, system, versions", 60, machine),
    "rates": Part("memory bandwidth and product rate", 60, rates),
    "kernels": Part("kernels against plain forms", 240, kernels),
    "operations": Part("kernels against MLX's operations", 300, operations),
    "tuning": Part("what is fast here", 240, tuning),
    "toy": Part("speed of the packaged toy", 240, toy),
    "mini": Part("speed of random weights at mini's shapes", 300, mini),
    "proofs": Part("verdicts on all kernels", 30, proofs),
}


def _mini() -> Found:
    """As `buffers.model_of` takes it: as many of mini's layers as fit, or why not."""
    import mlx.core as mx

    from ring_mlx.bench.shapes import MINI, cut
    from ring_mlx.model.config import RingConfig
    from ring_mlx.system import macos, memory

    if mx.default_device() == mx.cpu:
        return {"skipped": "no GPU: random weights at mini's shapes would take minutes"}
    left = macos.available_bytes()
    room = min(memory.budget_bytes(), memory.budget_bytes() if left is None else left)
    for layers in LAYERS:
        config = RingConfig.from_dict(cut(MINI, layers))
        needed = int(memory.parameter_count(config) * 4.5 / 8) + memory.extra_bytes(config)
        if needed <= room:
            return {"random": "mini", "layers": layers}
    return {"skipped": f"{LAYERS[-1]} layers of mini need {needed / 1e9:.1f} GB, and there are {room / 1e9:.1f} GB"}


def _bench(make: Callable[[], Any], engine: Any) -> Found:
    import mlx.core as mx

    from ring_mlx.bench import job, report
    from ring_mlx.bench.dispatches import count_decode_step
    from ring_mlx.bench.engines import OURS
    from ring_mlx.bench.settings import Settings
    from ring_mlx.generation.decoding import prefill_step_or_default

    kept: list[Any] = []

    def kept_make() -> Any:
        kept.append(make())
        return kept[0]

    contexts = CPU_CONTEXTS if mx.default_device() == mx.cpu else CONTEXTS
    settings = Settings(contexts, GENERATE, REPEATS, prefill_step_size=prefill_step_or_default(), floor=True)
    result = job.bench(kept_make, settings, job.Files(), say=lambda line: None)
    model = kept[0][0]
    counts = count_decode_step(engine(OURS, model), model.config.vocab_size)
    _try_shapes(model)
    table = report.markdown_table(result.columns, result.rows)
    rows = [{k: v for k, v in row.items() if k not in result.head} for row in result.rows]
    return {"head": _undated(result.head), "rows": rows, "table": table, "dispatches": dict(counts)}


def _seen(findings: Sequence[Finding]) -> list[Found]:
    """Without remedies, which are for this user and name folders."""
    return [{k: v for k, v in asdict(f).items() if k != "remedy"} for f in findings]


def _undated(head: Found) -> Found:
    """Without a time of day, which tells where on earth somebody is."""
    return {k: v for k, v in head.items() if k != "date"}


def _try_shapes(model: Any) -> None:
    """Launch what prompts and batches of every kind launch, so that there are verdicts on it."""
    import mlx.core as mx

    for rows, tokens in TRIED:
        cache = model.make_cache() if rows == 1 else model.make_cache([0] * rows)
        ids = mx.arange(rows * (tokens + 1)).reshape(rows, -1) % model.config.vocab_size
        mx.eval(model(ids[:, :-1], cache), model(ids[:, -1:], cache))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main(name: str, file: str) -> int:
    """Make a part and write what it found, or why not."""
    try:
        made: Found = {"found": PARTS[name].make()}
    except Exception as e:  # noqa: BLE001 a failure is a line of the report
        made = {"error": _said(e)}
    Path(file).write_text(json.dumps(made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
