"""A full disk: snapshots give way to what cannot be read again, and a chat goes on without them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections import namedtuple

import numpy as np
import pytest

import ring_mlx
from ring_mlx.engine.events import Sampling
from ring_mlx.engine.session import Session
from ring_mlx.engine.snapshots import Store
from ring_mlx.engine.snapshots import store as store_module
from ring_mlx.engine.stored.folder import RESERVE_BYTES, room_bytes
from ring_mlx.errors import CacheFileError
from tests.saver import check, make

BIG = 1 << 40
MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def longer(snapshot):
    return np.append(snapshot.tokens, 98)


def free(place):
    return shutil.disk_usage(place).free


def test_snapshots_leave_the_reserve_free_and_the_oldest_go(small_disk):
    reserve = small_disk_reserve = 24 * MIB // 20
    store = Store(small_disk, "mark", BIG)
    for n in range(12):
        made = make(n, 12_000)
        store.save([made])
        assert free(small_disk) >= reserve - 200_000, small_disk_reserve
        assert check(store.deepest(longer(made))), "the newest is there"
    assert 2 <= len(list(store.manifests())) < 8
    assert store.deepest(longer(make(0, 12_000))) is None


def test_a_disk_that_others_fill_costs_no_answer_and_no_older_snapshot(small_disk):
    store = Store(small_disk, "mark", BIG)
    store.save([make(1, 2000)])
    (small_disk / "film").write_bytes(bytes(free(small_disk) - MIB // 2))
    with pytest.raises(CacheFileError, match="nearly full"):
        store.save([make(2, 30_000)])
    assert check(store.deepest(longer(make(1, 2000))))
    assert not list(small_disk.rglob(".writing-*"))


def test_free_disk_takes_no_more_than_it_needs(small_disk):
    stores = [Store(small_disk, name, BIG) for name in ("aaaa", "bbbb")]
    for n in range(4):
        stores[n % 2].save([make(n, 6000)])
    for n, one in enumerate(stores):
        for path, _ in one.manifests():
            os.utime(path, (n, n))
    (small_disk / "film").write_bytes(bytes(free(small_disk) - MIB // 2))
    freed = ring_mlx.free_disk(MIB, small_disk, small_disk)
    assert freed >= MIB // 2
    assert free(small_disk) >= MIB
    assert [len(list(s.manifests())) for s in stores] == [1, 2], "the model used last keeps its snapshots"
    ring_mlx.free_disk(1 << 40, small_disk / "film", small_disk)
    assert [len(list(s.manifests())) for s in stores] == [0, 0]
    assert (small_disk / "film").exists()


def test_free_disk_leaves_other_disks_and_no_store_alone(small_disk, tmp_path):
    Store(tmp_path / "store", "mark", BIG).save([make(1, 300)])
    assert ring_mlx.free_disk(1 << 60, small_disk, tmp_path / "store") == 0
    assert ring_mlx.free_disk(1 << 60, tmp_path, False) == 0
    assert ring_mlx.free_disk(1 << 60, tmp_path, tmp_path / "none") == 0
    assert ring_mlx.free_disk(1, tmp_path, tmp_path / "store") == 0
    assert ring_mlx.free_disk(1 << 60, tmp_path, tmp_path / "store") > 0


def answer_three_times(store, talk):
    """Why each answer of a session ended."""
    with Session(store=store) as session:
        ends = [list(session.send(talk, sampling=Sampling(temp=0.0), max_tokens=20))[-1] for _ in range(3)]
    return [end.reason for end in ends]


def test_a_session_on_a_full_disk_answers_and_says_once_that_it_saves_no_more(small_disk):
    (small_disk / "film").write_bytes(bytes(free(small_disk) - MIB // 2))
    talk = [{"role": "user", "content": "What is 27 + 35?"}]
    with pytest.warns(UserWarning, match=r"nearly full.*Nothing more is saved") as told:
        reasons = answer_three_times(small_disk / "store", talk)
    assert "error" not in reasons
    assert len(told) == 1


def test_the_reserve_is_a_part_of_a_small_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    for total, left, room in ((1 << 40, 1 << 30, (1 << 30) - RESERVE_BYTES), (20 * MIB, 3 * MIB, 2 * MIB)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, t=total, f=left: usage(t, t - f, f))
        assert room_bytes(tmp_path) == room


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_where_a_quota_ends_older_snapshots_make_room(tmp_path, monkeypatch, number):
    """A quota does not show in the free bytes of a disk."""
    store, write_blob, left = Store(tmp_path, "mark", BIG), store_module.write_blob, [2]
    store.save([make(1, 600), make(2, 600)])

    def full(*args):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        return write_blob(*args)

    monkeypatch.setattr(store_module, "write_blob", full)
    store.save([make(3, 600)])
    assert check(store.deepest(longer(make(3, 600))))
    assert len(list(store.manifests())) == 2


def test_a_store_on_a_disk_that_is_read_only_is_read(small_disk):
    store, made = Store(small_disk, "mark", BIG), make(1, 300)
    store.save([made])
    store.folder.chmod(0o755)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    reader = Store(small_disk, "mark", BIG)
    assert check(reader.deepest(longer(made)))
    with pytest.raises(CacheFileError, match="Read-only file system"):
        reader.save([make(2, 20)])
    assert ring_mlx.free_disk(1 << 60, small_disk, small_disk) == 0
