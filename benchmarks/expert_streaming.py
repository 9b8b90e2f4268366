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
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from benchmarks.common import arguments, report
from ring_mlx import demo_model_path, load_model
from ring_mlx.bench.random_weights import random_model_of
from ring_mlx.bench.shapes import MINI
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.convert import convert
from ring_mlx.convert.report import read_text
from ring_mlx.experts.layout import find_experts
from ring_mlx.experts.slots import slot_bytes
from ring_mlx.generation.decoding import prefill
from ring_mlx.model.config import RingConfig, read_config

PROMPT_TOKENS = 16
STATES = ("warm", "cold", "starved")


def make(folder: Path, args: argparse.Namespace) -> Path:
    """A 4-bit checkpoint in the streamed layout."""
    layers, experts, hidden = args.layers, args.experts, args.hidden
    changes = {"num_hidden_layers": layers, "num_experts": experts, "hidden_size": hidden, "vocab_size": 512}
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": max(1, hidden // 512)}
    sizes = {"moe_intermediate_size": args.inner, "intermediate_size": 2 * hidden}
    raw = MINI | changes | heads | sizes | {"layer_group_size": min(5, layers), "torch_dtype": "bfloat16"}
    model = random_model_of(raw, "made-up", 4, 64, False, mx.bfloat16, 0)
    bias = {i: args.spread * mx.random.normal((experts,)) for i in range(layers) if model.config.is_moe(i)}
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
    tokenizer, ids = load_tokenizer(folder), []
    for row in read_text(None):
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
    """Speed of given tokens, and what was read for them."""
    model = load_model(folder, expert_cache_bytes=cache_bytes, expert_policy=policy)
    warm(folder) if state == "warm" else drop(folder)
    count = len(tokens) - PROMPT_TOKENS
    steps = prefill(mx.array(tokens), model, model.make_cache(), [PROMPT_TOKENS, *[1] * count], every_position=True)
    next(steps)
    if state == "cold":
        drop(folder)
    spent = 0.0
    for _ in range(count):
        if state == "starved":
            drop(folder)
        started = time.perf_counter()
        mx.eval(next(steps))
        spent += time.perf_counter() - started
    found = getattr(model, "expert_statistics", None)
    row = {"tps": count / spent, "wait_ms": 1000 * found.decode.wait_s / count if found else 0.0}
    return row | (found.as_dict() if found else {})


def fastest(repeats: int, *case: Any) -> dict[str, Any]:
    """The best of several runs."""
    tries = []
    for _ in range(repeats):
        tries.append(measure(*case))
        gc.collect()
        mx.clear_cache()
    return max(tries, key=lambda row: row["tps"])


def rows(args: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """One for each policy and size of the cache, then all experts in memory."""
    if args.model == "toy":
        folder = convert(demo_model_path(), scratch / "toy", expert_layout="streamed")
    else:
        folder = Path(args.model) if args.model else make(scratch, args)
    config: RingConfig = read_config(folder)[0]
    places = find_experts(folder, config)
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    sizes = [slot_bytes(p.parts, dtype) for p in places.values()]
    total = sum(size * len(p.experts) for size, p in zip(sizes, places.values(), strict=True))
    tokens = some_tokens(folder, args.tokens + PROMPT_TOKENS, args.model == "toy")
    least = max(sizes) * config.num_experts_per_tok * len(set(sizes))
    states = args.states.split(",")
    for policy in args.policies.split(","):
        for part in [float(p) for p in args.parts.split(",")] if policy != "none" else [0.0]:
            size = max(least, int(total * part))
            found = {state: fastest(args.repeats, folder, tokens, size, policy, state) for state in states}
            first = found[states[0]]
            row = {"cache MB": first["slot_bytes"] / 1e6, "of all": first["slot_bytes"] / total, "policy": policy}
            row |= {"hit rate": first["decode"]["hit_rate"], "MB a token": first["decode"]["bytes_per_token"] / 1e6}
            for state, seen in found.items():
                row |= {f"tok/s {state}": seen["tps"], f"ms waited {state}": seen["wait_ms"]}
            yield row
    speed = measure(folder, tokens, None, None, "warm")["tps"]
    yield dict.fromkeys(row) | {"cache MB": total / 1e6, "policy": "resident", f"tok/s {states[0]}": speed}


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
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
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        report(args, rows(args, Path(scratch)), args.model or f"{args.layers} layers of {args.experts} experts")


if __name__ == "__main__":
    main()
