"""``ring-mlx cache``: lists and prunes the snapshots on disk."""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ring_mlx import options
from ring_mlx.cli.parsing import add_command
from ring_mlx.engine.stored.folder import ModelFolder
from ring_mlx.engine.stored.stores import default_folder, stores
from ring_mlx.errors import CacheFileError, OptionError
from ring_mlx.system.terminal_text import harmless, note

DAY_S = 86400.0


def add(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, prog=parser.prog)
    for name, text, more in (
        ("info", "Show where the snapshots are and how much room they take.", ""),
        ("list", "List every snapshot, the one used last first.", " --json"),
        ("prune", "Remove snapshots, and files that belong to no snapshot.", " --unused-days 30"),
    ):
        action = add_command(actions, name, text, f"ring-mlx cache {name}{more}")
        action.add_argument("--cache-dir", help="folder of the snapshots (default: the system's, or RING_MLX_CACHE)")
        action.add_argument("--model", help="only models whose name or fingerprint starts with this")
        if name != "prune":
            action.add_argument("--json", action="store_true", help="print JSON instead of text")
            continue
        action.add_argument(
            "--max-size", type=options.byte_count, help="keep at most this much for each model, such as 500MB"
        )
        action.add_argument(
            "--unused-days", type=options.in_range(0, 1e6), help="remove snapshots not used for so many days"
        )
        action.add_argument("--all", action="store_true", help="remove everything")


def check(args: argparse.Namespace) -> None:
    """Raises OptionError for options that exclude each other."""
    if args.action == "prune" and args.all and (args.max_size is not None or args.unused_days is not None):
        raise OptionError("--all leaves nothing that --max-size or --unused-days could keep; give one of them.")


def run(args: argparse.Namespace) -> int:
    return {"info": _info, "list": _list, "prune": _prune}[args.action](args)


def _info(args: argparse.Namespace) -> int:
    found = [_summary(s) for s in _stores(args)]
    if args.json:
        print(json.dumps({"folder": str(_folder(args)), "models": found}, indent=1))
        return 0
    print(harmless(f"{_folder(args)}: {_words(sum(m['bytes'] for m in found))} for {len(found)} models"))
    for m in found:
        count, size = f"{m['snapshots']:5d} snapshots", _words(m["bytes"])
        print(f"{m['fingerprint'][:12]}  {count}  {size:>9}  {harmless(m['model'])}")
    return 0


def _list(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    for store in _stores(args):
        for path, m in store.manifests(_say):
            with suppress(FileNotFoundError):  # Another process may prune meanwhile.
                row = {"model": m["model"], "fingerprint": store.folder.name, "tokens": m["offset"], "kind": m["kind"]}
                rows.append(row | {"bytes": sum(m["sizes"].values()), "used": path.lstat().st_mtime})
    rows.sort(key=lambda row: -row["used"])
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'model':12}  {'tokens':>7}  {'kind':8}  {'size':>9}  used (sizes count blocks that others share)")
    for row in rows:
        kind, size, when = harmless(row["kind"]), _words(row["bytes"]), _when(row["used"])
        print(f"{row['fingerprint'][:12]}  {row['tokens']:7d}  {kind:8}  {size:>9}  {when}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    budget = 0 if args.all else args.max_size
    unused_s = None if args.unused_days is None else args.unused_days * DAY_S
    try:
        freed = sum(store.collect(budget, unused_s) for store in _stores(args))
    except OSError as e:
        raise CacheFileError(f"{_folder(args)} could not be pruned ({e}); check permissions.") from None
    print(f"Freed {_words(freed)}")
    return 0


def _folder(args: argparse.Namespace) -> Path:
    return Path(os.path.expanduser(args.cache_dir)) if args.cache_dir else default_folder()


def _stores(args: argparse.Namespace) -> list[ModelFolder]:
    found = stores(_folder(args), _say)
    for store in found:
        for text in store.strangers():
            _say(text)
    if args.model is None:
        return found
    return [s for s in found if s.folder.name.startswith(args.model) or _model(s).startswith(args.model)]


def _say(text: str) -> None:
    """Print one line on standard error, also where a file's name has several."""
    note(f"[cache] {' '.join(harmless(text).split())}")


def _summary(store: ModelFolder) -> dict[str, Any]:
    return {
        "model": _model(store),
        "fingerprint": store.folder.name,
        "snapshots": len(list(store.manifests(_say))),
        "bytes": store.nbytes(),
    }


def _model(store: ModelFolder) -> str:
    return next((str(m["model"]) for _, m in store.manifests()), "")


def _when(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # A file may have any time.
        return "unknown"


def _words(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
