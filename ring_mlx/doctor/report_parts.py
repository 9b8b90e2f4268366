"""The parts of ``ring-mlx doctor --report``; each returns its findings as JSON.

Each runs in a process of its own (`python -m ring_mlx.doctor.report_parts PART FILE`), so that a hang of the GPU or a
crash of its driver costs one part. All share a folder for proofs and choices that is empty at first.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels import launch
from ring_mlx.bench import operations as timed
from ring_mlx.bench import run as benchmark
from ring_mlx.bench.config import BenchConfig
from ring_mlx.bench.dispatches import count_decode_step
from ring_mlx.bench.engines import OURS, Engine
from ring_mlx.bench.floor import measure_rates
from ring_mlx.bench.machine import describe
from ring_mlx.bench.report import markdown_table
from ring_mlx.bench.shapes import MINI, cut
from ring_mlx.checkpoint.loading import demo_model_path, load_model
from ring_mlx.doctor import kernels as tried
from ring_mlx.doctor import machine as this_machine
from ring_mlx.doctor import tuning as kept_choices
from ring_mlx.doctor import versions
from ring_mlx.doctor.finding import Finding
from ring_mlx.doctor.tuning import model_of
from ring_mlx.generation.decoding import prefill_step_or_default
from ring_mlx.model import memory
from ring_mlx.model.config import RingConfig
from ring_mlx.system import macos
from ring_mlx.system.install import version_of
from ring_mlx.system.regular_files import read_json
from ring_mlx.tuning import autotune, table
from ring_mlx.tuning.race import Budget

Found = dict[str, Any]
STACK = (
    *("ring-mlx", "mlx", "mlx-metal", "mlx-cuda-13", "mlx-cpu", "mlx-lm"),
    *("numpy", "transformers", "safetensors", "textual"),
)
# From MLX's description of the device, without the card's serial number on CUDA.
DEVICE = ("architecture", "max_buffer_length", "max_recommended_working_set_size", "memory_size", "resource_limit")
# Whether they are set changes what is measured; their values are private.
SWITCHES = ("RING_MLX_KERNELS", "RING_MLX_TUNE", "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
CONTEXTS, CPU_CONTEXTS, GENERATE, REPEATS = (512, 2048), (128, 512), 64, 2
OPERATION_TOKENS, CALLS = (1, 4, 512), 16
# Of --random mini: all layers, or as many groups of them as fit.
LAYERS = (20, 10, 5)
# Rows and tokens with which every kind of kernel is tried: a prompt of some length, single tokens, few, batches.
TRIED = ((1, 1), (1, 2), (1, 3), (1, 5), (1, 8), (1, 9), (1, 70), (1, 600), (3, 1), (3, 64))


def machine() -> Found:
    """Chip, system, memory, versions, and what was chosen here before."""
    found = [f for f in versions.check() if f.name != "Python"] + this_machine.check() + kept_choices.check()
    return {
        "on": _undated(describe()),
        "device": {name: value for name, value in mx.device_info().items() if name in DEVICE},
        "stack": {name: version for name in STACK if (version := version_of(name))},
        "switches": [name for name in SWITCHES if name in os.environ],
        "findings": _seen(found),
    }


def rates() -> Found:
    found = measure_rates()
    return {"bandwidth_gbps": found.bandwidth / 1e9, "matmul_tflops": found.matmul / 1e12, "of": found.matmul_dtype}


def kernels() -> Found:
    """Each operation's kernel against the plain form on small arrays."""
    return {"findings": _seen(tried.check())}


def operations() -> Found:
    """Each operation of mini's layers with our kernels and with MLX's operations: difference and times."""
    if launch.backend() is None:
        return {"skipped": "no backend runs kernels here"}
    rows = []
    for tokens in OPERATION_TOKENS:
        is_few = tokens < 64
        for name, call, x in timed.cases(RingConfig.from_dict(MINI), tokens, 1, 4):
            row: Found = {"operation": name, "tokens": tokens}
            try:
                row["difference"] = timed.difference(call, x)
                plain, ours = timed.measure(call, x, CALLS if is_few else 2, 3, is_few)
                row |= {"mlx_us": plain, "ours_us": ours}
            except Exception as e:  # noqa: BLE001 whatever a compiler or a driver raises
                row["error"] = _said(e)
            rows.append(row)
            mx.clear_cache()
    return {"shape": "mini, 4 bits", "rows": rows}


