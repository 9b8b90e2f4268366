"""The result of one check, and how a list of results is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """How many problems and notes."""
    problems, notes = (sum(f.status == s for f in findings) for s in (PROBLEM, NOTE))
    return f"{problems} problem{'' if problems == 1 else 's'}, {notes} note{'' if notes == 1 else 's'}"
