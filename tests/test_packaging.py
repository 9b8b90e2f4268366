"""What the wheel holds, which way imports point, and that public names are documented."""

from __future__ import annotations

import ast
import graphlib
import inspect
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import metal_kernels
import ring_mlx
from tests import check_dist

ROOT = Path(__file__).parent.parent
ALLOWED = {"metal_kernels": set(), "ring_mlx": {"metal_kernels"}, "tui": {"ring_mlx"}}


@pytest.mark.parametrize(("asked", "expected"), [(None, "0"), ("1", "1")])
def test_float32_products_are_not_rounded_unless_asked_for(asked, expected):
    environment = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    environment |= {} if asked is None else {"MLX_ENABLE_TF32": asked}
    code = "import ring_mlx, sys; assert 'mlx' not in sys.modules; import os; print(os.environ['MLX_ENABLE_TF32'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert done.stdout.decode().strip() == expected


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """The sdist, and the wheel that is made of it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


def test_top_level_names_of_the_wheel(wheel):
    names = {n.split("/")[0] for n in zipfile.ZipFile(wheel).namelist()}
    assert {n for n in names if not n.endswith(".dist-info")} == {"ring_mlx", "metal_kernels", "tui"}
    assert len(names) == 4


def test_the_wheel_carries_the_demo_model_and_stylesheets(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert f"ring_mlx/demo_model/{name}" in names
    assert any(n.startswith("tui/") and n.endswith(".tcss") for n in names)
    assert wheel.stat().st_size < 9_000_000


def test_the_sdist_holds_all_that_its_tests_need(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "convert.py"} <= held
    for folder in ("ring_mlx", "metal_kernels", "tui", "tests", "demo", "docs", "benchmarks", ".github"):
        files = {f for f in (ROOT / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts}
        assert files
        assert {str(f.relative_to(ROOT)) for f in files if f.name != ".DS_Store"} <= held, folder
    assert not [name for name in held if name.split("/")[0] in (".venv", ".venv-test", "dist", ".git")]


def test_the_release_workflow_checks_before_it_publishes_and_only_tags():
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    flow = yaml.safe_load(text)
    jobs = flow["jobs"]
    assert flow[True]["push"] == {"tags": ["v*"]}  # YAML takes "on" for a truth value
    assert (jobs["check"]["needs"], jobs["publish"]["needs"]) == ("build", "check")
    assert jobs["publish"]["if"] == "github.event_name == 'push' && github.ref_type == 'tag'"
    assert jobs["publish"]["environment"] == "pypi"
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert flow["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    pythons = {f"3.{n}" for n in range(11, 14)}
    assert set(jobs["check"]["strategy"]["matrix"]["python"]) == pythons
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    (checking,) = [step for step in steps if "check_dist.py" in step]
    assert checking.split() == ["python", "tests/check_dist.py", "dist", *check_dist.WAYS, "sdist"]


def test_the_test_workflow_sends_a_report_whatever_the_tests_say():
    flow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    (job,) = flow["jobs"].values()
    assert set(flow[True]) == {"push", "pull_request", "schedule"}
    assert "macos-15" in job["strategy"]["matrix"]["os"]  # an arm64 image
    steps = job["steps"]
    runs = [step.get("run", step.get("uses", "")) for step in steps]
    at = {
        word: next(n for n, run in enumerate(runs) if word in run)
        for word in ("--report", "make test", "upload-artifact")
    }
    assert at["--report"] < at["make test"] < at["upload-artifact"]
    assert steps[at["--report"]]["continue-on-error"]
    assert steps[at["upload-artifact"]]["if"] == "always()"
    words = runs[at["--report"]].split()
    assert words[1:3] == ["doctor", "--report"]
    testing = steps[at["make test"]]
    assert "github.event_name == 'schedule'" in testing["run"].partition("SLOW=")[2]  # the slow tests, once a week
    assert "github.event_name == 'schedule'" in testing["env"]["RING_MLX_FUZZ"]
    sent = steps[at["upload-artifact"]]["with"]
    assert words[3].startswith(sent["path"])
    assert {"${{ matrix.os }}", "${{ matrix.python }}"} <= {
        f"${{{{ {v} }}}}" for v in re.findall(r"{{ (\S+) }}", sent["name"])
    }


def test_each_way_to_install_is_tried(monkeypatch, tmp_path):
    ran = []

    def run(*command, cwd=None, **variables):
        ran.append([str(part) for part in command])
        return {"--version": "ring-mlx 1.2\n"}.get(ran[-1][-1], "generate 62 what fits")

    monkeypatch.setattr(check_dist, "run", run)
    monkeypatch.setattr(check_dist.venv, "create", lambda folder, with_pip: (folder / "bin").mkdir(parents=True))
    (tmp_path / "ring_mlx-1.2-py3-none-any.whl").touch()
    with tarfile.open(tmp_path / "ring_mlx-1.2.tar.gz", "w:gz") as archive:
        archive.add(ROOT / "pyproject.toml", "ring_mlx-1.2/pyproject.toml")
    check_dist.main(str(tmp_path), *check_dist.WAYS, "sdist")
    installs = [command for command in ran if "install" in command]
    assert len(installs) == len(check_dist.WAYS)
    assert all(command[-1] == f"{tmp_path}/ring_mlx-1.2-py3-none-any.whl{check_dist.EXTRA}" for command in installs)
    assert sum("generate" in command for command in ran) == len(check_dist.WAYS)
    assert sum("--collect-only" in command for command in ran) == 1
    (tmp_path / "ring_mlx-1.2.tar.gz").rename(tmp_path / "ring_mlx-1.3.tar.gz")
    with pytest.raises(AssertionError, match="not of the version"):
        check_dist.main(str(tmp_path))


# Why a module imports within functions; all others import at their top.
LATE = {
    "metal_kernels/launch.py": "the CUDA twin is for CUDA only",
    "ring_mlx/__init__.py": "a public name brings MLX only once it is used",
    "ring_mlx/bench/engines.py": "not every mlx-lm has the model",
    "ring_mlx/bench/plot.py": "matplotlib may be missing",
    "ring_mlx/cli/doctor_command.py": "a machine is examined where MLX cannot be imported",
    "ring_mlx/cli/table.py": "some commands run without MLX",
    "ring_mlx/distributed/hosts.py": "a host that only launches needs no MLX",
    "ring_mlx/doctor/disk.py": "as doctor_command.py",
    "ring_mlx/doctor/machine.py": "as doctor_command.py",
    "ring_mlx/evaluation/heat_map.py": "matplotlib may be missing",
    "ring_mlx/generation/grammars.py": "few answers have a form, and the import takes a while",
    "ring_mlx/system/macos.py": "there is no fcntl on Windows, and ctypes may lack its library",
    "ring_mlx/mlx_lm_plugin/__init__.py": "a script names register before it has mlx-lm",
    "ring_mlx/engine/model_thread.py": "a first screen does not wait for MLX",
    "tui/chat.py": "as session.py, and plain chats do not wait for screens",
    "tui/formulas/symbols.py": "few answers have formulas, and the import takes a while",
    "tui/plain.py": "readline may be missing",
}


def imports_late(tree):
    """Whether a function of a module imports."""
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return any(isinstance(n, ast.Import | ast.ImportFrom) for f in functions for n in ast.walk(f))


def test_modules_import_at_their_top_but_for_a_reason():
    paths = [p for package in ALLOWED for p in (ROOT / package).rglob("*.py")]
    late = {str(p.relative_to(ROOT)) for p in paths if imports_late(ast.parse(p.read_text(encoding="utf-8")))}
    assert late == set(LATE)
    assert imports_late(ast.parse("class A:\n    async def f():\n        if x:\n            import json"))
    assert not imports_late(ast.parse("if x:\n    import json"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package):
    forbidden = (set(ALLOWED) | {"convert", "tests", "demo", "benchmarks"}) - ALLOWED[package] - {package}
    if package == "tui":
        forbidden |= {"mlx", "mlx_lm"}
    for path in (ROOT / package).rglob("*.py"):
        assert not set(imports(path)) & forbidden, path


def modules():
    """Each module of the packages, by its full name."""
    for path in sorted(p for package in ALLOWED for p in (ROOT / package).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def uses(path, known):
    """Modules that a file imports anywhere, in functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in full if {name, node.module} & known)


