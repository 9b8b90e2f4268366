"""Interrupted conversions: continued to the same bytes, refused where they may not be, and never taken for whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ring_mlx.checkpoint.shards import read_tensors
from ring_mlx.convert import conversion, convert, shard_files, verify, writer
from ring_mlx.convert.writer import MANIFEST, partial_folder
from ring_mlx.errors import ConvertError
from tests.kill_and_resume import folder_hashes
from tests.tiny import GOLDENS, config, save_hf

GOLDEN = GOLDENS / "mini_like"
ROOT = Path(__file__).parent.parent
OPTIONS = {"quantize": True, "bits": 8, "group_size": 32, "fit": "rtn", "shard_bytes": 200_000}


@pytest.mark.skipif(sys.platform == "darwin", reason="Metal does not survive a fork")
def test_killed_at_twenty_random_points_and_resumed_gives_the_same_bytes(tmp_path):
    save_hf(tmp_path / "hf", config(hidden_size=64, intermediate_size=96, moe_intermediate_size=64))
    killed_and_resumed(tmp_path / "hf", tmp_path, 20)


def killed_and_resumed(source, scratch, kills, **options):
    """All of them give the bytes of a conversion that was not killed, and nearly half died."""
    command = [sys.executable, "-m", "tests.kill_and_resume", str(source), str(scratch), str(kills), "7"]
    result = subprocess.run(
        [*command, json.dumps(options)], capture_output=True, text=True, check=False, cwd=ROOT, timeout=300
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found["resumed"]) == kills
    assert all(hashes == found["whole"] for hashes in found["resumed"])
    assert len([n for n in found["whole"] if n.endswith(".safetensors")]) > 3
    assert found["died"] >= kills * 9 // 20, "too few attempts were killed before they ended"


class Stopped(BaseException):
    """Stands for Ctrl-C in a test that counts."""


def stop_after(monkeypatch, shards):
    """Let the conversion stop once so many shards are finished."""
    whole = writer.PartialFolder.finish_shard

    def finish(self, shard, unfinished):
        whole(self, shard, unfinished)
        if len(self.done) == shards:
            raise Stopped

    monkeypatch.setattr(writer.PartialFolder, "finish_shard", finish)


def started(tmp_path, shards=2, **changes):
    """A conversion that stopped after so many shards; its target."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, shards)
        with pytest.raises(Stopped):
            convert(GOLDEN, tmp_path / "out", **OPTIONS | changes)
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def test_finished_shards_are_not_written_again(tmp_path, monkeypatch):
    target = started(tmp_path)
    kept = {p.name: p.stat().st_ino for p in partial_folder(target).glob("*.safetensors")}
    assert len(kept) == 2
    seen = []
    convert(GOLDEN, target, resume=True, **OPTIONS, progress=lambda done, total, *_: seen.append((done, total)))
    assert {n: (target / n).stat().st_ino for n in kept} == kept
    assert seen[-1][0] == seen[-1][1]
    assert seen[0][0] > 0.9 * sum((target / n).stat().st_size for n in kept) * 0.9
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert folder_hashes(target) == folder_hashes(convert(GOLDEN, tmp_path / "again", **OPTIONS))


def refused(match, *args, **kwargs):
    with pytest.raises(ConvertError, match=match) as e:
        convert(*args, **kwargs)
    assert str(e.value).startswith("[convert] ")
    assert "\n" not in str(e.value)


def test_an_unfinished_conversion_is_not_overwritten_and_only_continued_as_it_was_begun(tmp_path):
    target = started(tmp_path)
    before = folder_hashes(partial_folder(target))
    refused("add --resume to go on", GOLDEN, target, **OPTIONS)
    refused("another options", GOLDEN, target, resume=True, **OPTIONS | {"bits": 4})
    refused("another source", GOLDENS / "flash_like", target, resume=True, **OPTIONS)
    changed = shutil.copytree(GOLDEN, tmp_path / "mini_like")
    raw = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(raw | {"rope_theta": 1.0}))
    refused("another source_config_sha256", changed, target, resume=True, **OPTIONS)
    assert folder_hashes(partial_folder(target)) == before


