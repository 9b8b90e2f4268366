"""Sources on the hub, fetched or streamed, and results uploaded, against a local server."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil

import pytest

from ring_mlx import demo_model_path
from ring_mlx.convert import conversion, convert, remote
from ring_mlx.convert.writer import partial_folder, verify
from ring_mlx.errors import OptionError
from tests import hub_server
from tests.fuzz.server import Forks
from tests.hub_server import COMMIT, Faults, HubServer, Repo
from tests.kill_and_resume import folder_hashes
from tests.tiny import config, save_hf

NAME = "inclusionAI/Ring-tiny"
OPTIONS = ("-q", "--q-group-size", "32", "--q-fit", "rtn")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "Ring-tiny"
    save_hf(folder, config(hidden_size=64, intermediate_size=96, moe_intermediate_size=64, vocab_size=4000), shards=4)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model_path() / name, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    return folder


@pytest.fixture(scope="module")
def one_hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(one_hub, source):
    one_hub.repos = {NAME: Repo({p.name: p.read_bytes() for p in source.iterdir()})}
    one_hub.faults, one_hub.seen, one_hub.sent = Faults(), [], {}
    return one_hub


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """What runs ring-mlx convert against an endpoint, in forks of one process: huggingface_hub reads its variables once."""
    home = tmp_path_factory.mktemp("hub_home")
    variables = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def command(endpoint):
            forks = Forks(HF_ENDPOINT=endpoint, HF_HUB_DISABLE_PROGRESS_BARS="1", **variables)
            stack.callback(forks.close)
            return lambda *args: forks.call("tests.fuzz.doors:cli", ["convert", *map(str, args)])

        yield home, command


@pytest.fixture
def home(commands):
    """What has been downloaded; nothing at first."""
    folder, _ = commands
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@pytest.fixture
def command(hub, home, commands):
    """Runs ring-mlx convert against the server."""
    return commands[1](hub.url)


def test_a_dry_run_fetches_headers_only(hub, command, source):
    shards = {p.name for p in source.glob("*.safetensors")}
    result = command("--model", NAME, *OPTIONS, "--dry-run")
    assert result.code == 0, result.err
    assert "routed experts" in result.out
    assert "left in float" in result.out
    assert {n for n in hub.sent if n in shards} == shards
    for shard in shards:
        assert hub.sent[shard] <= 100_001 < (source / shard).stat().st_size
    local = command("--model", source, *OPTIONS, "--dry-run")
    assert local.out == result.out


def test_streamed_it_is_the_same_as_from_a_folder(hub, command, home, source, tmp_path):
    args = ("--model", NAME, "--mlx-path", tmp_path / "streamed", *OPTIONS, "--stream")
    result = command(*args, "--verify")
    assert result.code == 0, result.err
    assert result.err == ""
    assert "files are as they were written" in result.out
    plain = convert(source, tmp_path / "plain", quantize=True, group_size=32, fit="rtn")
    streamed, plain = folder_hashes(tmp_path / "streamed"), folder_hashes(plain)
    assert {n: h for n, h in streamed.items() if n not in ("README.md", "conversion.json")} == {
        n: h for n, h in plain.items() if n not in ("README.md", "conversion.json")
    }
    assert f"base_model: {NAME}" in (tmp_path / "streamed" / "README.md").read_text()
    text = tmp_path / "text.txt"
    text.write_text("What is 27 + 35?")
    reported = command(*args, "--resume", "--report", text)
    assert reported.code == 0, reported.err
    assert "KL mean" in reported.out
    assert not list(home.rglob("*.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", "streamed", "text.txt"]


def test_shards_are_fetched_once_and_dropped_after_use(source, tmp_path, monkeypatch):
    fetched, most = [], [0]

    def fetch(repo, file, local_dir, **_):
        local_dir.mkdir(exist_ok=True)
        shutil.copy(source / file, local_dir / file)
        fetched.append(file)
        most[0] = max(most[0], len(list(local_dir.iterdir())))
        return local_dir / file

    in_order = tmp_path / "in_order"
    save_in_order(source, in_order)
    monkeypatch.setattr(remote.huggingface_hub, "hf_hub_download", fetch)
    opened = conversion.open_source

    def as_repo(path, revision=None, remote_only=False):
        from dataclasses import replace

        return replace(opened(path), repo=("a/b", None))

    monkeypatch.setattr(conversion, "open_source", as_repo)
    source = in_order
    out = convert(in_order, tmp_path / "out", quantize=True, group_size=32, fit="rtn", stream=True)
    assert sorted(fetched) == sorted(p.name for p in in_order.glob("*.safetensors"))
    assert most[0] <= 2 < len(fetched)
    assert verify(out) > 1
    assert not partial_folder(out).exists()


def save_in_order(source, folder):
    """The source again in shards by layer, as real checkpoints are cut."""
    import mlx.core as mx

    tensors = {}
    for shard in source.glob("*.safetensors"):
        tensors |= mx.load(str(shard))
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    parts = {}
    for name, value in tensors.items():
        layer = int(name.split(".")[2]) if ".layers." in name else (-1 if "embed" in name else 9)
        parts.setdefault(layer, {})[name] = value
    weight_map = {}
    for i, part in enumerate(parts[k] for k in sorted(parts)):
        mx.save_safetensors(str(folder / f"model-{i}.safetensors"), part)
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_result_is_uploaded_whole(hub, command, source, tmp_path):
    result = command("--model", source, "--mlx-path", tmp_path / "out", *OPTIONS, "--upload-repo", "someone/Ring-4bit")
    assert result.code == 0, result.err
    assert "someone/Ring-4bit/commit" in result.out
    local = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert hub.repos["someone/Ring-4bit"].files == local


def test_what_the_hub_refuses_is_one_line(hub, command, source, tmp_path):
    def line(result):
        assert result.code == 2, result.err
        (last,) = result.err.splitlines()
        return last

    assert "no hub repository" in line(command("--model", "a/nothing", "--stream"))
    assert "has no revision 'v9'" in line(command("--model", NAME, "--dry-run", "--revision", "v9"))
    made = command("--model", source, "--mlx-path", tmp_path / "out", *OPTIONS)
    assert made.code == 0, made.err
    hub.faults.status = 503
    again = ("--model", source, "--mlx-path", tmp_path / "out", *OPTIONS, "--resume", "--upload-repo", "a/b")
    assert "uploading to a/b failed (the hub answered 503)" in line(command(*again))
    hub.faults.status = 401
    assert "log in with `hf auth login`" in line(command(*again))


def test_an_upload_target_that_is_no_name_is_refused_before_any_work():
    with pytest.raises(OptionError, match="--upload-repo 'nowhere' is not owner/name"):
        remote.check_repo_name("nowhere")


def test_one_commit_is_used_throughout_and_a_branch_that_moved_is_refused(hub, command, tmp_path, monkeypatch):
    args = ("--model", NAME, *OPTIONS)
    for how in ((), ("--stream",)):
        hub.seen.clear()
        target = tmp_path / "-".join(("out", *how))
        made = command(*args, *how, "--mlx-path", target)
        assert made.code == 0, made.err
        assert json.loads((target / "conversion.json").read_text())["source_commit"] == COMMIT
        fetched = [r.path for r in hub.seen if "/resolve/" in r.path]
        assert fetched
        assert all(f"/resolve/{COMMIT}/" in path for path in fetched)
    moved = "f" * 40
    hub.repos[NAME].revisions = ("main", COMMIT, moved)
    monkeypatch.setattr(hub_server, "COMMIT", moved)
    text = tmp_path / "text.txt"
    text.write_text("What is 27 + 35?")
    resume = (*args, "--stream", "--resume", "--mlx-path", target)
    refused = command(*resume)
    assert refused.code == 2
    (line,) = refused.err.splitlines()
    assert "made otherwise (with another source_commit)" in line
    hub.seen.clear()
    pinned = command(*resume, "--revision", COMMIT, "--report", text)
    assert pinned.code == 0, pinned.err
    assert not [r.path for r in hub.seen if moved in r.path or "/main" in r.path]


def test_a_hub_that_cannot_be_reached_is_one_line(command, commands, source, tmp_path):
    assert command("--model", NAME, "--dry-run").code == 0
    upload = ("--model", source, "--mlx-path", tmp_path / "out", "--upload-repo", "a/b")
    for args in (("--model", NAME, "--stream"), upload):
        result = commands[1]("http://127.0.0.1:9")(*args)
        assert result.code == 2
        assert result.err.splitlines()[-1].startswith("ring-mlx: [hub] ")
        assert "Traceback" not in result.err


def test_a_gated_repository_is_told_from_a_hub_that_cannot_be_reached(hub, command):
    assert command("--model", NAME, "--dry-run").code == 0
    hub.repos[NAME].gated = True
    result = command("--model", NAME, "--dry-run")
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert "is gated" in line