def test_no_module_imports_another_in_a_circle():
    paths = dict(modules())
    graph = {name: set(uses(path, set(paths))) - {name} for name, path in paths.items()}
    assert {"ring_mlx.model.layer", "metal_kernels.launch"} <= graph["ring_mlx.model.decode_step"]
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_what_the_system_gives_needs_nothing_of_models():
    paths = dict(modules())
    used = {u for name, path in paths.items() if name.startswith("ring_mlx.system.") for u in uses(path, set(paths))}
    assert {u for u in used if not u.startswith("ring_mlx.system")} == {"ring_mlx.errors"}


def test_all_is_sorted_and_complete():
    for package in (ring_mlx, metal_kernels):
        assert package.__all__ == sorted(package.__all__)


def test_type_checkers_see_the_public_names_and_where_they_come_from():
    tree = ast.parse(Path(ring_mlx.__file__).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == ring_mlx._HOMES
    assert sorted(seen) == ring_mlx.__all__


def test_public_names_have_docstrings():
    for package in (ring_mlx, metal_kernels):
        for name in package.__all__:
            assert (inspect.getdoc(getattr(package, name)) or "").strip(), name


def test_modules_have_docstrings():
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_importing_the_package_is_light():
    code = "import sys, ring_mlx, ring_mlx.cli; print(any(m in sys.modules for m in ('mlx', 'transformers', 'mlx_lm')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


CHOSEN = """
import sys
from ring_mlx.cli import main
for words in (["generate", "--no-such-option"], ["--help"]):
    try:
        main(words)
    except SystemExit:
        pass
    print(sorted(m for m in sys.modules if m.endswith("_options") or m.startswith("tui.command")))
print(any(m in sys.modules for m in ("mlx", "numpy", "transformers", "textual")))
"""


def test_only_the_chosen_command_is_imported_and_its_work_after_its_options():
    done = subprocess.run([sys.executable, "-c", CHOSEN], cwd=ROOT, check=True, capture_output=True, text=True)
    first, *_, second, heavy = done.stdout.splitlines()
    assert first == "['ring_mlx.cli.generate_options']"
    assert second == "['ring_mlx.cli.generate_options', 'tui.command', 'tui.commands']"
    assert heavy == "False"


def test_each_run_of_the_tests_has_a_temporary_folder_of_its_own(tmp_path):
    assert not [p for p in tmp_path.parents if p.name.startswith("pytest-of-")]


ONCE = """
import collections, importlib.util, os, sys
import ring_mlx
opened = collections.Counter()
sys.addaudithook(lambda event, args: opened.update([args[0]]) if event == "open" else None)
from transformers import AutoTokenizer
from transformers.utils import import_utils as u
folder = os.path.dirname(sys.modules["transformers.models"].__file__)
models = [n for f, n in opened.items() if str(f).startswith(folder) and os.path.basename(f).startswith("modeling_")]
print(len(models) > 128, sum(n > 1 for n in models) < 10)  # those of models/auto are read for themselves too
spec = importlib.util.spec_from_file_location("transformers.utils.fresh", u.__file__)
fresh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fresh)
print(u.define_import_structure(folder + "/__init__.py") == fresh.define_import_structure(folder))
print(u.fetch__all__.__module__)
"""


def test_transformers_reads_its_files_once_and_finds_the_same():
    done = subprocess.run([sys.executable, "-c", ONCE], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3 + ["ring_mlx.system.quick_start"]


@pytest.mark.parametrize(
    "words", [["launch", "-n", "2", "--no-check", "generate", "--model", "/no"], ["cache", "list"], ["cache", "prune"]]
)
def test_a_launcher_and_lists_of_snapshots_need_no_mlx(words, tmp_path):
    code = (
        "import sys; from ring_mlx.cli import main; main(sys.argv[1:]);"
        "print(any(m in sys.modules for m in ('mlx', 'numpy', 'transformers', 'mlx_lm')))"
    )
    (tmp_path / "v1" / "a-model").mkdir(parents=True)
    command = [sys.executable, "-c", code, *words]
    environment = os.environ | {"RING_MLX_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "False"
