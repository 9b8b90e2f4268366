"""``ring-mlx convert``: a checkpoint to the mlx-community form, quantized or not, checked, measured and uploaded."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ring_mlx.cli.exit_codes import INTERRUPTED
from ring_mlx.cli.progress import bar_of
from ring_mlx.convert import Options, calibration, convert, convert_plan, describe, remote, report, verify
from ring_mlx.convert.conversion import size_table
from ring_mlx.convert.folder_files import DecayChoice
from ring_mlx.convert.sources import Source
from ring_mlx.convert.writer import read_manifest
from ring_mlx.doctor.decay_choice import choose, choose_by_result
from ring_mlx.system.terminal_text import for_output, note


def run(args: argparse.Namespace) -> int:
    """Convert and say what was written; returns the exit code."""
    if args.upload_repo:
        remote.check_repo_name(args.upload_repo)
    text = (
        None
        if args.calibrate is None
        else report.read_text(Path(args.calibrate) if args.calibrate else None, calibration.TEXT, "--calibrate")
    )
    args.calibrate = text is not None
    rows = None if args.report is None else report.read_text(Path(args.report) if args.report else None)
    if args.dry_run:
        with bar_of(args, "reading") as bar:
            options = Options(**_options(args))
            source, plan = convert_plan(args.source, options, revision=args.revision, text=text, progress=bar)
        print(for_output(size_table(source, plan, options, text)))
        return 0
    folder = Path(os.path.expanduser(args.mlx_path))
    if args.source is not None:
        try:
            folder = _convert(args, text)
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


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the conversion that were given."""
    return {f.name: value for f in fields(Options) if (value := getattr(args, f.name)) is not None}


def _convert(args: argparse.Namespace, text: list[dict[str, Any]] | None) -> Path:
    said, choices, watch = list[str](), list[DecayChoice](), partial(bar_of, args)
    is_wanted = args.check_decay == "always"

    def check(source: Source) -> DecayChoice | None:
        found = choose(source, is_wanted, note, said.append, watch, args.mlx_path)
        choices.extend([found] if found else [])
        return found

    with bar_of(args, "convert", "B") as bar:
        folder = convert(
            args.source,
            args.mlx_path,
            revision=args.revision,
            **_options(args),
            resume=args.resume,
            stream=args.stream,
            text=text,
            choose_decay=None if args.check_decay == "never" else check,
            say=note,
            progress=bar,
        )
    # The result can be loaded where the source cannot.
    if not any(choice.is_open and choose_by_result(folder, choice, note, watch) for choice in choices):
        for line in said:
            note(line)
    return folder
