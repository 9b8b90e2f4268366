"""``ring-mlx convert``: a checkpoint to the mlx-community form, quantised or not."""

from __future__ import annotations

import argparse
from typing import Any

from ring_mlx.cli import options
from ring_mlx.errors import OptionError


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "convert", help="convert and quantise a checkpoint", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--hf-path", "--model", dest="source", required=True, help="folder, or owner/name on the hub")
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument("--mlx-path", default="mlx_model", help="folder to make (mlx_model)")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise")
    parser.add_argument("--q-bits", type=options.positive_int, default=4, help="bits a weight (4)")
    parser.add_argument("--q-group-size", type=options.positive_int, default=64, help="weights a scale (64)")
    parser.add_argument("--q-mode", choices=("affine", "mxfp4", "mxfp8"), default="affine", help="format (affine)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="of what is not quantised")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert and say what was written; returns the exit code."""
    import mlx.core as mx

    from ring_mlx.convert import convert, describe

    if args.q_mode != "affine" and not args.quantize:
        raise OptionError(f"--q-mode {args.q_mode} needs --quantize; add -q.")
    folder = convert(
        args.source,
        args.mlx_path,
        revision=args.revision,
        quantize=args.quantize,
        bits=args.q_bits,
        group_size=args.q_group_size,
        mode=args.q_mode,
        dtype=getattr(mx, args.dtype) if args.dtype else None,
    )
    print(describe(folder))
    return 0
