"""``ring-mlx bench``: how fast a model runs here, beside mlx-lm and beside what the machine could do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_mlx.bench.settings import BenchError, Settings
from ring_mlx.cli import options
from ring_mlx.cli.parsing import add_command, group_of
from ring_mlx.cli.progress import bar_of
from ring_mlx.distributed.member import joined
from ring_mlx.terminal_text import beside_bars, for_output, note

if TYPE_CHECKING:
    from ring_mlx.distributed.member import Member
    from ring_mlx.model import Model

# What does not go together with experts on disk, and why.
NO_STREAMED = {
    "random": "experts are read from a checkpoint's files, and random weights have none",
    "vs": "mlx-lm would need all experts in memory",
    "floor": "the rate of the disk is not measured",
    "ops": "a layer waits for its experts, so there is no graph of a whole step",
}
UNQUANTISED = 16
HELP = {
    "random": "random weights at the shapes of this model (golden is tiny) instead of a checkpoint",
    "bits": "bits of --random (4); 16 leaves the weights in bfloat16",
    "layers": "so many layers instead of the model's own, with --random",
    "prompt": "prompt tokens, several with commas (512,2048,8192, as far as the context goes)",
    "csv": "append a row for each cell, with a header if the file is new",
    "vs_max": "longest prompt that mlx-lm reads itself, a token at a time; longer ones it gets read (2048)",
    "floor": "measure bandwidth and matmul rate, and print our share of what they allow",
    "ops": "count the dispatches of a decode step by primitive",
}


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "bench",
        "speed and memory",
        "How fast a model runs here, beside mlx-lm and beside what the machine could do.",
        "ring-mlx bench -p 512 -g 32 -n 2",
    )
    options.add_model_options(parser)
    r = group_of(parser, "model")
    r.add_argument("--random", choices=options.RANDOM_SHAPES, help=HELP["random"])
    r.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8, UNQUANTISED), help=HELP["bits"])
    r.add_argument("--layers", type=options.positive_int, help=HELP["layers"])
    options.add_expert_options(parser)
    options.add_distributed_option(parser)
    m = parser.add_argument_group("what is measured")
    m.add_argument("-p", "--prompt-tokens", type=counts, metavar="N,N", help=HELP["prompt"])
    m.add_argument("-g", "--generate", type=options.positive_int, default=128, help="tokens after the first (128)")
    m.add_argument("-n", "--repeats", type=options.positive_int, default=5, help="after one warm-up (5)")
    m.add_argument("--batch-size", type=counts, default=(1,), metavar="N,N", help="rows of equal length (1)")
    m.add_argument("--prefill-step-size", type=options.positive_int, help=options.STEP_HELP)
    m.add_argument("--vs", choices=("mlx-lm",), help="also run stock mlx-lm on the same weights, in alternation")
    m.add_argument("--vs-max-prefill", type=options.natural_int, default=2048, metavar="T", help=HELP["vs_max"])
    m.add_argument("--vs-repeats", type=options.positive_int, help="repetitions of mlx-lm (-n, but at most 3)")
    m.add_argument("--floor", action="store_true", help=HELP["floor"])
    m.add_argument("--ops", action="store_true", help=HELP["ops"])
    m.add_argument("--seed", type=options.natural_int, default=0, help="of prompts and random weights (0)")
    options.add_quiet_option(parser)
    f = parser.add_argument_group("files")
    f.add_argument("--csv", type=Path, help=HELP["csv"])
    f.add_argument("--json", type=Path, help="write one JSON object")
    f.add_argument("--markdown", type=Path, help="write a Markdown table")
    f.add_argument("--plot", type=Path, help="write a PNG of speed against context; needs matplotlib")
    parser.set_defaults(run=run)


def counts(text: str) -> tuple[int, ...]:
    """An argparse type: positive integers with commas between them."""
    try:
        return tuple(options.positive_int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 512,2048") from None


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code."""
    if args.random is not None and (args.model is not None or args.revision is not None):
        raise BenchError("--random makes its own weights; leave --model and --revision out, or --random.")
    if args.random is None and (args.bits is not None or args.layers is not None):
        raise BenchError("--bits and --layers shape random weights; add --random mini or --random flash.")
    for flag, value in (("--random", args.random), ("--vs", args.vs)):
        if args.adapter_path is not None and value is not None:
            raise BenchError(f"--adapter-path does not work with {flag} {value}; leave one of them out.")
    if options.loading_options(args)["expert_cache_bytes"] is not None:
        _check_experts(args)
    with joined(args.distributed) as member:
        return _bench(args, member)


