"""``ring-mlx bench``: how fast a model runs here, compared with mlx-lm and with what the machine could do."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ring_mlx import options
from ring_mlx.bench import run as benchmark
from ring_mlx.bench import shapes
from ring_mlx.bench.config import ALONE, BenchConfig, BenchError, Ranks
from ring_mlx.bench.random_weights import empty_model, plain_dtype, random_model_of, random_sharded
from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.loading import demo_model_path, load_model
from ring_mlx.cli import from_options
from ring_mlx.cli.bench_options import UNQUANTIZED
from ring_mlx.cli.progress import bar_of
from ring_mlx.distributed.group import greatest, of_first
from ring_mlx.distributed.loading import load_sharded
from ring_mlx.distributed.rank import Rank, joined
from ring_mlx.model.config import RingConfig, read_config, with_decay_offset
from ring_mlx.model.model import Model
from ring_mlx.system.terminal_text import beside_bars, for_output, note
from ring_mlx.tuning.autotune import settle


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code."""
    with joined(args.distributed) as rank:
        return _bench(args, rank)


def _bench(args: argparse.Namespace, rank: Rank | None) -> int:
    def make() -> tuple[Model, dict[str, Any], str]:
        return _random(args, rank) if args.random is not None else _checkpoint(args, rank)

    ranks = ALONE
    if rank is not None:
        rank.check(args)
        ranks = _ranks(rank)
    is_writer = rank is None or rank.is_first
    files = benchmark.Files(args.csv, args.json, args.markdown, args.plot) if is_writer else benchmark.Files()
    with bar_of(args, "bench", "runs", is_writer) as bar:
        benchmark.bench(
            make,
            settings_of(args),
            files,
            ops=args.ops,
            expert_cache_bytes=args.expert_cache_bytes,
            ranks=ranks,
            say=_say,
            progress=bar,
        )
    return 0


def _ranks(rank: Rank) -> Ranks:
    group = rank.group
    highest, agree = partial(greatest, group=group), partial(of_first, group=group)
    return Ranks(group.size(), lambda: rank.mode, highest, agree, rank.together)


def _say(text: str) -> None:
    with beside_bars():
        print(for_output(text), flush=True)


def settings_of(args: argparse.Namespace) -> BenchConfig:
    return BenchConfig(
        contexts=args.prompt_tokens,
        generate=args.generate,
        repeats=args.repeats,
        batch_sizes=args.batch_size,
        prefill_step_size=args.prefill_step_size or 0,
        vs=args.vs is not None,
        vs_repeats=min(args.vs_repeats or 3, args.repeats),
        vs_max_prefill=args.vs_max_prefill,
        floor=args.floor,
        seed=args.seed,
    )


def _random(args: argparse.Namespace, rank: Rank | None) -> tuple[Model, dict[str, Any], str]:
    whole = shapes.SHAPES[args.random]
    if (args.layers or 0) > whole["num_hidden_layers"]:
        raise BenchError(
            f"--layers {args.layers} is more than the {whole['num_hidden_layers']} of {args.random}; give fewer."
        )
    bits = args.bits or (UNQUANTIZED if args.random == "golden" else 4)
    if args.random == "golden" and bits != UNQUANTIZED:
        raise BenchError(f"golden is too narrow for --bits {bits}; leave --bits out.")
    raw = with_decay_offset(shapes.cut(whole, args.layers), args.decay_layer_offset)
    packed = None if bits == UNQUANTIZED else bits
    dtype = plain_dtype(args.random)
    if rank is None:
        model = random_model_of(raw, args.random, packed, 64, args.exact, dtype, args.seed)
        settle(model)
    else:
        make = partial(empty_model, RingConfig.from_dict(raw), packed, 64, args.exact)
        model = rank.share(partial(random_sharded, make=make, name=args.random, dtype=dtype, seed=args.seed))
    name = f"{args.random}, random {'unquantized' if bits == UNQUANTIZED else f'{bits}-bit'} weights"
    if args.layers is not None:
        name += f", {args.layers} of {whole['num_hidden_layers']} layers"
    return model, raw, name + _how(args)


def _checkpoint(args: argparse.Namespace, rank: Rank | None) -> tuple[Model, dict[str, Any], str]:
    if args.model is None and (rank is None or rank.is_first):
        note(from_options.TOY_NOTE)
    name = args.model or "the packaged toy"
    if rank is not None:
        with rank.together():
            folder = resolve_model(args.model or str(demo_model_path()), args.revision)
        model = rank.share(partial(load_sharded, folder, exact=args.exact, decay_layer_offset=args.decay_layer_offset))
        return model, read_config(folder)[1], name + _how(args)
    folder = from_options.find_model(args, args.model or str(demo_model_path()))
    with bar_of(args, "loading the model") as bar:
        model = load_model(folder, progress=bar, **options.loading_options(args))
    if args.expert_cache_bytes is not None:
        name += f", experts in {args.expert_cache_bytes / 1e9:.3g} GB"
    if args.adapter_path is not None:
        name += f" with {Path(args.adapter_path).name}"
    return model, read_config(folder)[1], name + _how(args)


def _how(args: argparse.Namespace) -> str:
    offset = args.decay_layer_offset
    return (", exact" if args.exact else "") + (f", decay_layer_offset {offset}" if offset is not None else "")