def test_a_folder_that_it_did_not_start_is_left_alone(tmp_path):
    for name in ("out", ".out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
        for resume in (False, True):
            refused(
                "exists already|is in the way|no conversion.json", GOLDEN, tmp_path / "out", resume=resume, **OPTIONS
            )
        assert (tmp_path / name / "thesis.txt").read_text() == "mine"
        shutil.rmtree(tmp_path / name)


def test_resuming_what_is_finished_or_was_never_begun(tmp_path):
    target = convert(GOLDEN, tmp_path / "out", resume=True, **OPTIONS)
    before = folder_hashes(target)
    assert convert(GOLDEN, target, resume=True, **OPTIONS) == target
    assert folder_hashes(target) == before
    refused("exists already and was made otherwise", GOLDEN, target, resume=True, **OPTIONS | {"bits": 4})


def test_a_damaged_manifest_is_refused(tmp_path):
    target = started(tmp_path)
    for text in ("", "[]", '{"shards": 3}', '{"format": 1'):
        (partial_folder(target) / MANIFEST).write_text(text)
        refused("conversion.json is damaged", GOLDEN, target, resume=True, **OPTIONS)


def test_two_at_once(tmp_path):
    target = started(tmp_path)
    place = json.loads((partial_folder(target) / MANIFEST).read_text())
    holder = writer.PartialFolder(
        target, {k: v for k, v in place.items() if k not in ("format", "shards", "files")}, resume=True
    )
    refused("is being written by another process", GOLDEN, target, resume=True, **OPTIONS)
    holder.close()
    convert(GOLDEN, target, resume=True, **OPTIONS)


def test_a_full_disk_is_one_line_and_can_be_resumed(tmp_path, monkeypatch):
    write, left = shard_files.ShardFile.write, [40]

    def full(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args)

    monkeypatch.setattr(shard_files.ShardFile, "write", full)
    refused("the disk is full", GOLDEN, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    assert (partial_folder(tmp_path / "out") / MANIFEST).is_file()
    out = convert(GOLDEN, tmp_path / "out", resume=True, **OPTIONS)
    assert folder_hashes(out) == folder_hashes(convert(GOLDEN, tmp_path / "again", **OPTIONS))


def test_what_will_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    refused("needs 0.001 GB but 0.000 GB are free", GOLDEN, tmp_path / "out", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def command(*args, **kwargs):
    return subprocess.run(
        [sys.executable, str(ROOT / "convert.py"), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


def test_a_file_size_limit_is_one_line_and_exit_code_2(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    args = ("--model", GOLDEN, "--mlx-path", tmp_path / "out", "-q", "--q-group-size", "32", "--q-fit", "rtn")
    result = command(*args, preexec_fn=limit)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("ring-mlx: [convert] ")
    assert "a file may not grow that large here" in line
    assert not (tmp_path / "out").exists()
    assert command(*args, "--resume").returncode == 0


def test_verify_finds_what_changed(tmp_path):
    out = convert(GOLDEN, tmp_path / "out", **OPTIONS)
    files = len(list(out.iterdir())) - 1
    assert verify(out) == files
    shard = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConvertError, match=rf"{shard.name} in .* changed since the conversion"):
        verify(out)
    os.remove(shard)
    with pytest.raises(ConvertError, match=f"lacks {shard.name}"):
        verify(out)
    with pytest.raises(ConvertError, match=r"no conversion\.json"):
        verify(GOLDEN)


def damage(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_finished_shard_that_was_damaged_is_made_again(tmp_path):
    target = started(tmp_path)
    shards = sorted(partial_folder(target).glob("*.safetensors"))
    kept = shards[1].stat().st_ino
    damage(shards[0])
    convert(GOLDEN, target, resume=True, **OPTIONS)
    assert (target / shards[1].name).stat().st_ino == kept
    assert folder_hashes(target) == folder_hashes(convert(GOLDEN, tmp_path / "again", **OPTIONS))


def test_resuming_a_finished_folder_that_was_damaged_is_one_line(tmp_path):
    target = convert(GOLDEN, tmp_path / "out", **OPTIONS)
    damage(min(target.glob("*.safetensors")))
    refused("changed since the conversion", GOLDEN, target, resume=True, **OPTIONS)
    (target / "config.json").unlink()
    refused(r"lacks config\.json", GOLDEN, target, resume=True, **OPTIONS)


def test_other_weights_under_the_same_header_are_noticed(tmp_path):
    source = Path(shutil.copytree(GOLDEN, tmp_path / "mini_like"))
    shard = max(source.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "out", **OPTIONS)
    before, stat = shard.read_bytes(), shard.stat()
    tensor = max(read_tensors(source).values(), key=lambda t: (t.file == shard, t.nbytes))
    start = 8 + int.from_bytes(before[:8], "little") + (tensor.start + tensor.end) // 2
    shard.write_bytes(before[:start] + bytes(b ^ 1 for b in before[start : start + 2]) + before[start + 2 :])
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused("started with another source_samples; give", source, tmp_path / "out", resume=True, **OPTIONS)
    shard.write_bytes(before)
    refused("started with another source_times; give", source, tmp_path / "out", resume=True, **OPTIONS)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    out = convert(source, tmp_path / "out", resume=True, **OPTIONS)
    assert "source_times" not in json.loads((out / MANIFEST).read_text())
    # A finished folder knows samples, and no times.
    shard.touch()
    assert convert(source, tmp_path / "out", resume=True, **OPTIONS) == out
    shard.write_bytes(before[:start] + bytes(b ^ 1 for b in before[start : start + 2]) + before[start + 2 :])
    refused(r"made otherwise \(with another source_samples\)", source, tmp_path / "out", resume=True, **OPTIONS)


def test_a_conversion_that_an_older_version_began_can_be_continued(tmp_path):
    target = started(tmp_path)
    path = partial_folder(target) / MANIFEST
    manifest = json.loads(path.read_text())
    older = {k: v for k, v in manifest.items() if k not in ("source_samples", "source_times")}
    assert len(older) < len(manifest)
    path.write_text(json.dumps(older))
    assert convert(GOLDEN, target, resume=True, **OPTIONS) == target
