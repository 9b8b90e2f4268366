"""What is kept of a machine: merged between processes, never read for another machine, and never in the way."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from metal_kernels import machine
from metal_kernels.machine import CHOICES, PROOFS, Store

HERE = {"chip": "M1", "mlx": "1"}


def test_another_start_reads_what_one_wrote(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    Store(path, HERE).put(PROOFS, {"k": {"error": 0.5}})
    assert Store(path, HERE).get(PROOFS, "k") == {"error": 0.5}
    assert Store(path, HERE).all(CHOICES) == {}
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.json", "a.lock"]
    assert json.loads(path.read_text())["identity"] == HERE
    assert Store(path, {**HERE, "mlx": "2"}).all(PROOFS) == {}


def test_two_processes_keep_each_others_entries(tmp_path):
    one, two = Store(tmp_path / "a.json", HERE), Store(tmp_path / "a.json", HERE)
    assert one.all(PROOFS) == two.all(PROOFS) == {}
    one.put(PROOFS, {"a": {}, "gone": {}})
    two.put(CHOICES, {"b": {}})
    assert two.all(PROOFS) == {"a": {}, "gone": {}}
    two.put(PROOFS, {"gone": None})
    one.put(PROOFS, {"c": {}})
    found = Store(tmp_path / "a.json", HERE)
    assert (set(found.all(PROOFS)), found.all(CHOICES)) == ({"a", "c"}, {"b": {}})
    found.clear(PROOFS)
    assert Store(tmp_path / "a.json", HERE).all(PROOFS) == {}


def test_threads_and_processes_lose_nothing(tmp_path):
    def write(n):
        Store(tmp_path / "a.json", HERE).put(PROOFS, {str(n): {"n": n}})
        shared.put(CHOICES, {str(n): {}})

    shared = Store(tmp_path / "b.json", HERE)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert len(Store(tmp_path / "a.json", HERE).all(PROOFS)) == 40
    assert len(Store(tmp_path / "b.json", HERE).all(CHOICES)) == 40


def whole(**changed):
    return json.dumps({"format": 1, "identity": HERE, "proofs": {"k": {}}} | changed)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 100_000, b"\xff\xfe", whole()[:-1], whole(format=2), whole(identity={}),
     whole(proofs=[]), whole(proofs={"k": 3}), whole(proofs={"k": {}})[:-2] + " " * machine.MOST_BYTES + "}}"],
)  # fmt: skip
def test_a_broken_or_foreign_file_is_the_same_as_none(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    store = Store(path, HERE)
    assert store.all(PROOFS) == {}
    store.put(PROOFS, {"new": {}})
    assert Store(path, HERE).all(PROOFS) == {"new": {}}


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "no folder", "read-only", "no lock", "pipe as lock"])
def test_what_cannot_be_used_stays_in_memory(tmp_path, kind):
    folder, other = tmp_path / "m", tmp_path / "other.json"
    folder.mkdir()
    path, lock = folder / "a.json", folder / "a.lock"
    other.write_text(whole())
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(other)
    elif kind == "no folder":
        path = other / "a.json"
    elif kind == "read-only":
        folder.chmod(0o500)
    elif kind == "no lock":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    store = Store(path, HERE)
    assert store.all(PROOFS) == {}
    store.put(PROOFS, {"new": {}})
    assert store.all(PROOFS) == {"new": {}}
    assert other.read_text() == whole()
    assert not [p for p in folder.iterdir() if p.name.startswith(".writing")]
    folder.chmod(0o700)


def test_a_lock_that_is_never_given_back_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "LOCK_WAIT_S", 0.02)
    store = Store(tmp_path / "a.json", HERE)
    with open(tmp_path / "a.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = threading.Thread(target=store.put, args=(PROOFS, {"k": {}}), daemon=True)
        done.start()
        done.join(20)
        assert not done.is_alive()
        slept = []
        with monkeypatch.context() as m:
            m.setattr(machine.time, "sleep", slept.append)
            for _ in range(30):  # else a load would wait for each kernel
                assert not store.put(PROOFS, {"k": {}})
        assert len(slept) < 5
    assert store.all(PROOFS) == {"k": {}}
    assert not (tmp_path / "a.json").exists()
    store.put(PROOFS, {"later": {}})
    assert set(Store(tmp_path / "a.json", HERE).all(PROOFS)) == {"k", "later"}


def test_the_environment_moves_it_and_switches_it_off(tmp_path, monkeypatch):
    monkeypatch.delenv(machine.SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    usual = machine.store("metal")
    assert usual.path.parent == tmp_path / "ring-mlx" / "machine"
    assert machine.store("metal") is usual
    assert machine.store("cuda").path != usual.path
    monkeypatch.setenv(machine.SWITCH, str(tmp_path / "elsewhere"))
    assert machine.store("metal").path.parent == tmp_path / "elsewhere"
    monkeypatch.setenv(machine.SWITCH, "off")
    machine.store("metal").put(PROOFS, {"k": {}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["a long name", "a link to itself", "a file", "null"])
def test_a_folder_that_cannot_be_one_holds_nothing(tmp_path, monkeypatch, kind):
    folder = tmp_path / (300 * "a" if kind == "a long name" else "m")
    if kind == "a link to itself":
        folder.symlink_to(folder)
    elif kind == "a file":
        folder.touch()
    monkeypatch.setenv(machine.SWITCH, os.devnull if kind == "null" else str(folder))
    assert list(machine.peek(CHOICES, "k")) == []
    assert not machine.store("metal").put(PROOFS, {"k": {}})
    assert machine.store("metal").all(PROOFS) == {"k": {}}


@pytest.mark.parametrize("is_done", [False, True])
def test_an_interrupt_while_it_is_written_is_not_lost(tmp_path, monkeypatch, is_done):
    def interrupted(*names):
        if is_done:
            replace(*names)
        raise KeyboardInterrupt

    store, replace = Store(tmp_path / "a.json", HERE), os.replace
    with monkeypatch.context() as m:
        m.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.put(PROOFS, {"k": {}})
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".writing")]
    assert store.put(PROOFS, {"later": {}})
    assert set(Store(tmp_path / "a.json", HERE).all(PROOFS)) == {"k", "later"}


def test_a_number_that_json_has_not_keeps_no_other_entry_away(tmp_path):
    store = Store(tmp_path / "a.json", HERE)
    assert store.put(PROOFS, {"far": {"error": float("inf")}})
    assert store.put(PROOFS, {"later": {}})
    assert set(Store(tmp_path / "a.json", HERE).all(PROOFS)) == {"far", "later"}


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    store = Store(machine.cache_folder() / "machine" / "a.json", HERE)
    store.put(PROOFS, {"k": {}})
    assert store.all(PROOFS) == {"k": {}}


def test_the_identity_names_the_machine_and_nothing_private():
    found = machine.identity("metal")
    assert found["backend"] == "metal"
    assert all(isinstance(v, str) for v in found.values())
    assert {"chip", "os", "build", "mlx"} <= set(found)
    assert os.uname().nodename not in json.dumps(found)
