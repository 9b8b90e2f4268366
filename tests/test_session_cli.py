"""``ring-mlx cache`` and prompt files."""

from __future__ import annotations

import json
import os
import time

import mlx.core as mx
import pytest

from ring_mlx.cli import main
from ring_mlx.engine.snapshots import Store
from ring_mlx.engine.stored.stores import default_folder
from ring_mlx.errors import CacheFileError
from ring_mlx.model.cache import FORMAT_VERSION, HybridCache
from ring_mlx.options import byte_count
from tests.saver import make
from tests.tiny import make_model, tokens


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RING_MLX_CACHE", str(tmp_path))

    def run(*args):
        code = main(["cache", *map(str, args)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def filled(tmp_path):
    first = make(1, 300)
    Store(tmp_path, "aaaa", 1 << 40, name="mini").save([first, make(1, 700, first.blocks)])
    Store(tmp_path, "bbbb", 1 << 40, name="flash").save([make(2, 20)])


def test_info(cli, filled, tmp_path):
    code, out, _ = cli("info")
    assert code == 0
    assert "aaaa" in out
    assert "2 snapshots" in out
    _, out, _ = cli("info", "--json", "--model", "mini")
    (model,) = json.loads(out)["models"]
    held = sum(f.stat().st_size for f in (tmp_path / "v1" / "aaaa").rglob("*") if f.is_file())
    assert model == {"model": "mini", "fingerprint": "aaaa", "snapshots": 2, "bytes": held}


def test_list(cli, filled, tmp_path):
    old = next((tmp_path / "v1" / "bbbb" / "snapshots").glob("*"))
    os.utime(old, (1, 1))
    _, out, _ = cli("list", "--json")
    rows = json.loads(out)
    assert [(r["model"], r["tokens"]) for r in rows][-1] == ("flash", 20)
    assert sorted(r["tokens"] for r in rows) == [20, 300, 700]
    _, out, _ = cli("list")
    assert len(out.splitlines()) == 4


def test_prune(cli, filled, tmp_path):
    (tmp_path / "v1" / "aaaa" / "blobs" / ".writing-x.safetensors").write_bytes(b"x" * 10)
    assert cli("prune")[1] == "Freed 0.00 MB\n"
    assert not list(tmp_path.rglob(".writing-*"))
    old = next((tmp_path / "v1" / "bbbb" / "snapshots").glob("*"))
    os.utime(old, (time.time() - 3 * 86400,) * 2)
    cli("prune", "--unused-days", 2)
    assert [r["model"] for r in json.loads(cli("list", "--json")[1])] == ["mini", "mini"]
    held = json.loads(cli("info", "--json")[1])["models"][0]["bytes"]
    cli("prune", "--max-size", f"{(held - 5000) / 1e6}MB")
    assert [r["tokens"] for r in json.loads(cli("list", "--json")[1])] == [700], "the newest of a conversation stays"
    next((tmp_path / "v1" / "aaaa" / "snapshots").glob("*")).write_bytes(b"damaged")
    cli("prune", "--all")
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".json", ".safetensors")]


def test_an_empty_folder(cli, tmp_path):
    assert cli("info", "--cache-dir", tmp_path / "none")[1].startswith(f"{tmp_path / 'none'}: 0.00 MB for 0 models")
    assert json.loads(cli("list", "--json")[1]) == []
    assert cli("prune", "--all")[0] == 0


def test_bad_options_take_one_line(cli, capsys):
    assert cli("prune", "--all", "--max-size", "1GB")[2].count("\n") == 1
    for args in (*(["prune", f"--max-size={s}"] for s in ("much", "inf", "nan", "-1GB")), [], ["fly"]):
        with pytest.raises(SystemExit) as e:
            cli(*args)
        assert e.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_sizes():
    read = [byte_count(t) for t in ("0", "7B", "1.5kb", "2G", "3TB", "2GiB", "1 MiB")]
    assert read == [0, 7, 1500, 2 * 10**9, 3 * 10**12, 2**31, 2**20]


def test_the_default_folder_is_the_systems(monkeypatch):
    monkeypatch.delenv("RING_MLX_CACHE", raising=False)
    assert default_folder().name == "ring-mlx"


# Prompt files


@pytest.fixture
def prompt_file(tmp_path):
    model = make_model()
    cache = model.make_cache()
    model(tokens(40), cache)
    path = tmp_path / "p.cache"
    cache.save(path, tokens(40)[0].tolist(), "mark")
    return path


def rewrite(path, change):
    arrays, header = mx.load(str(path), format="safetensors", return_metadata=True)
    change(arrays, header)
    mx.save_safetensors(str(path.with_suffix(".safetensors")), arrays, header)
    return path.with_suffix(".safetensors")


def test_a_file_of_the_first_version_is_read(prompt_file):
    def older(_, header):
        header["version"] = "1"
        del header["checksum"]

    cache, ids, _ = HybridCache.load(rewrite(prompt_file, older), "mark")
    assert (cache.offset, len(ids), FORMAT_VERSION) == (40, 40, 3)


def test_a_changed_number_is_noticed(prompt_file):
    def other(arrays, _):
        arrays["layers.3.keys"] = arrays["layers.3.keys"] + 1e-3

    with pytest.raises(CacheFileError, match="does not match its checksum"):
        HybridCache.load(rewrite(prompt_file, other), "mark")