def tuning() -> Found:
    """What the machine chooses for the toy, and for mini where it fits."""
    made = []
    for what in ({"folder": str(demo_model_path())}, _mini()):
        if "skipped" in what:
            continue
        model = model_of(what)
        found = autotune.tune(model, Budget(autotune.SECONDS))
        autotune.keep(model, found)
        made.append({"table": table.markdown(found), **found.as_dict()})
        del model
    return {"made": made}


def toy() -> Found:
    """`ring-mlx bench` with the packaged model."""
    folder = demo_model_path()
    return _bench(lambda: (load_model(folder), read_json(folder / "config.json"), "the packaged toy"))


def mini() -> Found:
    """The same with random weights at mini's shapes, or some of its layers."""
    what = _mini()
    if "skipped" in what:
        return what
    name = f"mini, random 4-bit weights, {what['layers']} of {LAYERS[0]} layers"
    return _bench(lambda: (model_of(what), cut(MINI, what["layers"]), name))


def proofs() -> Found:
    """The verdicts on all kernels that the other parts launched."""
    where = launch.backend()
    if where is None or where.ledger is None:
        return {"skipped": "no backend runs kernels here"}
    return {"entries": where.ledger.entries()}


MAKE = {part.__name__: part for part in (machine, rates, kernels, operations, tuning, toy, mini, proofs)}


def _mini() -> Found:
    """As `ring_mlx.doctor.tuning.model_of` takes it: as many of mini's layers as fit, or why not."""
    if mx.default_device() == mx.cpu:
        return {"skipped": "no GPU: random weights at mini's shapes would take minutes"}
    left = macos.available_bytes()
    room = min(memory.budget_bytes(), memory.budget_bytes() if left is None else left)
    for layers in LAYERS:
        config = RingConfig.from_dict(cut(MINI, layers))
        needed = memory.size_in_bits(config, 4) + memory.extra_bytes(config)
        if needed <= room:
            return {"random": "mini", "layers": layers}
    return {"skipped": f"{LAYERS[-1]} layers of mini need {needed / 1e9:.1f} GB, and there are {room / 1e9:.1f} GB"}


def _bench(make: Callable[[], Any]) -> Found:
    made = make()
    contexts = CPU_CONTEXTS if mx.default_device() == mx.cpu else CONTEXTS
    settings = BenchConfig(contexts, GENERATE, REPEATS, prefill_step_size=prefill_step_or_default(), floor=True)
    result = benchmark.bench(lambda: made, settings, benchmark.Files(), say=lambda line: None)
    model = made[0]
    counts = count_decode_step(Engine(OURS, model), model.config.vocab_size)
    _try_shapes(model)
    rows = [{k: v for k, v in row.items() if k not in result.head} for row in result.rows]
    shown = markdown_table(result.columns, result.rows)
    return {"head": _undated(result.head), "rows": rows, "table": shown, "dispatches": dict(counts)}


def _seen(findings: Sequence[Finding]) -> list[Found]:
    """Without remedies, which name folders of this user."""
    return [{k: v for k, v in asdict(f).items() if k != "remedy"} for f in findings]


def _undated(head: Found) -> Found:
    """Without the time of day, which tells where somebody lives."""
    return {k: v for k, v in head.items() if k != "date"}


def _try_shapes(model: Any) -> None:
    """Launch the kernels of prompts and batches of every kind, so that there are verdicts on them."""
    for rows, tokens in TRIED:
        cache = model.make_cache() if rows == 1 else model.make_cache([0] * rows)
        ids = mx.arange(rows * (tokens + 1)).reshape(rows, -1) % model.config.vocab_size
        mx.eval(model(ids[:, :-1], cache), model(ids[:, -1:], cache))


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main(name: str, file: str) -> int:
    """Make a part and write what it found, or why not."""
    try:
        made: Found = {"found": MAKE[name]()}
    except Exception as e:  # noqa: BLE001 a failure is a line of the report
        made = {"error": _said(e)}
    Path(file).write_text(json.dumps(made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
