"""Runs all checks in order; a check that fails does not stop the others."""

from __future__ import annotations

from importlib import import_module

from ring_mlx.doctor.finding import PROBLEM, Finding
from ring_mlx.system.install import diagnosis
from ring_mlx.system.progress import Progress

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