def _bench(args: argparse.Namespace, member: Member | None) -> int:
    from ring_mlx.bench import job
    from ring_mlx.bench.company import ALONE

    def make() -> tuple[Model, dict[str, Any], str]:
        return _random(args, member) if args.random is not None else _checkpoint(args, member)

    company = ALONE
    if member is not None:
        member.check(args)
        company = member.company()
    is_writer = member is None or member.is_first
    files = job.Files(args.csv, args.json, args.markdown, args.plot) if is_writer else job.Files()
    with bar_of(args, "bench", "runs", is_writer) as bar:
        job.bench(
            make,
            settings_of(args),
            files,
            ops=args.ops,
            expert_cache_bytes=args.expert_cache_bytes,
            company=company,
            say=_say,
            progress=bar,
        )
    return 0


def _say(text: str) -> None:
    with beside_bars():
        print(for_output(text), flush=True)


def _check_experts(args: argparse.Namespace) -> None:
    """Raises BenchError where experts on disk do not suit the other options."""
    for name, reason in NO_STREAMED.items():
        if getattr(args, name):
            raise BenchError(f"--{name} does not work with --expert-cache-bytes: {reason}; leave one of them out.")


def settings_of(args: argparse.Namespace) -> Settings:
    """The numbers among the options."""
    return Settings(
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


def _random(args: argparse.Namespace, member: Member | None) -> tuple[Model, dict[str, Any], str]:
    from ring_mlx.bench import shapes
    from ring_mlx.bench.random_weights import plain_dtype, random_model_of
    from ring_mlx.config import with_decay_offset
    from ring_mlx.tuning.job import settle

    whole = shapes.SHAPES[args.random]
    if (args.layers or 0) > whole["num_hidden_layers"]:
        raise BenchError(f"--layers {args.layers} is more than the {whole['num_hidden_layers']} of {args.random}.")
    bits = args.bits or (UNQUANTISED if args.random == "golden" else 4)
    if args.random == "golden" and bits != UNQUANTISED:
        raise BenchError(f"golden is too narrow for --bits {bits}; leave --bits out.")
    raw = with_decay_offset(shapes.cut(whole, args.layers), args.decay_layer_offset)
    packed = None if bits == UNQUANTISED else bits
    dtype = plain_dtype(args.random)
    if member is None:
        model = random_model_of(raw, args.random, packed, 64, args.exact, dtype, args.seed)
        settle(model)
    else:
        model = member.draw(raw, args.random, packed, dtype, args.exact, args.seed)
    name = f"{args.random}, random {'unquantised' if bits == UNQUANTISED else f'{bits}-bit'} weights"
    if args.layers is not None:
        name += f", {args.layers} of {whole['num_hidden_layers']} layers"
    return model, raw, name + _how(args)


def _checkpoint(args: argparse.Namespace, member: Member | None) -> tuple[Model, dict[str, Any], str]:
    from ring_mlx.config import read_config
    from ring_mlx.hub import resolve_model
    from ring_mlx.loading import demo_model_path, load_model

    if args.model is None and (member is None or member.is_first):
        note(options.TOY_NOTE)
    name = args.model or "the packaged toy"
    if member is not None:
        with member.together():
            folder = resolve_model(args.model or str(demo_model_path()), args.revision)
        model = member.load_folder(folder, args.exact, args.decay_layer_offset)
        return model, read_config(folder)[1], name + _how(args)
    folder = options.find_model(args, args.model or str(demo_model_path()))
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
