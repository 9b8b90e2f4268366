"""Manifests are verified once while their files stay as they are, and again when anything about them changes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from ring_mlx.engine.snapshots import Store
from ring_mlx.engine.stored import manifest as manifests
from tests.saver import make

BIG = 1 << 40


@pytest.fixture
def reads(monkeypatch):
    """The paths that were read, since the test cleared it."""
    found, read = [], manifests.read_manifest
    monkeypatch.setattr(manifests, "read_manifest", lambda path: (found.append(path), read(path))[1])
    return found


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Four snapshots, which have been verified; their files count as old."""
    monkeypatch.setattr(manifests, "SETTLED_NS", -(1 << 62))
    made = Store(tmp_path, "mark", BIG)
    made.save([make(n, 300 + n) for n in range(4)])
    assert len(list(made.manifests())) == 4
    return made


def changed(path):
    """Put another character for one of the manifest's, in place."""
    data = path.read_bytes()
    assert b'"kind": "test"' in data
    with path.open("r+b") as f:
        f.write(data.replace(b'"kind": "test"', b'"kind": "tesu"'))


def test_each_is_read_once(store, reads):
    assert len(list(store.manifests())) == 4
    assert reads == []
    store.save([make(9, 400)])
    assert len(reads) == 1, "the new one, when the budget is kept"
    assert len(list(store.manifests())) == 5


def test_damage_is_seen(store, reads):
    path, _ = next(store.manifests())
    changed(path)
    said = []
    assert [p for p, _ in store.manifests(said.append)] == sorted(store.paths())[1:]
    assert reads == [path]
    assert "does not match its checksum" in said[0]


def test_an_edit_is_seen_though_its_size_and_its_time_are_the_old(store):
    path, _ = next(store.manifests())
    before = path.stat()
    time.sleep(0.02)
    changed(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert len(list(store.manifests())) == 3


def test_a_right_edit_is_taken(store):
    path, manifest = next(store.manifests())
    text = manifests._text({**manifest, "kind": "user"})
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)
    assert [m["kind"] for _, m in store.manifests()] == ["user", "test", "test", "test"]


def test_what_another_process_removed_is_gone(store, reads):
    path, _ = next(store.manifests())
    subprocess.run([sys.executable, "-c", "import os, sys; os.unlink(sys.argv[1])", path], check=True)
    assert len(list(store.manifests())) == 3
    assert path not in store._manifests._known
    blobs = len(list(store.blobs.iterdir()))
    store.save([make(9, 400)])
    assert len(list(store.blobs.iterdir())) == blobs, "that of the one that is gone went, and one came"


def test_what_was_just_written_is_read_again(store, reads, monkeypatch):
    """A change within the same tick of the clock could not be told."""
    monkeypatch.setattr(manifests, "SETTLED_NS", 1 << 62)
    fresh = Store(store.root, "mark", BIG)
    for _ in range(2):
        assert len(list(fresh.manifests())) == 4
    assert len(reads) == 8


def test_what_is_remembered_is_bounded(store, reads, monkeypatch):
    monkeypatch.setattr(manifests, "MOST_KNOWN_NAMES", 5)
    fresh = Store(store.root, "mark", BIG)
    for _ in range(2):
        assert len(list(fresh.manifests())) == 4
    assert len(reads) == 6, "two of two files each fit"
