"""Versions of Python and of the packages against the ranges that the project names; imports none of them."""

from __future__ import annotations

import platform
import sys
import tomllib
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ring_mlx
from ring_mlx.doctor.finding import NOTE, OK, PROBLEM, Finding
from ring_mlx.system import install

PROJECT = "ring-mlx"
_finding = partial(Finding, "versions")
# Shown one by one; others only if they are wrong.
SHOWN = ("mlx", "mlx-lm")


class Ranges(NamedTuple):
    """The allowed versions of Python, and of packages by name."""

    python: SpecifierSet
    packages: dict[str, SpecifierSet]


def check() -> list[Finding]:
    found = ranges()
    if found is None:
        seen = f"{ring_mlx.__version__}, not installed as a package"
        return [_finding(PROJECT, NOTE, seen, install.command_again())]
    out = [_finding(PROJECT, OK, ring_mlx.__version__), python(found.python, platform.python_version())]
    looked_at = {name: package(name, allowed) for name, allowed in found.packages.items()}
    out += [f for name, f in looked_at.items() if name in SHOWN or f.status != OK]
    fine = [f"{name} {f.seen.split(',')[0]}" for name, f in looked_at.items() if name not in SHOWN and f.status == OK]
    return [*out, _finding("others", OK, ", ".join(fine))]


def ranges() -> Ranges | None:
    """The ranges in the checkout's pyproject.toml or, if there is none, of the installed package; None without both."""
    file = Path(ring_mlx.__file__).parents[1] / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == PROJECT:
            lines = list(project["dependencies"])
            if sys.platform != "darwin":
                lines += project["optional-dependencies"]["cpu"]
            return Ranges(SpecifierSet(project["requires-python"]), _packages(lines))
    try:
        installed = metadata.metadata(PROJECT)
        return Ranges(SpecifierSet(installed["Requires-Python"]), _packages(metadata.requires(PROJECT) or []))
    except metadata.PackageNotFoundError:
        return None


def python(allowed: SpecifierSet, version: str) -> Finding:
    if allowed.contains(version, prereleases=True):
        return _finding("Python", OK, f"{version}, {sys.executable}")
    return _finding("Python", PROBLEM, f"{version}, not {allowed}", f"make an environment with Python {allowed}")


def package(name: str, allowed: SpecifierSet) -> Finding:
    extra = install.backend_extra() if name == "mlx" else ""
    remedy = install.command_for_extra(extra) if extra else install.command_for(f"{name}{allowed}")
    version = install.version_of(name)
    if version is None:
        return _finding(name, PROBLEM, "not installed", remedy)
    if allowed.contains(version, prereleases=True):
        return _finding(name, OK, f"{version}, in {allowed}")
    return _finding(name, PROBLEM, f"{version}, not {allowed}", remedy)


def _packages(lines: list[str]) -> dict[str, SpecifierSet]:
    """Requirements for this system, with the extra for the CPU where there is no Metal."""
    extras = [""] if sys.platform == "darwin" else ["", "cpu"]
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras):
            found[requirement.name] = requirement.specifier
    return found
