"""Folders and repositories: found, fetched, resumed and refused, against a local server."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from ring_mlx.checkpoint.hub import hub_errors, resolve_model
from ring_mlx.errors import HubError
from tests.hub_server import COMMIT, HubServer, Repo
from tests.tiny import GOLDENS, config

NAME = "inclusionAI/Ring-tiny"
FILES = {
    "config.json": json.dumps(config()).encode(),
    "model.safetensors": os.urandom(400_000),
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"hi",
    "README.md": b"#" * 1000,
    "model.bin": b"x" * 1000,
    "modeling_ring.py": b"raise SystemExit",
    "picture.png": b"p" * 1000,
    "optimizer.pt": b"o" * 1000,
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}


@pytest.fixture
def hub():
    with HubServer() as server:
        server.repos[NAME] = Repo(dict(FILES))
        yield server


@pytest.fixture
def fetch(hub, tmp_path):
    """Resolves a name in a process of its own, since huggingface_hub reads its variables once."""

    def call(name=NAME, revision=None, **environment):
        code = (
            "import sys; from ring_mlx.checkpoint.hub import resolve_model; from ring_mlx.errors import RingError\n"
            "try: print(resolve_model(sys.argv[1], sys.argv[2] or None))\n"
            "except RingError as e: print(e, file=sys.stderr); sys.exit(2)"
        )
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [sys.executable, "-c", code, name, revision or ""],
            env=os.environ | variables | environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return call


def refused(result, match):
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2, result.stderr
    assert last.startswith("[hub] ")
    assert match in last, last
    assert "Traceback" not in result.stderr


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    assert resolve_model(GOLDENS / "mini_like") == GOLDENS / "mini_like"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert resolve_model("~/models") == tmp_path / "models"


@pytest.mark.parametrize(
    ("name", "revision", "match"),
    [
        ("./nowhere", None, "no such folder './nowhere'"),
        ("/no/where/at/all", None, "no such folder"),
        ("plain-name", None, "no such folder 'plain-name', and it is not owner/name"),
        ("", None, "no such folder ''"),
        (str(GOLDENS / "mini_like" / "config.json"), None, "is a file, not a folder"),
        (str(GOLDENS / "mini_like"), "main", "revision 'main' is for hub repositories"),
    ],
)
def test_names_that_are_neither(name, revision, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":
        monkeypatch.setattr("pathlib.Path.is_dir", lambda self: False)
        monkeypatch.setattr("pathlib.Path.exists", lambda self: False)
    with pytest.raises(HubError) as e:
        resolve_model(name, revision)
    assert match in str(e.value)


def test_only_what_is_needed_is_fetched_and_only_once(hub, fetch):
    result = fetch()
    assert result.returncode == 0, result.stderr
    folder = result.stdout.strip()
    assert set(os.listdir(folder)) == WANTED
    with open(os.path.join(folder, "model.safetensors"), "rb") as f:
        assert f.read() == FILES["model.safetensors"]
    assert set(hub.sent) == WANTED
    before = dict(hub.sent)
    assert fetch().stdout.strip() == folder
    assert hub.sent == before


def test_an_interrupted_download_goes_on_where_it_stopped(hub, fetch):
    content = os.urandom(25_000_000)  # the client writes 10 MiB at a time
    hub.repos[NAME].files["model.safetensors"] = content
    hub.faults.cut_after["model.safetensors"] = 22_000_000
    first = fetch(HF_HUB_DOWNLOAD_TIMEOUT="3")
    if first.returncode:
        refused(first, "goes on where it stopped")
        first = fetch()
    assert first.returncode == 0, first.stderr
    ranges = [s.range for s in hub.seen if s.path.endswith("model.safetensors") and s.method == "GET"]
    assert ranges[0] in (None, "bytes=0-")
    resumed_at = int(ranges[-1].removeprefix("bytes=").split("-")[0])
    assert 10_000_000 < resumed_at <= 22_000_000
    assert hub.sent["model.safetensors"] == 22_000_000 + 25_000_000 - resumed_at
    with open(os.path.join(first.stdout.strip(), "model.safetensors"), "rb") as f:
        assert f.read() == content


def test_a_revision_is_passed_on(hub, fetch):
    hub.repos[NAME].revisions = ("main", "v2", COMMIT)
    assert fetch(revision="v2").returncode == 0
    assert any("/v2" in s.path for s in hub.seen)


def test_what_the_hub_refuses(hub, fetch):
    refused(fetch("inclusionAI/nothing"), "no hub repository 'inclusionAI/nothing'")
    refused(fetch(revision="v9"), "has no revision 'v9'")
    hub.repos[NAME].gated = True
    refused(fetch(), "is gated; accept its licence")


def test_repositories_that_are_no_checkpoints(hub, fetch):
    hub.repos["a/b"] = Repo({n: c for n, c in FILES.items() if n != "config.json"})
    hub.repos["a/c"] = Repo({n: c for n, c in FILES.items() if n != "model.safetensors"})
    refused(fetch("a/b"), "a/b has no config.json")
    refused(fetch("a/c"), "a/c has no *.safetensors")


def test_offline(hub, fetch):
    refused(fetch(HF_HUB_OFFLINE="1"), "is not complete in the cache and HF_HUB_OFFLINE is set")
    folder = fetch().stdout.strip()
    assert fetch(HF_HUB_OFFLINE="1").stdout.strip() == folder
    assert fetch(HF_ENDPOINT="http://127.0.0.1:9").stdout.strip() == folder


def test_the_hub_cannot_be_reached(fetch):
    refused(fetch(HF_ENDPOINT="http://127.0.0.1:9"), "the hub cannot be reached (ConnectError)")


def test_the_hub_is_down(hub, fetch):
    hub.faults.status = 503
    refused(fetch(), "the hub answered 503")


@pytest.mark.parametrize(
    ("raised", "match"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full while downloading a/b"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full while downloading a/b"),
        (PermissionError(errno.EACCES, "Permission denied"), "is not writable"),
        (OSError(errno.EROFS, "Read-only file system"), "is not writable"),
        (OSError("Consistency check failed: file should be of size 9"), "downloading a/b failed (Consistency check"),
        (ValueError("odd"), "downloading a/b failed (odd)"),
    ],
)
def test_what_the_machine_refuses(raised, match):
    with pytest.raises(HubError) as e, hub_errors("a/b", None):
        raise raised
    assert match in str(e.value)


def test_a_full_disk_for_real(hub, fetch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(home)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        refused(fetch(), "the disk is full while downloading")
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_a_download_tells_its_bytes_and_not_its_files(monkeypatch, tmp_path):
    def snapshot_download(repo, tqdm_class, **_):
        with tqdm_class(desc="bytes", total=0, unit="B", unit_scale=True) as bar, tqdm_class(total=2) as files:
            bar.total += 5
            bar.refresh()
            for _ in range(2):
                bar.update(2)
                files.update()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes(b"")
        return str(tmp_path)

    told = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model(NAME, progress=lambda *step: told.append(step)) == tmp_path
    assert told == [(2, 5), (4, 5)]
