"""What is said where something is not installed or the machine is not fit: one line, with a command that works there."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import ring_mlx
from ring_mlx import Session
from ring_mlx.cli import main
from ring_mlx.errors import SessionError
from ring_mlx.system import install, machine_fit, macos

ROOT = Path(__file__).parent.parent
PY = "/env/bin/python"


class Project:
    """The metadata of an installed project."""

    def __init__(self, **files):
        self.files = files

    def read_text(self, name):
        return self.files.get(name.partition(".")[0])


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Makes it look as if the project had been installed in some way; gives the folder it came from."""
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "pyproject.toml").touch()
    (tmp_path / "ring.whl").touch()

    def make(url="", system="Linux", sign="", packages=("ring-mlx",), pip=True, managed=False, gpu=False, **more):
        direct = {"url": url or f"file://{tmp_path}/clone", **more}
        project = Project(direct_url=None if url == "index" else json.dumps(direct), INSTALLER="" if pip else "uv\n")
        prefix = tmp_path / "env"
        prefix.mkdir(exist_ok=True)
        if sign:
            (prefix / sign).touch()
        monkeypatch.setattr(metadata, "distribution", lambda name: project)
        monkeypatch.setattr(install, "version_of", lambda name: "1" if name in packages else None)
        monkeypatch.setattr(install, "find_spec", lambda name: None if name == "pip" and not pip else name)
        monkeypatch.setattr(install, "_is_managed", lambda: managed)
        monkeypatch.setattr("platform.system", lambda: system)
        monkeypatch.setattr("platform.machine", lambda: "arm64")
        monkeypatch.setattr("shutil.which", lambda name: name if gpu and name == "nvidia-smi" else None)
        monkeypatch.setattr(sys, "prefix", str(prefix))
        monkeypatch.setattr(sys, "executable", PY)
        return tmp_path / "clone"

    return make


HOWS = {
    "pip": ({}, f"{PY} -m pip install '{{}}[cpu]'"),
    "editable": ({"dir_info": {"editable": True}}, f"{PY} -m pip install --editable '{{}}[cpu]'"),
    "uv pip": ({"pip": False}, f"uv pip install --python {PY} '{{}}[cpu]'"),
    "uv tool": ({"sign": "uv-receipt.toml"}, "uv tool install --force '{}[cpu]'"),
    "pipx": ({"sign": "pipx_metadata.json"}, "pipx install --force '{}[cpu]'"),
    "with matplotlib": ({"packages": ("ring-mlx", "matplotlib")}, f"{PY} -m pip install '{{}}[cpu,plot]'"),
    "a GPU": ({"gpu": True}, f"{PY} -m pip install '{{}}[cuda13]'"),
    "an index": ({"url": "index"}, f"{PY} -m pip install 'ring-mlx[cpu]'"),
    "a repository": (
        {"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
        f"{PY} -m pip install 'ring-mlx[cpu] @ git+https://x/y.git@c0ffee'",
    ),
    "a wheel on the net": (
        {"url": "https://x/ring.whl", "archive_info": {}},
        f"{PY} -m pip install 'ring-mlx[cpu] @ https://x/ring.whl'",
    ),
    "the system's Python": ({"managed": True}, f"{PY} -m venv ~/ring-mlx && ~/ring-mlx/bin/pip install '{{}}[cpu]'"),
}


@pytest.mark.parametrize("how", HOWS)
def test_on_linux_without_an_extra_the_line_says_which_and_how(how, made, capsys, monkeypatch):
    given, command = HOWS[how]
    clone = made(**given)
    monkeypatch.setattr(
        install, "find_spec", lambda name: None if name == "mlx" or not given.get("pip", True) else name
    )
    assert main(["generate", "--prompt", "hi"]) == 2
    out, err = capsys.readouterr()
    extra = "cuda13" if "gpu" in given else "cpu"
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("ring-mlx: [install] MLX is not installed: on Linux with")
    assert err.endswith(f"ring-mlx needs its extra [{extra}]; install it: {command.format(clone)}\n")


def test_a_folder_that_is_gone_gives_the_packages_themselves(made, monkeypatch):
    clone = made()
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", 'mlx[cpu]<0.33,>=0.32.4; extra == "cpu"'])
    (clone / "pyproject.toml").unlink()
    assert install.command_for_extra("cpu") == f"{PY} -m pip install 'mlx[cpu]<0.33,>=0.32.4'"
    assert install.command_again().endswith("--force-reinstall '.[cpu]', in a clone of ring-mlx")


def test_a_wheel_keeps_its_name_and_a_blank_is_quoted(made, tmp_path):
    made(url=f"file://{tmp_path}/ring.whl", archive_info={})
    assert install.command_for_extra("cpu") == f"{PY} -m pip install '{tmp_path}/ring.whl[cpu]'"
    (tmp_path / "my clone").mkdir()
    (tmp_path / "my clone" / "pyproject.toml").touch()
    made(url=f"file://{tmp_path}/my%20clone", system="Darwin", packages=("ring-mlx", "mlx-cpu"))
    assert install.command_again() == f"{PY} -m pip install --force-reinstall '{tmp_path}/my clone'"


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ({}, f"{PY} -m pip install matplotlib"),
        ({"sign": "pipx_metadata.json"}, "pipx inject ring-mlx matplotlib"),
        ({"sign": "uv-receipt.toml"}, f"uv pip install --python {PY} matplotlib"),
        ({"managed": True}, f"{PY} -m pip install --break-system-packages matplotlib"),
    ],
)
def test_a_package_is_added_as_the_environment_was_made(made, given, command):
    made(**given)
    assert install.command_for("matplotlib") == command


