"""Folders as people have them: a stale index, files of macOS, a hub cache's folder, settings under the other key."""

from __future__ import annotations

import json
import os
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils

from ring_mlx import load
from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.shards import INDEX, find_shards, read_tensors
from ring_mlx.cli import main
from ring_mlx.cli.exit_codes import CUT_OFF
from ring_mlx.doctor import models
from ring_mlx.errors import HubError, WeightsError
from ring_mlx.model.config import read_config
from ring_mlx.model.quantization import with_settings
from tests.parrot import make_parrot
from tests.tiny import config, make_model

OURS = {"group_size": 32, "bits": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_parrot(tmp_path_factory.mktemp("shards") / "model", ["Fine"])


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def write_index(folder, *names):
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}))


SOURCE = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")


@pytest.mark.filterwarnings("always:.weights.:UserWarning")
def test_a_stale_index_beside_a_whole_file_is_passed_over(folder, capsys):
    write_index(folder, *SOURCE)
    assert main(["generate", "--model", str(folder), "--verbose", "False", "--ignore-chat-template"]) == 0
    out, err = capsys.readouterr()
    assert out == "Fine\n"
    assert err.startswith(f"ring-mlx: [weights] {INDEX} in {folder} names files that are not there; it is passed over")
    assert err.count("\n") == 1
    with pytest.warns(UserWarning, match="passed over"):
        assert read_tensors(folder)
    assert "files of weights missing" not in models._judged("x", folder, 1 << 40).seen


def test_a_stale_index_beside_other_shards(folder):
    write_index(folder, *SOURCE)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"lacks .* of 3 shards"):
        find_shards(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    with pytest.warns(UserWarning, match="passed over"):
        assert [f.name[:11] for f in find_shards(folder)] == ["model-00001", "model-00002"]


def test_an_index_whose_files_are_there_is_followed(folder):
    (folder / "model.safetensors").rename(folder / SOURCE[0])
    (folder / "model.safetensors").touch()
    write_index(folder, SOURCE[0])
    assert find_shards(folder) == [folder / SOURCE[0]]
    write_index(folder, *SOURCE)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks model-00002.* of 3 shards"):
        find_shards(folder)


def test_what_macos_writes_beside_each_file_is_none_of_the_checkpoint(folder, tmp_path, capsys):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "additional_chat_templates").mkdir()
    names = ["weights.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"]
    for name in [*names, "model.safetensors", INDEX, "additional_chat_templates/tool_use.jinja"]:
        part = (folder / name).with_name(f"._{(folder / name).name}")
        part.write_bytes(b"\0\5\x16\7\xff\xfe")
    os.mkfifo(folder / "._fifo.json")
    assert find_shards(folder) == [folder / "weights.safetensors"]
    assert main(["generate", "--model", str(folder), "--verbose", "False", "--max-tokens", "1"]) == CUT_OFF
    assert main(["convert", "--model", str(folder), "--mlx-path", str(tmp_path / "out"), "-q", "--q-bits", "8"]) == 0
    assert not [f for f in (tmp_path / "out").rglob("*") if f.name.startswith("._")]


# A folder of the hub's cache.


def cache(root, made, *commits, main_is=None):
    """A repository in the cache with a snapshot a commit, the last the newest."""
    repo = root / "models--someone--ring"
    for n, commit in enumerate(commits):
        snapshot = repo / "snapshots" / commit
        shutil.copytree(made, snapshot)
        os.utime(snapshot, (n, n))
    (repo / "refs").mkdir(parents=True)
    if main_is:
        (repo / "refs" / "main").write_text(main_is)
    return repo


def test_a_folder_of_the_hubs_cache_leads_into_its_snapshots(tmp_path, made, capsys):
    repo = cache(tmp_path, made, "aaa", "bbb", main_is="aaa")
    assert resolve_model(repo) == repo / "snapshots" / "aaa"
    assert main(["generate", "--model", str(repo), "--verbose", "False", "--ignore-chat-template"]) == 0
    assert capsys.readouterr().out == "Fine\n"
    (repo / "refs" / "v2").write_text("bbb")
    assert resolve_model(repo, "v2") == resolve_model(repo, "bbb") == repo / "snapshots" / "bbb"
    for wrong in ("v3", "../refs", "", "a\0"):
        with pytest.raises(HubError, match="has no revision"):
            resolve_model(repo, wrong)


def test_without_a_whole_main_the_newest_complete_snapshot_is_read(tmp_path, made):
    repo = cache(tmp_path, made, "aaa", "bbb", "ccc")
    assert resolve_model(repo) == repo / "snapshots" / "ccc"
    (repo / "snapshots" / "ccc" / "model.safetensors").unlink()
    (repo / "snapshots" / "ccc" / "model.safetensors").symlink_to("lost")
    (repo / "refs" / "main").write_text("ccc\n")
    with pytest.warns(UserWarning, match=r"\[hub\] main in .* is not complete; bbb is read"):
        assert resolve_model(repo) == repo / "snapshots" / "bbb"
    (repo / "snapshots" / "bbb" / "tokenizer.json").unlink()
    (repo / "snapshots" / "bbb" / "tokenizer.json").symlink_to("lost")
    for main_is in ("bbb", "gone"):
        (repo / "refs" / "main").write_text(main_is)
        with pytest.warns(UserWarning, match=r"\[hub\] main in .* is not complete; aaa is read"):
            assert resolve_model(repo) == repo / "snapshots" / "aaa"
    for commit in ("aaa", "bbb"):
        (repo / "snapshots" / commit / "config.json").unlink()
    with pytest.raises(HubError, match="no complete snapshot"):
        resolve_model(repo)


# MLX's settings under `quantization_config` alone.


def test_settings_are_read_under_the_other_key(tmp_path, folder, registered):
    """By the loader, mlx-lm's loader and convert."""
    model = make_model(hidden_size=64, head_dim=32, num_experts=0, vocab_size=1025)
    nn.quantize(model, **OURS, class_predicate=lambda p, m: p == "lm_head")
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    raw = config(hidden_size=64, head_dim=32, num_experts=0, vocab_size=1025) | {"quantization_config": OURS}
    (folder / "config.json").write_text(json.dumps(raw))
    assert load(folder)[0].lm_head.bits == 4
    assert utils.load(str(folder))[0].lm_head.bits == 4
    assert main(["convert", "--model", str(folder), "--mlx-path", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert read_config(tmp_path / "out")[1]["quantization"]["bits"] == 4


@pytest.mark.parametrize(
    "foreign",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"bits": 4, "group_size": 128, "desc_act": False, "sym": True},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"config_groups": {}},
        {},
        "4 bits",
    ],
)
def test_settings_of_others_are_not_taken_for_them(foreign):
    assert "quantization" not in with_settings({"quantization_config": foreign})
    assert with_settings({"quantization_config": OURS})["quantization"] == OURS
    assert with_settings({"quantization_config": OURS, "quantization": {"bits": 8}})["quantization"] == {"bits": 8}
