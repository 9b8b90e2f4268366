"""Ours beside mlx-lm on the same random checkpoint: ``python -m benchmarks.against_mlx_lm``.

Prints how far mlx-lm's logits are from ours, which the goldens hold to 1e-4 of a float64 implementation, and both
speeds, taken in alternation within one run as medians after a warm-up. The checkpoint has the size of a golden, but
head_dim = hidden_size / heads: mlx-lm loads no other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_theirs

from benchmarks.shapes import SHAPES, random_model
from ring_mlx import load_model as load_ours

PREFILL_STEP = 512


def relative_rms(actual: mx.array, expected: mx.array) -> float:
    """sqrt(mean (a - e)^2 / mean e^2)."""
    return float(mx.sqrt(((actual - expected) ** 2).mean() / (expected**2).mean()))


def seconds(model: Any, prompt: mx.array, decode: int) -> tuple[float, float]:
    """Time to read the prompt in steps, and then for each of ``decode`` tokens."""
    cache = make_prompt_cache(model)
    started = time.perf_counter()
    for at in range(0, prompt.shape[1], PREFILL_STEP):
        logits = model(prompt[:, at : at + PREFILL_STEP], cache=cache)
        mx.eval(logits, [c.state for c in cache])
    read = time.perf_counter()
    for _ in range(decode):
        mx.eval(logits := model(mx.argmax(logits[:, -1:], axis=-1), cache=cache))
    return read - started, (time.perf_counter() - read) / decode


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = mx.device_info().get("device_name", platform.machine())
    print(f"{device}, Python {platform.python_version()}, mlx {mx.__version__}, mlx-lm {version('mlx-lm')}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        models = {"mlx-lm": load_theirs(folder)[0], "ours": load_ours(folder, dtype=mx.float32)}
        prompt = mx.random.randint(0, SHAPES["golden"]["vocab_size"], (1, args.prompt), key=mx.random.key(0))
        logits = {name: model(prompt) for name, model in models.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                result = seconds(model, prompt, args.decode)
                if repeat:
                    times[name].append(result)
    print(f"mlx-lm's logits differ from ours by {relative_rms(logits['mlx-lm'], logits['ours']):.3f} relative RMS")
    medians = {n: [statistics.median(t[i] for t in times[n]) for i in range(2)] for n in models}
    for name, (prefill, decode) in medians.items():
        print(f"{name:7} prefill {args.prompt / prefill:8.1f} tok/s, decode {1 / decode:7.1f} tok/s")
    ratios = [theirs / ours for theirs, ours in zip(medians["mlx-lm"], medians["ours"], strict=True)]
    print(f"ours is {ratios[0]:.1f} times as fast in prefill of {args.prompt} tokens and {ratios[1]:.2f} in decode")


def write(folder: Path) -> None:
    """A random checkpoint in the mlx-community form, float32."""
    model = random_model("golden", bits=None)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(SHAPES["golden"]))


if __name__ == "__main__":
    main()
