"""What is kept of a model with an adapter, the commands that load one, and folders that hold none."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext

import mlx.core as mx
import pytest

from ring_mlx import Sampling, Session, load_model
from ring_mlx.cli import build_parser, main
from ring_mlx.cli.exit_codes import BAD_INPUT
from ring_mlx.distributed.rank import Rank
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.errors import OptionError, WeightsError
from ring_mlx.serve.engine import Settings
from tests.adapters import LINEAR, PLACES, RANK, SCALE, SOFTMAX, adapter, said, save, with_weights
from tests.compare import assert_close

# What is kept of another adapter is never used.


@pytest.fixture(scope="module")
def pair(chat_folder, tmp_path_factory):
    """Two adapters for `chat_folder` that differ in one number in the middle."""
    where, model = tmp_path_factory.mktemp("pair"), load_model(chat_folder)
    first, _ = adapter(where / "a", model, PLACES["softmax attention"])
    tensors = mx.load(str(first / "adapters.safetensors"))
    tensors[f"{SOFTMAX}.attention.dense.lora_b"][RANK // 2, 20] += 0.5
    return first, save(where / "b", tensors)


def test_whatever_changes_the_model_changes_the_fingerprint(chat_folder, pair, tmp_path):
    other = shutil.copytree(pair[0], tmp_path / "scale")
    settings(lora_parameters={"rank": RANK, "scale": SCALE / 2})(other)
    folders = [None, *pair, other]
    marks = [load_model(chat_folder, adapter_path=f).fingerprint for f in folders]
    assert len(set(marks)) == len(marks)
    assert all(len(m) == 32 for m in marks)
    again = shutil.copytree(pair[0], tmp_path / "again")
    assert load_model(chat_folder, adapter_path=again).fingerprint == marks[1]


def test_a_prompt_cache_belongs_to_one_adapter(chat_folder, pair, tmp_path, capsys):
    file = str(tmp_path / "prompt.safetensors")
    common = ["--model", str(chat_folder), "--prompt-cache-file", file, "--prompt", "one two"]
    assert main(["cache-prompt", *common, "--adapter-path", str(pair[0])]) == 0
    for options, is_taken in (
        (["--adapter-path", str(pair[0])], True),
        (["--adapter-path", str(pair[1])], False),
        ([], False),
    ):
        capsys.readouterr()
        assert (main(["generate", *common, "-m", "2", *options]) != BAD_INPUT) == is_taken
        assert ("[cache]" not in capsys.readouterr().err) == is_taken


def test_snapshots_belong_to_one_adapter(chat_folder, pair, tmp_path):
    messages = [{"role": "user", "content": "What is 2 + 3? " * 4}]
    read = []
    for folder in (pair[0], pair[1], None, pair[0]):
        with Session(chat_folder, adapter_path=folder, store=tmp_path, read_ahead=False) as session:
            list(session.send(messages, sampling=Sampling(temp=0), max_tokens=2))
            read.append(session.counters.reused_tokens)
    assert read[:3] == [0, 0, 0]
    assert read[3] > 0


def test_the_server_loads_it(chat_folder, pair):
    parts = LoadedModel.load(Settings(model=chat_folder, name="x", adapter_path=pair[0]))
    assert parts.model.fingerprint == load_model(chat_folder, adapter_path=pair[0]).fingerprint


def test_the_benchmark_loads_it_and_refuses_what_would_leave_it_out(chat_folder, pair, tmp_path, capsys):
    measure = ["bench", "--adapter-path", str(pair[0]), "-p", "4", "-g", "1", "-n", "1", "--json", str(tmp_path / "x")]
    assert main([*measure, "--model", str(chat_folder)]) == 0
    assert f"{chat_folder} with a" in (tmp_path / "x").read_text()
    for other in (["--random", "mini"], ["--vs", "mlx-lm"]):
        capsys.readouterr()
        assert main([*measure, *other]) == 2
        assert f"--adapter-path does not work with {' '.join(other)}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "serve", "bench"])
def test_several_processes_refuse_it(command, monkeypatch):
    monkeypatch.setattr(Rank, "together", lambda self: nullcontext())
    args = build_parser().parse_args([command, "--adapter-path", "x"])
    with pytest.raises(OptionError, match=r"--adapter-path does not work in several processes: .*mlx-lm fuse"):
        Rank(None, "tensor", None).check(args)


def test_an_adapter_of_nonsense_ends_in_a_line(chat_folder, pair, tmp_path, capsys):
    tensors = mx.load(str(pair[0] / "adapters.safetensors"))
    folder = save(tmp_path / "a", {name: t * float("nan") for name, t in tensors.items()})
    assert main(["generate", "--model", str(chat_folder), "--adapter-path", str(folder), "-p", "a"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ring-mlx: [model] ")
    assert err.count("\n") == 1


# Folders that are none, or not for this model.


def damaged_file(folder):
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def fifo(name):
    def make(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def settings(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensor(change):
    def rewrite(folder):
        file = str(folder / "adapters.safetensors")
        tensors = dict(mx.load(file))
        change(tensors)
        mx.save_safetensors(file, tensors)

    return rewrite


def foreign(folder):
    (folder / "adapters.safetensors").rename(folder / "adapter_model.safetensors")


DENSE = f"{SOFTMAX}.attention.dense"
BAD = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no tensors": (lambda f: (f / "adapters.safetensors").unlink(), "no adapters.safetensors"),
    "PEFT": (foreign, "PEFT's are not read"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not an object"),
    "config is a FIFO": (fifo("adapter_config.json"), "a FIFO"),
    "tensors are a FIFO": (fifo("adapters.safetensors"), "a FIFO"),
    "truncated": (damaged_file, "truncated or damaged"),
    "empty": (tensor(dict.clear), "holds no tensors"),
    "unknown kind": (settings(fine_tune_type="magic"), "fine_tune_type 'magic'"),
    "kind is no text": (settings(fine_tune_type=["lora"]), "fine_tune_type"),
    "no parameters": (settings(lora_parameters=None), "rank null"),
    "parameters are a list": (settings(lora_parameters=[1]), "rank null"),
    "alpha": (settings(lora_parameters={"rank": RANK, "alpha": 2}), "scale null"),
    "rank 0": (settings(lora_parameters={"rank": 0, "scale": 1}), "rank 0"),
    "rank true": (settings(lora_parameters={"rank": True, "scale": 1}), "rank true"),
    "huge rank": (settings(lora_parameters={"rank": 10**90, "scale": 1}), "misshapen"),
    "scale NaN": (settings(lora_parameters={"rank": RANK, "scale": float("nan")}), "scale NaN"),
    "scale infinite": (settings(lora_parameters={"rank": RANK, "scale": float("inf")}), "scale Infinity"),
    "scale text": (settings(lora_parameters={"rank": RANK, "scale": "2"}), "scale '2'"),
    "other rank": (settings(lora_parameters={"rank": RANK + 1, "scale": 1}), "misshapen"),
    "unknown layer": (tensor(lambda t: t.update({"model.layers.99.mlp.x.lora_a": mx.zeros((2, 2))})), "unknown"),
    "a norm": (tensor(lambda t: t.update({f"{LINEAR}.input_layernorm.lora_a": mx.zeros((48, RANK))})), "unknown"),
    "the model itself": (tensor(lambda t: t.update({"lora_a": mx.zeros((48, RANK))})), "unknown"),
    "an odd leaf": (tensor(lambda t: t.update({f"{DENSE}.lora_c": mx.zeros((2, 2))})), "unknown"),
    "half a pair": (tensor(lambda t: t.pop(f"{DENSE}.lora_b")), "missing"),
    "misshapen": (tensor(lambda t: t.update({f"{DENSE}.lora_b": mx.zeros((RANK, 7))})), "misshapen"),
    "integers": (tensor(lambda t: t.update({f"{DENSE}.lora_b": t[f"{DENSE}.lora_b"].astype(mx.int32)})), "no floats"),
    "DoRA without m": (settings(fine_tune_type="dora"), "missing"),
    "whole, but LoRA": (settings(fine_tune_type="full"), "unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_ends_in_a_line(chat_folder, pair, tmp_path, capsys, case):
    change, match = BAD[case]
    folder = save(tmp_path / "a", mx.load(str(pair[0] / "adapters.safetensors")))
    change(folder)
    assert main(["generate", "--model", str(chat_folder), "--adapter-path", str(folder), "-p", "a"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("ring-mlx: [weights] ")
    assert match in err
    assert len(err) < 1500


@pytest.mark.parametrize("path", ["./nowhere", "", "~nobody-here/x", "a" * 5000, "/dev/null"])
def test_a_path_that_is_no_folder(chat_folder, capsys, path):
    assert main(["generate", "--model", str(chat_folder), "--adapter-path", path, "-p", "a"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no adapter_config.json" in err


def test_experts_on_disk_have_no_adapter(chat_folder, pair, tmp_path):
    model = load_model(chat_folder)
    for kind in ("experts", "router", "shared expert"):
        folder, merged = adapter(tmp_path / kind, model, PLACES[kind])
        if kind == "experts":
            with pytest.raises(WeightsError, match="changes routed experts, which --expert-cache-bytes"):
                load_model(chat_folder, adapter_path=folder, expert_cache_bytes=1 << 20)
            continue
        found = load_model(chat_folder, adapter_path=folder, expert_cache_bytes=1 << 20)
        assert_close(said(found), said(with_weights(load_model(chat_folder), merged)), 1e-5)
