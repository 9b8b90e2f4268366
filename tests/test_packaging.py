"""What the wheel holds, which way imports point, and that public names are documented."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import metal_kernels
import ring_mlx

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
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", out, ROOT], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
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


def test_all_is_sorted_and_complete():
    for package in (ring_mlx, metal_kernels):
        assert package.__all__ == sorted(package.__all__)
    assert set(ring_mlx._HOMES) == set(ring_mlx.__all__)


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
    assert done.stdout.split() == ["True"] * 3 + ["ring_mlx.quick_start"]


def test_a_launcher_needs_no_mlx():
    code = (
        "import sys; from ring_mlx.cli import main; main(['launch', '-n', '2', '--no-check', 'generate', '--model', '/no']);"
        "print(any(m in sys.modules for m in ('mlx', 'numpy', 'transformers', 'mlx_lm')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
