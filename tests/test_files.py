"""Files that are whole or absent after a power cut, private where they should be, and plain ones only."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import threading
import time

import pytest

from ring_mlx import write_text
from ring_mlx.convert import convert, verify
from ring_mlx.engine.snapshots import Store
from ring_mlx.system import files, leftovers
from tests.disk import Disk
from tests.saver import make
from tests.tiny import config, make_model, save_hf, tokens
from tui.config import Config
from tui.config import save as save_config


def save_snapshots(root):
    store = Store(root / "store", "mark", 1 << 40)
    first = make(1, 300)
    store.save([first])
    store.save([make(1, 700, first.blocks), make(2, 40)])


def save_prompt_cache(root):
    model = make_model()
    cache = model.make_cache()
    model(tokens(40), cache)
    for _ in range(2):
        cache.save(root / "made" / "prompt.cache", tokens(40)[0].tolist(), "mark")


def save_settings(root):
    save_config(root / "config" / "config.toml", Config(theme="x"))


def save_text(root):
    for text in ("one", "two"):
        write_text(root / "chat.md", text)


def save_model(root):
    source = root.parent / "source"
    save_hf(source, config(), shards=2)
    (source / "tokenizer_config.json").write_text("{}")
    layouts = ("stacked", "streamed")
    for layout in layouts:
        convert(source, root / layout, quantize=True, group_size=32, fit="rtn", expert_layout=layout)
        verify(root / layout)


WRITERS = [save_snapshots, save_prompt_cache, save_settings, save_text, save_model]


@pytest.mark.parametrize("write", WRITERS)
def test_after_a_power_cut_every_name_stands_for_a_whole_file(tmp_path, monkeypatch, write):
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(monkeypatch, root)
    write(root)
    assert disk.check() == []
    assert [p for p in root.rglob("*") if p.is_file() and p.name != ".lock"]


@pytest.mark.parametrize("write", WRITERS[:-1])
@pytest.mark.parametrize("lost", ["content", "name"])
def test_a_sync_that_is_left_out_is_noticed(tmp_path, monkeypatch, write, lost):
    root = tmp_path / "disk"
    root.mkdir()
    disk, sync_path = Disk(monkeypatch, root), files.sync_path

    def forgetful(path):
        if path.is_dir() != (lost == "name"):
            sync_path(path)

    for module in ("ring_mlx.system.files", "ring_mlx.engine.snapshots.packing", "ring_mlx.engine.snapshots.store"):
        monkeypatch.setattr(f"{module}.sync_path", forgetful)
    write(root)
    assert disk.check()


def test_the_whole_cache_of_the_disk_is_flushed_where_the_system_can(tmp_path, monkeypatch):
    asked, synced = [], []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda handle, what: asked.append(what))
    monkeypatch.setattr(os, "fsync", synced.append)
    write_text(tmp_path / "a", "x")
    assert (asked, synced) == ([51, 51], [])

    def refused(*_):
        raise OSError(25, "not for this file system")

    monkeypatch.setattr(fcntl, "fcntl", refused)
    write_text(tmp_path / "a", "y")
    assert len(synced) == 2


def test_only_a_folder_may_refuse_to_be_synced(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")

    def refuse(_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.sync_path(tmp_path)
    with pytest.raises(OSError, match="Invalid"):
        files.sync_path(tmp_path / "a")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277, 0o777])
def test_private_files_are_private_whatever_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        save_prompt_cache(tmp_path)
        save_snapshots(tmp_path)
    finally:
        os.umask(old)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_file_for_everybody_keeps_its_mode(tmp_path):
    write_text(tmp_path / "a", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "a").chmod(0o640)
    write_text(tmp_path / "a", "y")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def make_strange(path, kind):
    """Something that is not a file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        (path.parent / "target").write_bytes(b"x" * 99)
        path.symlink_to(path.parent / "target")
    elif kind == "socket":
        # The name of a socket must be short.
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("only root makes devices")


STRANGE = ["folder", "pipe", "link", "socket", "device"]


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file_is_neither_read_nor_locked(tmp_path, kind):
    path = tmp_path / "x"
    make_strange(path, kind)
    with pytest.raises(OSError, match="not a plain file"):
        files.read_bounded(path, 10)
    with pytest.raises(OSError, match="not a plain file"), files.locked(path):
        pass
    if kind != "link":
        with pytest.raises(OSError, match="it is there and not a file"):
            write_text(path, "x")
    assert not list(tmp_path.glob(".writing-*"))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert files.read_bounded(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        files.read_bounded(tmp_path / "x", 4)


def test_a_lock_is_waited_for_but_not_for_ever(tmp_path):
    held, free = threading.Event(), threading.Event()

    def hold():
        with files.locked(tmp_path / ".lock"):
            held.set()
            free.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(30)
    with pytest.raises(OSError, match="another process holds it"), files.locked(tmp_path / ".lock", wait_s=0.05):
        pass
    free.set()
    with files.locked(tmp_path / ".lock", wait_s=30):
        pass
    other.join()


def test_a_text_is_written_where_a_link_points_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("link", "loop"):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
    assert (tmp_path / "link").is_symlink()


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path):
    old = time.time() - 2 * leftovers.STALE_S
    names = {
        "stale": f".writing-{'a' * 16}.safetensors",
        "fresh": f".writing-{'b' * 16}.safetensors",
        "held": f".writing-{'c' * 16}.safetensors",
        "mine": ".writing-my-thesis.safetensors",
        "folder": f".writing-{'d' * 16}.safetensors",
        "link": f".writing-{'e' * 16}.safetensors",
        "target": "target",
    }
    paths = {kind: tmp_path / name for kind, name in names.items()}
    for kind, path in paths.items():
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(paths["stale"])
        else:
            path.write_text("half")
        if kind not in ("fresh", "link"):
            os.utime(path, (old, old))
    with paths["held"].open() as held:
        leftovers.hold(held.fileno())
        with files.unfinished(tmp_path) as writing:
            os.utime(writing, (old, old))
            leftovers._swept.clear()
            files.write_text(tmp_path / "new", "whole")
            assert writing.exists(), "a living writer's file is held"
    assert {p.name for p in tmp_path.iterdir()} == {*names.values(), "new"} - {names["stale"]}
    files.write_text(tmp_path / "new", "again")
    assert paths["held"].exists(), "a folder is looked at once"
