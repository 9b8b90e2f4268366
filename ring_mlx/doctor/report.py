"""A report about this machine to send: its parts one after the other, in two files without anything private."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ring_mlx.doctor.report_page import TITLE, page
from ring_mlx.errors import OptionError
from ring_mlx.system.files import check_named, is_stream, write_named
from ring_mlx.system.progress import Progress

Found = dict[str, Any]


class Part(NamedTuple):
    """What a part is about, and how long it may take at most."""

    about: str
    limit_s: float


PARTS = {
    "machine": Part("chip, system, versions", 60),
    "rates": Part("memory bandwidth and product rate", 60),
    "kernels": Part("kernels against plain forms", 240),
    "operations": Part("kernels against MLX's operations", 300),
    "tuning": Part("what is fast here", 240),
    "toy": Part("speed of the packaged toy", 240),
    "mini": Part("speed of random weights at mini's shapes", 300),
    "proofs": Part("verdicts on all kernels", 30),
}
FORMAT = 1
ABOUT_S = 150
MOST_SAID = 20
Run = Callable[[str, Path], Found]
# A user or a computer may have such a name. It identifies nobody, and a report without these words would say little.
_PUBLIC = re.compile(
    r"m\d+|air|apple|cuda|linux|mac|max|metal|mini|mlx|nvidia|pro|ring|studio|toy|ultra", re.IGNORECASE
)
# An absolute path; its last name stays.
_PATH = re.compile(r"(?<![\w.<>/~])/(?:[^\s'\"/:,;()<>|]+/)+")


def check_files(file: Path) -> Path:
    """The page's file beside a report's; raises OptionError where either cannot be written or is another page."""
    if not file.name:
        raise OptionError(f"--report {file} cannot be written (it names no file); name one, such as report.json.")
    beside = file.with_suffix(".md")
    if beside.name.lower() == file.name.lower():  # a Mac ignores case in names
        raise OptionError(f"--report {file}: the page beside it would have the same name; end it in .json.")
    for path in (file, beside):
        try:
            check_named(path)
        except OSError as e:
            raise OptionError(f"--report {path} cannot be written ({e.strerror or e}); name another file.") from None
    if not _is_ours(beside):
        raise OptionError(f"--report {file}: {beside} is there and no page of a report; name another file.")
    return beside


def _is_ours(beside: Path) -> bool:
    """Whether a page may be replaced, whose name the user did not give."""
    if is_stream(beside) or not beside.exists():
        return True
    with beside.open("rb") as f:
        return re.match(rb"%s \S+ on |\Z" % TITLE.encode(), f.read(100)) is not None


def announcement() -> str:
    """What is said before it starts."""
    most = sum(part.limit_s for part in PARTS.values())
    return (
        f"[doctor] the report takes about {ABOUT_S / 60:.1f} minutes, at most {most / 60:.0f}; it times this machine, so "
        "let nothing else run. Ctrl-C ends it and keeps what is there."
    )


def make(file: Path, progress: Progress | None = None, run: Run | None = None) -> dict[str, Any]:
    """Make all parts, with `in_a_process` or ``run``, and write both files after each; a failed part is a line.

    Ctrl-C keeps the files as far as they are. Raises OptionError if one cannot be written.
    """
    beside, run = check_files(file), run or in_a_process
    began = time.monotonic()
    today = time.strftime("%Y-%m-%d", time.gmtime())
    report: dict[str, Any] = {"format": FORMAT, "date": today, "complete": False, "parts": {}}
    with tempfile.TemporaryDirectory(prefix="ring-mlx-") as folder:
        for done, (name, part) in enumerate(PARTS.items()):
            if progress:
                progress(done, len(PARTS), part.about)
            started = time.monotonic()
            try:
                made = run(name, Path(folder))
            except KeyboardInterrupt:
                report["parts"][name] = {"error": "interrupted"}
                _write(file, beside, report, began)
                raise
            report["parts"][name] = {"seconds": round(time.monotonic() - started, 1), **made}
            report["complete"] = done + 1 == len(PARTS)
            _write(file, beside, report, began)
    return report


def problems(report: dict[str, Any]) -> list[str]:
    """What did not work, in a line each."""
    found = [f"{name}: {part['error']}" for name, part in report["parts"].items() if "error" in part]
    for part in report["parts"].values():
        inner = part.get("found", {})
        found += [f"{f['name']}: {f['seen']}" for f in inner.get("findings", []) if f["status"] == "problem"]
        found += [
            f"{e.get('kernel')} ({e.get('variant')}): {e.get('why')}"
            for e in inner.get("entries", [])
            if not e["passed"]
        ]
        found += [
            f"{r['operation']}, {r['tokens']} tokens: {r['error']}" for r in inner.get("rows", []) if r.get("error")
        ]
    return found


def in_a_process(name: str, folder: Path) -> Found:
    """Make a part in a process, which is ended if it takes too long."""
    out, limit_s = folder / f"{name}.json", PARTS[name].limit_s
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if name != "machine":  # which says what is kept here already
        environment["RING_MLX_MACHINE"] = str(folder / "machine")
    command = [sys.executable, "-P", "-m", "ring_mlx.doctor.report_parts", name, str(out)]
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that it ends with all that it started
    )
    try:
        _, said = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _end(child)
        return {"error": f"not done after {limit_s:.0f} s"}
    except BaseException:
        _end(child)
        raise
    lines = [" ".join(line.split())[:300] for line in said.splitlines() if line.strip()][-MOST_SAID:]
    try:
        made: Found = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        made = {"error": f"its process ended ({how}): {lines[-1] if lines else 'it said nothing'}"}
    return made | ({"said": lines} if lines else {})


def _end(child: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def harmless(value: Any) -> Any:
    """The same without the names of this user, this machine and folders."""
    if isinstance(value, dict):
        return {k: harmless(v) for k, v in value.items()}  # no key is a user's word
    if isinstance(value, list | tuple):
        return [harmless(v) for v in value]
    return _without_names(value) if isinstance(value, str) else value


def _without_names(text: str) -> str:
    for folder, sign in _folders():
        text = text.replace(folder, sign)
    text = _PATH.sub(".../", text)
    for name, word in _names():
        text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", word, text, flags=re.IGNORECASE)
    return text


def _folders() -> list[tuple[str, str]]:
    """Folders whose names may have spaces, the longest first, and what stands for them."""
    home = os.path.expanduser("~")
    known = {home: "~", os.environ.get("HOME", ""): "~", tempfile.gettempdir(): "..."}
    known |= dict.fromkeys((sys.prefix, sys.base_prefix, os.getcwd(), str(Path(__file__).parents[2])), "...")
    real = {os.path.realpath(folder): sign for folder, sign in known.items() if folder}
    return sorted(((f, sign) for f, sign in {**known, **real}.items() if len(f) > 1), key=lambda f: -len(f[0]))


def _names() -> list[tuple[str, str]]:
    """Names and what stands for them."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = ""
    host = platform.node()
    found = [(host, "<host>"), (host.split(".")[0], "<host>"), (user, "<user>")]
    return [(name, word) for name, word in found if len(name) > 1 and not _PUBLIC.fullmatch(name)]


def _write(file: Path, beside: Path, report: dict[str, Any], began: float) -> None:
    report["seconds"] = round(time.monotonic() - began, 1)
    clean = harmless(report)
    try:
        write_named(file, json.dumps(clean, indent=1) + "\n")
        write_named(beside, page(clean, harmless(problems(report))))
    except OSError as e:
        where = e.filename or file
        raise OptionError(f"--report: {where} cannot be written ({e.strerror or e}); free some space.") from None