@pytest.mark.parametrize("text", ["{", "[]", '{"url": 5}', '{"url": "file:///x", "dir_info": []}', '{"vcs_info": {}}'])
def test_damaged_metadata_gives_a_command_all_the_same(made, monkeypatch, text):
    made()
    monkeypatch.setattr(metadata, "distribution", lambda name: Project(direct_url=text))
    assert "pip install" in install.command_again()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("libmlx.so: cannot open shared object file", name="mlx.core"), "its extra [cpu]; install it: "),
        (ImportError("libcuda.so.1: cannot open shared object file"), "its extra [cpu]; install it: "),
        (ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval"), "package lm_eval is missing; install it: "),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), "not whole (No module named 'yaml'); install it"),
        (ImportError("cannot import name 'x' from 'mlx_lm'", name="mlx_lm"), "not whole (cannot import name 'x' from"),
        (ModuleNotFoundError("No module named 'tui.x'", name="tui.x"), "not whole (No module named 'tui.x'); install"),
    ],
)
def test_an_import_that_fails_is_one_line_at_every_door(error, said, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("ring_mlx.cli.from_options.load", fail)
    assert main(["generate", "--prompt", "hi"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("ring-mlx: [install] ")
    assert said in err
    monkeypatch.setattr("ring_mlx.engine.loaded.load", fail)
    with Session(store=False) as session, pytest.raises(install.InstallError, match=re.escape(said)):
        list(session.send("hi"))
    assert not issubclass(install.InstallError, SessionError)
    monkeypatch.setattr(ring_mlx, "import_module", fail)
    with pytest.raises(install.InstallError, match=re.escape(said)):
        _ = ring_mlx.load


UNFIT = {
    "python": (
        (3, 10, 14),
        "Linux",
        "x86_64",
        "",
        "Python 3.10.14 is not supported; make an environment with Python 3.11",
    ),
    "new python": ((3, 14, 0), "Linux", "x86_64", "", "Python 3.14.0 is not supported; make an environment"),
    "windows": ((3, 12, 0), "Windows", "AMD64", "", "Windows is not supported; use Linux in WSL 2"),
    "bsd": ((3, 12, 0), "FreeBSD", "amd64", "", "FreeBSD is not supported; use macOS or Linux"),
    "intel": ((3, 12, 0), "Darwin", "x86_64", "14.5", "MLX does not run on a Mac with an Intel chip; use a Mac with"),
    "old macos": ((3, 12, 0), "Darwin", "arm64", "13.6", "macOS 13.6 is too old for MLX; update to macOS 14 or later"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("words", [["--version"], [], ["generate"], ["doctor"]], ids=" ".join)
def test_an_unfit_machine_is_told_in_a_line_before_anything_else(name, words, monkeypatch, capsys):
    version, system, chip, release, said = UNFIT[name]
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: chip)
    monkeypatch.setattr("platform.mac_ver", lambda: (release, ("", "", ""), chip))
    monkeypatch.setattr(macos, "is_translated", lambda: False)
    monkeypatch.setattr("ring_mlx.cli.build_parser", lambda: pytest.fail("a command was imported"))
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"ring-mlx: [system] {said}")
    assert str(install.explained(ModuleNotFoundError("x", name="fcntl"))).startswith(f"[install] {said}")


# What a Python for another system does not have, and every package that is installed.
ELSEWHERE = """
import platform, sys, sysconfig
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {hidden} or path is None and name not in sys.stdlib_module_names and name != "ring_mlx":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
platform.system = lambda: "Windows"
sys.argv = ["ring-mlx", "generate"]
import runpy
runpy.run_module("ring_mlx", run_name="__main__")
"""


def test_windows_gets_a_line_without_what_only_unix_has():
    script = ELSEWHERE.format(hidden=("fcntl", "resource", "termios", "pwd", "readline"))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "ring-mlx: [system] Windows is not supported; use Linux in WSL 2 (`wsl --install`), or a Mac with Apple Silicon.\n"
    )


def test_what_is_imported_before_that_can_be_read_by_an_old_python():
    for name in (
        "__init__",
        "__main__",
        "cli/__init__",
        "cli/parsing",
        "errors",
        "system/install",
        "system/machine_fit",
        "system/macos",
        "system/quick_start",
    ):
        text = (ROOT / "ring_mlx" / f"{name}.py").read_text(encoding="utf-8")
        ast.parse(text, feature_version=(3, 8))


def test_the_pythons_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (low, high) = (".".join(map(str, v)) for v in machine_fit.PYTHONS)
    assert project["requires-python"] == f">={low},<{high}"
    assert set(install.SIGNS) == set(project["optional-dependencies"])
    for extra in project["optional-dependencies"]:
        assert install._requirements(extra)


def test_no_other_place_makes_a_command_that_installs():
    for package in ("ring_mlx", "tui", "metal_kernels"):
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "install.py":
                assert not re.search(r"pip install|ring-mlx\[[a-z{]", file.read_text(encoding="utf-8")), file
