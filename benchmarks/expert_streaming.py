"""Experts on disk: hit rate and speed against cache size and policy: ``python -m benchmarks.expert_streaming``.

Tokens are given, one at a time, after a short prompt, so every row of the table reads the same experts. What the
operating system caches of the files is varied too: "warm" has read them all before, "cold" has dropped them once after
the prompt, "starved" drops them before every token, as if no memory were left for a page cache.

Without --model a checkpoint is made up, whose routers favour some experts as ``--spread`` says. For hit rates that mean
something give a trained model: ``--model toy`` is the packaged one, over the text of ``convert --report``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ring_mlx import demo_model_path, load_model
from ring_mlx.bench.random_weights import random_model_of
from ring_mlx.bench.shapes import MINI
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.convert import convert
from ring_mlx.experts.layout import find_experts
from ring_mlx.experts.slots import slot_bytes
from ring_mlx.model.config import RingConfig, read_config

PROMPT_TOKENS = 16
STATES = ("warm", "cold", "starved")


def make(folder: Path, layers: int, experts: int, hidden: int, inner: int, spread: float) -> Path:
    """A 4-bit checkpoint in the streamed layout."""
    changes = {"num_hidden_layers": layers, "num_experts": experts, "hidden_size": hidden, "vocab_size": 512}
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": max(1, hidden // 512)}
    sizes = {"moe_intermediate_size": inner, "intermediate_size": 2 * hidden}
    raw = MINI | changes | heads | sizes | {"layer_group_size": min(5, layers), "torch_dtype": "bfloat16"}
    model = random_model_of(raw, "made-up", 4, 64, False, mx.bfloat16, 0)
    bias = {i: spread * mx.random.normal((experts,)) for i in range(layers) if model.config.is_moe(i)}
    for i, values in bias.items():
        model.layers[i].mlp.gate.expert_bias = values
    plain = folder / "plain"
    plain.mkdir()
    mx.save_safetensors(str(plain / "model.safetensors"), dict(tree_flatten(model.parameters())))
    quantization = {"group_size": 64, "bits": 4, "mode": "affine"}
    quantization |= {f"model.layers.{i}.mlp.gate.gate_proj": False for i in bias}
    (plain / "config.json").write_text(json.dumps(raw | {"quantization": quantization}))
    return convert(plain, folder / "streamed", expert_layout="streamed")


def some_tokens(folder: Path, count: int, is_toy: bool) -> list[int]:
    """Of the packaged text, or at random."""
    config, _ = read_config(folder)
    if not is_toy:
        return [int(i) for i in np.random.default_rng(0).integers(0, config.vocab_size, count)]
    from ring_mlx.convert import report

    tokenizer, ids = load_tokenizer(folder), []
    for row in report.read_text(None):
        text = row.get("text") or "\n".join(m["content"] for m in row["messages"])
        ids += [int(i) for i in tokenizer.encode(text)]
    return ids[:count]


def drop(folder: Path) -> None:
    """Let the operating system forget the files."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm(folder: Path) -> None:
    """Read the files."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as f:
            while f.read(1 << 22):
                pass


def measure(folder: Path, tokens: list[int], cache_bytes: int | None, policy: str | None, state: str) -> dict[str, Any]:
    """One row."""
    model = load_model(folder, expert_cache_bytes=cache_bytes, expert_policy=policy)
    warm(folder) if state == "warm" else drop(folder)
    cache = model.make_cache()
    mx.eval(model(mx.array([tokens[:PROMPT_TOKENS]]), cache, last_only=True))
    mx.eval([c.state for c in cache])
    if state == "cold":
        drop(folder)
    spent = 0.0
    for token in tokens[PROMPT_TOKENS:]:
        if state == "starved":
            drop(folder)
        started = time.perf_counter()
        mx.eval(model(mx.array([[token]]), cache))
        spent += time.perf_counter() - started
    found = getattr(model, "expert_statistics", None)
    count = len(tokens) - PROMPT_TOKENS
    row = {"tps": count / spent, "wait_ms": 1000 * found.decode.wait_s / count if found else 0.0}
    return row | (found.as_dict() if found else {})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a converted folder, or toy")
    parser.add_argument("--parts", default="0.05,0.1,0.25,0.5,1", help="cache sizes, as parts of all routed experts")
    parser.add_argument("--policies", default="lfu,none")
    parser.add_argument("--states", default=",".join(STATES) if hasattr(os, "posix_fadvise") else "warm")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2, help="of which the fastest counts (2)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--spread", type=float, default=0.1, help="deviation of the made-up expert_bias")
    args = parser.parse_args()
    print(f"MLX {mx.__version__}, {mx.default_device()}, Python {platform.python_version()}, {platform.platform()}")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        if args.model == "toy":
            folder = convert(demo_model_path(), Path(scratch) / "toy", expert_layout="streamed")
        elif args.model:
            folder = Path(args.model)
        else:
            folder = make(Path(scratch), args.layers, args.experts, args.hidden, args.inner, args.spread)
        _table(folder, args)


def _table(folder: Path, args: argparse.Namespace) -> None:
    config: RingConfig = read_config(folder)[0]
    places = find_experts(folder, config)
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    sizes = [slot_bytes(p.parts, dtype) for p in places.values()]
    total = sum(size * len(p.experts) for size, p in zip(sizes, places.values(), strict=True))
    tokens = some_tokens(folder, args.tokens + PROMPT_TOKENS, args.model == "toy")
    print(
        f"{len(places)} layers of {config.num_experts} experts of {max(sizes) / 1e6:.3f} MB, {total / 1e6:.0f} MB in all"
    )
    print(
        f"| cache | policy | hit rate | MB read a token | {' | '.join(f'tok/s (ms waited), {s}' for s in args.states.split(','))} |"
    )
    print(f"|---|---|---:|---:|{'---:|' * len(args.states.split(','))}")
    least = max(sizes) * config.num_experts_per_tok * len(set(sizes))
    for policy in args.policies.split(","):
        for part in [float(p) for p in args.parts.split(",")] if policy != "none" else [0.0]:
            size = max(least, int(total * part))
            rows = []
            for state in args.states.split(","):
                tries = []
                for _ in range(args.repeats):
                    tries.append(measure(folder, tokens, size, policy, state))
                    gc.collect()
                    mx.clear_cache()
                rows.append(max(tries, key=lambda r: r["tps"]))
            c, held = rows[0]["decode"], rows[0]["slot_bytes"]
            speeds = " | ".join(f"{r['tps']:.1f} ({r['wait_ms']:.1f})" for r in rows)
            print(
                f"| {held / 1e6:.1f} MB ({100 * held / total:.0f} %) | {policy} | {100 * c['hit_rate']:.1f} % "
                f"| {c['bytes_per_token'] / 1e6:.2f} | {speeds} |",
                flush=True,
            )
    resident = measure(folder, tokens, None, None, "warm")
    print(f"| all | resident | | | {resident['tps']:.1f} |")


if __name__ == "__main__":
    main()
