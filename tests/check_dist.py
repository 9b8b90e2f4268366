"""Try the wheel and the sdist as a new user would: each way to install in an environment of its own.

    python tests/check_dist.py dist                    # the wheel by venv, the sdist with its tests
    python tests/check_dist.py dist venv uv pipx sdist

Needs no package, and the network for what the package needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

EXTRA = "[cpu]" if sys.platform == "linux" else ""
QUICK_TESTS = ("tests/test_config.py", "tests/test_docs.py", "tests/test_demo_tokenizer.py", "tests/test_packaging.py")


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """What a command prints; ends the program where it fails."""
    print("+", *command, flush=True)
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=False, timeout=3600
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\nexit code {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def try_it(bin_folder: Path, version: str) -> None:
    """The first things that a new user does."""
    command = bin_folder / "ring-mlx"
    found = run(command, "--version")
    assert found == f"ring-mlx {version}\n", found
    assert "generate" in run(command)
    said = run(command, "generate", "--prompt", "What is 27 + 35?", "--thinking", "hide", "--verbose", "False")
    assert "62" in said, said
    assert "what fits" in run(command, "doctor")


def by_venv(wheel: Path, folder: Path) -> Path:
    """pip in an environment of Python's own."""
    venv.create(folder / "env", with_pip=True)
    run(folder / "env/bin/python", "-m", "pip", "install", "--quiet", f"{wheel}{EXTRA}")
    run(folder / "env/bin/python", "-m", "pip", "check")
    return folder / "env/bin"


def by_uv(wheel: Path, folder: Path) -> Path:
    """uv tool install."""
    places = {"UV_TOOL_DIR": str(folder / "tools"), "UV_TOOL_BIN_DIR": str(folder / "bin")}
    run("uv", "tool", "install", "--quiet", "--python", sys.executable, f"{wheel}{EXTRA}", **places)
    return folder / "bin"


def by_pipx(wheel: Path, folder: Path) -> Path:
    """pipx install."""
    places = {"PIPX_HOME": str(folder / "tools"), "PIPX_BIN_DIR": str(folder / "bin")}
    run("pipx", "install", "--python", sys.executable, f"{wheel}{EXTRA}", **places)
    return folder / "bin"


WAYS: Mapping[str, Callable[[Path, Path], Path]] = {"venv": by_venv, "uv": by_uv, "pipx": by_pipx}


def check_sdist(sdist: Path, folder: Path) -> None:
    """Its tests are found, and some pass, in the environment that its own Makefile makes."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    root = folder / sdist.name.removesuffix(".tar.gz")
    run("make", ".venv-test/ready", f"PYTHON={sys.executable}", cwd=root)
    python = root / ".venv-test/bin/python"
    print(run(python, "-m", "pytest", "--collect-only", "-q", cwd=root).splitlines()[-1])
    print(run(python, "-m", "pytest", "-q", *QUICK_TESTS, cwd=root).splitlines()[-1])


def main(dist: str, *ways: str) -> None:
    """Check what ``dist`` holds, in the ways that are named."""
    (wheel,), (sdist,) = Path(dist).absolute().glob("*.whl"), Path(dist).absolute().glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    assert sdist.name == f"ring_mlx-{version}.tar.gz", f"{sdist.name} is not of the version of {wheel.name}"
    for way in ways or ("venv", "sdist"):
        with tempfile.TemporaryDirectory() as folder:
            if way == "sdist":
                check_sdist(sdist, Path(folder))
            else:
                try_it(WAYS[way](wheel, Path(folder)), version)
        print(f"{way}: ok", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
