"""Commands that install what is missing here, in the way in which ring-mlx was installed; imports no dependency.

That may be from a folder, a wheel, a repository or an index, by pip, uv or pipx, into an environment of its own or not. A
command that is printed must work in that case.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from ring_mlx.errors import RingError
from ring_mlx.system.machine_fit import unfit

PROJECT = "ring-mlx"
CPU, CUDA, PLOT, WEB = "cpu", "cuda13", "plot", "web"
OPTIONAL = ("datasets", "lm_eval", "matplotlib", "textual_serve")  # some commands use them; no installation brings them
# The package that shows that an extra is installed.
SIGNS = {CPU: "mlx-cpu", CUDA: "mlx-cuda-13", PLOT: "matplotlib", WEB: "textual-serve"}


class InstallError(RingError, origin="install"):
    """Something that ring-mlx needs is not installed, or ring-mlx cannot run on this machine."""


class Source(NamedTuple):
    """Where the project came from: what to install, with its extras between ``name`` and ``rest``."""

    name: str
    rest: str = ""
    editable: bool = False


def command_for(*packages: str) -> str:
    """The command that installs packages of an index here."""
    wanted = [shlex.quote(p) for p in packages]
    if _is_made_by("pipx"):
        return " ".join(["pipx inject", PROJECT, *wanted])
    return " ".join([_pip(), *wanted])


def command_for_extra(extra: str) -> str:
    source = _source()
    return command_for(*_requirements(extra)) if source is None else _install(source, extra)


def command_again() -> str:
    """The command that installs the project again."""
    return _install(_source() or Source("."), again=True) + ("" if _source() else ", in a clone of ring-mlx")


def backend_extra() -> str:
    """The extra with MLX's backend: the installed one, else the one that fits this machine; "" on a Mac."""
    if platform.system() == "Darwin":
        return ""
    return next((e for e in (CUDA, CPU) if version_of(SIGNS[e])), _fitting_extra())


def check_backend() -> None:
    """Raises InstallError if MLX is not installed; imports nothing."""
    if find_spec("mlx") is None:
        raise explained(ModuleNotFoundError("No module named 'mlx'", name="mlx"))


def explained(error: ImportError) -> InstallError:
    """A failed import as an error of one line, with the command that repairs it."""
    seen, remedy = diagnosis(error)
    return InstallError(f"{seen}; {remedy}")


def diagnosis(error: ImportError) -> tuple[str, str]:
    """The cause of a failed import, and the remedy."""
    if reason := unfit():
        return reason
    said, module = " ".join(str(error).split())[:300], (error.name or "").partition(".")[0]
    if module == "mlx" or "libmlx" in said or "libcu" in said:
        return _no_backend(said)
    if module in OPTIONAL:
        return f"the package {module} is missing", f"install it: {command_for(module)}"
    return f"ring-mlx is not whole ({said})", f"install it again: {command_again()}"


def _no_backend(said: str) -> tuple[str, str]:
    if platform.system() != "Linux":
        return f"MLX cannot be imported ({said})", f"install ring-mlx again: {command_again()}"
    extra = _fitting_extra()
    why = f"MLX has no backend that works here ({said})" if version_of("mlx") else "MLX is not installed"
    where = "with an NVIDIA GPU" if extra == CUDA else "without an NVIDIA GPU"
    return f"{why}: on Linux {where} ring-mlx needs its extra [{extra}]", f"install it: {command_for_extra(extra)}"


def _fitting_extra() -> str:
    has_gpu = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    return CUDA if has_gpu else CPU


def _install(source: Source, extra: str = "", again: bool = False) -> str:
    backend = extra if extra in (CPU, CUDA) else backend_extra()
    extras = [e for e in (backend, *(e for e in (PLOT, WEB) if extra == e or version_of(SIGNS[e]))) if e]
    wanted = shlex.quote(source.name + (f"[{','.join(extras)}]" if extras else "") + source.rest)
    edit = "--editable " if source.editable else ""
    if _is_made_by("uv tool"):
        return f"uv tool install --force {edit}{wanted}"
    if _is_made_by("pipx"):
        return f"pipx install --force {edit}{wanted}"
    if _is_managed():
        return f"{_python()} -m venv ~/{PROJECT} && ~/{PROJECT}/bin/pip install {edit}{wanted}"
    return f"{_pip()} {'--force-reinstall ' * again}{edit}{wanted}"


def _pip() -> str:
    """The command that installs into this environment, without what it installs."""
    has_pip = find_spec("pip") is not None
    if _is_made_by("uv tool") or (not has_pip and (_read("INSTALLER").strip() == "uv" or shutil.which("uv"))):
        return f"uv pip install --python {_python()}"
    first = "" if has_pip else f"{_python()} -m ensurepip && "
    return f"{first}{_python()} -m pip install{' --break-system-packages' if _is_managed() else ''}"


def _python() -> str:
    return shlex.quote(sys.executable)


def _is_made_by(tool: str) -> bool:
    sign = {"uv tool": "uv-receipt.toml", "pipx": "pipx_metadata.json"}[tool]
    return (Path(sys.prefix) / sign).is_file()


def _is_managed() -> bool:
    """Whether this is the system's own Python, into which pip installs nothing (PEP 668)."""
    return sys.prefix == sys.base_prefix and (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").is_file()


def version_of(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(name: str) -> str:
    """A file of the project's metadata, or ""."""
    try:
        return metadata.distribution(PROJECT).read_text(name) or ""
    except metadata.PackageNotFoundError:
        return ""


def _source() -> Source | None:
    """Where the project can be installed from again; None where that is gone or not known."""
    if not version_of(PROJECT):
        checkout = Path(__file__).parents[2]
        return Source(str(checkout), editable=True) if (checkout / "pyproject.toml").is_file() else None
    try:
        found = json.loads(_read("direct_url.json") or "null")
        if found is None:
            return Source(PROJECT)  # it came from an index
        url = str(found["url"])
        if vcs := found.get("vcs_info"):
            at = vcs.get("requested_revision") or vcs["commit_id"]
            return Source(PROJECT, f" @ {vcs['vcs']}+{url}@{at}")
        if urlsplit(url).scheme != "file":
            return Source(PROJECT, f" @ {url}")
        path = Path(unquote(urlsplit(url).path))
        is_there = path.is_file() or (path / "pyproject.toml").is_file()
        return Source(str(path), "", bool(found.get("dir_info", {}).get("editable"))) if is_there else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _requirements(extra: str) -> list[str]:
    """The packages of an extra, from the project's metadata."""
    lines = (metadata.requires(PROJECT) or []) if version_of(PROJECT) else []
    return [line.partition(";")[0].strip() for line in lines if f"extra == '{extra}'" in line.replace('"', "'")]
