"""The result of one check, all checks in order, and how a list of results is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ring_mlx.system.install import diagnosis
from ring_mlx.system.progress import Progress

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        section: The group of checks.
        name: What was checked.
        status: "ok"; "note", worth knowing; or "problem", something will not work.
        seen: What was found.
        remedy: What to do, for notes and problems.
        data: The same in numbers, for programs.
    """

    section: str
    name: str
    status: str
    seen: str
    remedy: str = ""
    data: Any = field(default=None)


def table(findings: Sequence[Finding]) -> str:
    """Lines of text, a heading for each section, and a count at the end."""
    width = max(len(f.name) for f in findings)
    lines, section = [], ""
    for f in findings:
        if f.section != section:
            section = f.section
            lines.append(section)
        lines.append(f"  {f.status:7}  {f.name:{width}}  {f.seen}")
        if f.remedy:
            lines.append(f"  {'':7}  {'':{width}}  -> {f.remedy}")
    return "\n".join([*lines, summary(findings)])


def summary(findings: Sequence[Finding]) -> str:
    problems, notes = (sum(f.status == s for f in findings) for s in (PROBLEM, NOTE))
    return f"{problems} problem{'' if problems == 1 else 's'}, {notes} note{'' if notes == 1 else 's'}"


# Modules of this package, and their sections if they fail.
CHECKS = {
    "versions": "versions",
    "machine": "machine",
    "kernels": "kernels",
    "tuning": "tuning",
    "disk": "disk",
    "models": "hub cache",
}


def examine(progress: Progress | None = None) -> list[Finding]:
    """All checks except the decay; a check that itself fails is a problem, and the others go on."""
    found: list[Finding] = []
    for done, (name, section) in enumerate(CHECKS.items()):
        if progress:
            progress(done, len(CHECKS), section)
        try:
            found += import_module(f"ring_mlx.doctor.{name}").check()
        except ImportError as e:
            found.append(Finding(section, "import", PROBLEM, *diagnosis(e)))
        except Exception as e:  # noqa: BLE001 a doctor must not die of what it finds
            said = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            found.append(Finding(section, "check", PROBLEM, f"failed ({said})", "please report this"))
    return found
