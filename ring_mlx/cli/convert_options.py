"""The options of ``ring-mlx convert``."""

from __future__ import annotations

import argparse

from ring_mlx import options
from ring_mlx.errors import OptionError
from ring_mlx.options import group_of

HELP = {
    "mlx_path": "folder to make (mlx_model)",
    "bits": "bits per weight (4, or the mode's own)",
    "group": "weights per scale (64, or the mode's own)",
    "predicate": "mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6, ring-q3, ring-q4, ring-q5, ring-q6, or a recipe.json",
    "size": "size of the result, such as 8.0GB: bits are chosen by module, where a text shows that they matter",
    "each": "the same, as bits a weight of the whole model, such as 4.25",
    "override": "'pattern=bits' or 'pattern=none' for modules whose path contains it; may be repeated",
    "fit": "round to nearest, or search the scales of least squared error, fast or long (fast)",
    "calibrate": "quantize each matrix for what a text puts into it, layer by layer: a packaged text, or FILE",
    "layout": "streamed: each expert's matrices side by side, so that they can be read on demand (stacked)",
    "check": "find the decay from a minute's text; auto does so if config.json has none and the source can be loaded (auto)",
    "dry": "print size, time, memory and bits per weight of each part; fetch no shard and write nothing",
    "stream": "fetch the shards of a repository one by one and delete each after use",
    "report": "compare the result with the source on a packaged text, or on FILE",
}


def add(parser: argparse.ArgumentParser) -> None:
    m = group_of(parser, "model")
    m.add_argument("--hf-path", "--model", metavar="MODEL", dest="source", help="folder, or owner/name on the hub")
    m.add_argument("--revision", help="branch, tag or commit of a hub repository")
    m.add_argument("--mlx-path", default="mlx_model", help=HELP["mlx_path"])
    options.add_quiet_option(parser)
    q = parser.add_argument_group("weights")
    q.add_argument("-q", "--quantize", action="store_true", help="quantize the weights")
    q.add_argument("--q-bits", dest="bits", type=options.positive_int, help=HELP["bits"])
    q.add_argument("--q-group-size", dest="group_size", type=options.positive_int, help=HELP["group"])
    q.add_argument(
        "--q-mode",
        dest="mode",
        choices=("affine", "mxfp4", "mxfp8", "nvfp4"),
        default="affine",
        help="quantized format (affine)",
    )
    q.add_argument("--quant-predicate", dest="recipe", metavar="RECIPE", help=HELP["predicate"])
    target = q.add_mutually_exclusive_group()
    target.add_argument(
        "--target-size", dest="target_bytes", metavar="SIZE", type=options.byte_count, help=HELP["size"]
    )
    target.add_argument("--target-bits", type=options.in_range(1, 32), metavar="BITS", help=HELP["each"])
    q.add_argument(
        "--q-override", dest="overrides", action="append", default=[], metavar="PATTERN=BITS", help=HELP["override"]
    )
    q.add_argument("--q-fit", dest="fit", choices=("rtn", "fast", "best"), help=HELP["fit"])
    q.add_argument("--calibrate", nargs="?", const="", metavar="FILE", help=HELP["calibrate"])
    q.add_argument("-d", "--dequantize", action="store_true", help="store everything in float")
    q.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="dtype of weights in float")
    q.add_argument("--expert-layout", choices=("stacked", "streamed"), default="stacked", help=HELP["layout"])
    options.add_decay_option(q, "to write to config.json (the source's)")
    q.add_argument("--check-decay", choices=("auto", "always", "never"), default="auto", help=HELP["check"])
    w = parser.add_argument_group("how to convert")
    w.add_argument("--dry-run", action="store_true", help=HELP["dry"])
    w.add_argument("--resume", action="store_true", help="go on with an interrupted conversion, or start one")
    w.add_argument("--stream", action="store_true", help=HELP["stream"])
    w.add_argument("--verify", action="store_true", help="check the hashes of the result, or of an earlier one")
    w.add_argument("--report", nargs="?", const="", metavar="FILE", help=HELP["report"])
    w.add_argument("--upload-repo", metavar="OWNER/NAME", help="repository to upload the result to")


def check(args: argparse.Namespace) -> None:
    """Raises OptionError for options that exclude each other."""
    if args.source is None and not args.verify:
        raise OptionError("--hf-path (or --model) is missing; name a folder, or owner/name on the hub.")
    if args.source is None and (args.report is not None or args.dry_run):
        raise OptionError("--report and --dry-run need the source; add --model.")
    if args.check_decay == "always" and args.decay_layer_offset is not None:
        raise OptionError("--check-decay always and --decay-layer-offset contradict each other; give one.")
    if args.fit is not None and not args.quantize:
        raise OptionError("--q-fit needs --quantize; add -q.")
