"""``ring-mlx convert``: a checkpoint to the mlx-community form, quantised or not, checked, measured and uploaded."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from ring_mlx.cli import options
from ring_mlx.cli.exit_codes import INTERRUPTED
from ring_mlx.cli.parsing import add_command, group_of
from ring_mlx.cli.progress import bar_of
from ring_mlx.errors import OptionError
from ring_mlx.terminal_text import for_output, note

if TYPE_CHECKING:
    from pathlib import Path

    from ring_mlx.convert.job import Options

HELP = {
    "mlx_path": "folder to make (mlx_model)",
    "bits": "bits a weight (4; what the mode has)",
    "group": "weights a scale (64; what the mode has)",
    "predicate": "mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6, or ring-q3, ring-q4, ring-q5, ring-q6",
    "override": "'pattern=bits' or 'pattern=none' for modules whose path contains it; may be given again",
    "fit": "search the scales of least squared error, or round to nearest (search)",
    "layout": "streamed: each expert's matrices side by side, to be read on demand (stacked)",
    "check": "find it on the source by a minute's text: where config.json says nothing and it can be loaded (auto)",
    "dry": "print size, memory and bits per weight per part; fetches no shard and writes nothing",
    "stream": "fetch the shards of a repository one by one and drop each after use",
    "report": "compare the result with the source on a packaged text, or on FILE",
}


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "convert",
        "convert and quantise a checkpoint",
        "A checkpoint to the mlx-community form, quantised or not, checked, measured and uploaded.",
        "ring-mlx convert --model inclusionAI/Ring-mini-linear-2.0 --mlx-path ring-mini-q4 -q --quant-predicate ring-q4",
    )
    m = group_of(parser, "model")
    m.add_argument("--hf-path", "--model", metavar="MODEL", dest="source", help="folder, or owner/name on the hub")
    m.add_argument("--revision", help="branch, tag or commit of a hub repository")
    m.add_argument("--mlx-path", default="mlx_model", help=HELP["mlx_path"])
    options.add_quiet_option(parser)
    q = parser.add_argument_group("what becomes of the weights")
    q.add_argument("-q", "--quantize", action="store_true", help="quantise")
    q.add_argument("--q-bits", type=options.positive_int, help=HELP["bits"])
    q.add_argument("--q-group-size", type=options.positive_int, help=HELP["group"])
    q.add_argument("--q-mode", choices=("affine", "mxfp4", "mxfp8", "nvfp4"), default="affine", help="format (affine)")
    q.add_argument("--quant-predicate", metavar="RECIPE", help=HELP["predicate"])
    q.add_argument("--q-override", action="append", default=[], metavar="PATTERN=BITS", help=HELP["override"])
    q.add_argument("--q-fit", choices=("search", "rtn"), help=HELP["fit"])
    q.add_argument("-d", "--dequantize", action="store_true", help="store everything in float")
    q.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="of what is not quantised")
    q.add_argument("--expert-layout", choices=("stacked", "streamed"), default="stacked", help=HELP["layout"])
    options.add_decay_option(q, "is written to config.json (what the source says)")
    q.add_argument("--check-decay", choices=("auto", "always", "never"), default="auto", help=HELP["check"])
    w = parser.add_argument_group("how it is done")
    w.add_argument("--dry-run", action="store_true", help=HELP["dry"])
    w.add_argument("--resume", action="store_true", help="go on with an interrupted conversion, or start one")
    w.add_argument("--stream", action="store_true", help=HELP["stream"])
    w.add_argument("--verify", action="store_true", help="check the hashes of the result; alone, of one made before")
    w.add_argument("--report", nargs="?", const="", metavar="FILE", help=HELP["report"])
    w.add_argument("--upload-repo", metavar="OWNER/NAME", help="repository to upload the result to")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert and say what was written; returns the exit code."""
    from pathlib import Path

    from ring_mlx.convert import describe, remote, report, verify
    from ring_mlx.convert.writer import read_manifest

    if args.source is None and not args.verify:
        raise OptionError("--hf-path (or --model) is missing; name a folder, or owner/name on the hub.")
    if args.source is None and (args.report is not None or args.dry_run):
        raise OptionError("--report and --dry-run need the source; add --model.")
    if args.check_decay == "always" and args.decay_layer_offset is not None:
        raise OptionError("--check-decay always and --decay-layer-offset contradict each other; give one.")
    if args.q_fit is not None and not args.quantize:
        raise OptionError("--q-fit needs --quantize; add -q.")
    if args.upload_repo:
        remote.check_repo_name(args.upload_repo)
    rows = None if args.report is None else report.read_text(Path(args.report) if args.report else None)
    if args.dry_run:
        return _dry_run(args)
    folder = Path(os.path.expanduser(args.mlx_path))
    if args.source is not None:
        try:
            folder = _convert(args)
        except KeyboardInterrupt:
            note("interrupted; run again with --resume to go on.")
            return INTERRUPTED
        print(for_output(describe(folder)))
    if args.verify:
        with bar_of(args, "verify", "B") as bar:
            checked = verify(folder, bar)
        print(f"{checked} files are as they were written")
    if rows is not None:
        # The branch may have moved since.
        revision = read_manifest(folder).get("source_commit") or args.revision
        with bar_of(args, "report", "layers") as bar:
            found = report.compare(args.source, folder, rows, revision=revision, progress=bar)
        report.save(found, folder)
        print(for_output(report.table(found)))
    if args.upload_repo:
        print(for_output(remote.upload(folder, args.upload_repo)))
    return 0


def _options(args: argparse.Namespace) -> Options:
    from ring_mlx.convert.job import Options

    return Options(
        args.quantize,
        args.q_bits,
        args.q_group_size,
        args.q_mode,
        args.dtype,
        args.dequantize,
        args.quant_predicate,
        args.q_override,
        args.q_fit or "search",
        args.expert_layout,
        args.decay_layer_offset,
    )


def _dry_run(args: argparse.Namespace) -> int:
    from ring_mlx.convert import convert_plan, sizes

    with bar_of(args, "reading headers"):
        source, plan = convert_plan(args.source, _options(args), revision=args.revision)
    print(for_output(sizes.table(source, plan)))
    return 0


def _convert(args: argparse.Namespace) -> Path:
    from ring_mlx.convert import convert
    from ring_mlx.doctor.decay_choice import choose

    check, said = None, list[str]()
    if args.check_decay != "never":
        check = partial(
            choose,
            is_wanted=args.check_decay == "always",
            say=note,
            say_later=said.append,
            watch=partial(bar_of, args),
            result=args.mlx_path,
        )
    with bar_of(args, "convert", "B") as bar:
        folder = convert(
            args.source,
            args.mlx_path,
            revision=args.revision,
            **vars(_options(args)),
            resume=args.resume,
            stream=args.stream,
            choose_decay=check,
            progress=bar,
        )
    for line in said:
        note(line)
    return folder
