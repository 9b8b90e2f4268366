"""Snapshots on disk: what is read back is right or absent, whatever happens to process, file or neighbour."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings

import mlx.core as mx
import numpy as np
import pytest

from ring_mlx.engine.snapshots import Snapshot, Store
from ring_mlx.errors import CacheFileError
from tests import saver
from tests.saver import check, make

BIG = 1 << 40


def longer(snapshot):
    """A prompt that goes on from a snapshot."""
    return np.append(snapshot.tokens, 98)


@pytest.fixture
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.saver"])
    return context


def test_what_is_saved_is_found(tmp_path):
    a, b = make(1, 300), make(2, 513)
    store = Store(tmp_path, "mark", BIG)
    assert store.save([a, b]) == 2
    assert a.saved
    assert store.save([a, b]) == 0
    other = Store(tmp_path, "mark", BIG)
    for s in (a, b):
        found = other.deepest(longer(s))
        assert check(found)
        assert (found.kind, found.saved, found.form) == ("test", True, (None,))
    assert other.deepest(a.tokens) is None, "a whole prompt needs logits"
    assert other.deepest(longer(a), longer_than=300) is None
    assert other.deepest(a.tokens[:200]) is None
    assert Store(tmp_path, "other model", BIG).deepest(longer(a)) is None


def test_logits_and_quantized_forms_come_back(tmp_path):
    made = make(1, 300)
    made.logits = mx.arange(7.0)[None]
    made.form = ((8, 32),)
    for part in made.parts:
        part.arrays = [x for a in part.arrays for x in mx.quantize(a, group_size=32, bits=8)]
    Store(tmp_path, "mark", BIG).save([made])
    found = Store(tmp_path, "mark", BIG).deepest(made.tokens)
    assert found.logits.tolist() == made.logits.tolist()
    assert found.form == ((8, 32),)
    for a, b in zip(found.parts, made.parts, strict=True):
        assert all(mx.array_equal(x, y) for x, y in zip(a.arrays, b.arrays, strict=True))


@pytest.mark.parametrize(("bits", "most"), [(8, 0.36), (4, 0.24)])
def test_fewer_bits_take_less_room(tmp_path, bits, most):
    made = make(3, 700)
    Store(tmp_path / "plain", "mark", BIG).save([make(3, 700)])
    Store(tmp_path / "small", "mark", BIG, kv_bits=bits).save([made])
    found = Store(tmp_path / "small", "mark", BIG).deepest(longer(made))
    assert check(found, 0.5)
    assert found.parts[0].arrays[0].dtype == mx.float32
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).rglob("*.safetensors")) for n in ("small", "plain")]
    assert sizes[0] < sizes[1] * most


def test_shared_blocks_are_stored_once(tmp_path):
    first = make(1, 512)
    second = make(1, 900, first.blocks)
    assert (second.tokens[:512] == first.tokens).all()
    Store(tmp_path, "mark", BIG).save([first, second])
    blobs = list(tmp_path.rglob("blobs/*.safetensors"))
    assert len(blobs) == 3 + 2
    Store(tmp_path, "mark", BIG).save([make(1, 600)])
    assert len(list(tmp_path.rglob("blobs/*.safetensors"))) == 6, "the same content has the same name"


def test_over_the_budget_the_oldest_leaf_goes(tmp_path):
    store, made = Store(tmp_path, "mark", BIG), [make(n, 300) for n in range(4)]
    child = make(0, 400, made[0].blocks)
    store.save([*made, child])
    for n, (path, _) in enumerate(sorted(store.manifests(), key=lambda found: found[1]["offset"])):
        os.utime(path, (n, n))
    assert store.deepest(longer(made[1])), "which is used now"
    size = sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    store.collect(size - 1)
    left = [s for s in (*made, child) if store.deepest(longer(s))]
    assert len(left) == 4
    assert made[1] in left
    assert store.deepest(longer(made[0])).offset == 300, "a parent outlives its child or its peers"
    store.collect(0)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.json"))


def test_a_long_conversation_keeps_its_newest_snapshot_over_the_budget(tmp_path):
    store, chain = Store(tmp_path, "mark", BIG), []
    for n in range(1, 7):
        chain.append(make(0, 100 * n, chain[-1].blocks if chain else ()))
        store.save(chain[-1:])
    for n, (path, _) in enumerate(sorted(store.manifests(), key=lambda found: found[1]["offset"])):
        os.utime(path, (n, n))
    size = sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    store.collect(size // 2)
    left = sorted(m["offset"] for _, m in store.manifests())
    assert left[-1] == 600
    assert len(left) < 6
    assert check(store.deepest(longer(chain[-1])))


def test_damage_in_a_store_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    store = Store(tmp_path, "mark", BIG)
    store.save([make(1, 300)])
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"damaged")

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    with pytest.warns(UserWarning, match="ignored, the prompt is read again"):
        assert Store(tmp_path, "mark", BIG).deepest(longer(make(1, 300))) is None


def damaged(path):
    """The ways in which a file can be bad."""
    whole = path.read_bytes()
    for part in range(1, 8):
        at = len(whole) * part // 8
        yield f"flipped {part}", lambda at=at: path.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
    yield "cut", lambda: path.write_bytes(whole[: len(whole) // 2])
    yield "edited", lambda: path.write_bytes(whole.replace(b'"states": 2', b'"states": 1'))
    yield "empty", lambda: path.write_bytes(b"")
    yield "gone", path.unlink
    yield "foreign", lambda: path.write_bytes(b'{"hello": "world"}')


def test_any_damage_is_passed_over_with_one_warning(tmp_path):
    first = make(1, 300)
    second = make(1, 700, first.blocks)
    Store(tmp_path / "good", "mark", BIG).save([first, second])
    files = [
        f.relative_to(tmp_path / "good")
        for f in (tmp_path / "good").rglob("*")
        if f.suffix in (".json", ".safetensors")
    ]
    assert len(files) == 6
    for n, name in enumerate(files):
        for how, _ in damaged(tmp_path / "good" / name):
            folder = tmp_path / f"{n}-{how}"
            shutil.copytree(tmp_path / "good", folder)
            dict(damaged(folder / name))[how]()
            store = Store(folder, "mark", BIG)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found = [store.deepest(longer(second)) for _ in range(3)]
            assert len(told) <= 1
            assert (
                told or how in ("gone", "edited") or all(f and f.offset == 700 for f in found) or ".json" in name.name
            )
            assert all(f is None or check(f) for f in found)
            store.save([make(1, 700)])
            assert check(store.deepest(longer(second))), "what was damaged can be saved anew"


def test_a_manifest_under_a_wrong_name_is_refused(tmp_path):
    a, b = make(1, 300), make(2, 300)
    store = Store(tmp_path, "mark", BIG)
    store.save([a, b])
    paths = {m["tokens"]: path for path, m in store.manifests()}
    one, two = paths.values()
    shutil.copy(one, two)
    fresh = Store(tmp_path, "mark", BIG)
    with pytest.warns(UserWarning, match=r"\[cache\] .* is damaged or foreign"):
        found = [fresh.deepest(longer(s)) for s in (a, b)]
    assert sum(f is not None for f in found) == 1
    assert all(f is None or check(f) for f in found)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheFileError, match="could not be written"):
        Store(tmp_path / "file", "mark", BIG).save([make(1, 10)])
    assert Store(tmp_path / "file", "mark", BIG).deepest(make(1, 10).tokens) is None


def test_killed_fifty_times_while_saving(tmp_path, processes):
    """After each kill the store opens, all that it names is whole, and a new process goes on.

    Half of the kills come before a random operation on a file, the others at a random moment after the first save.
    """
    chance, interrupted = random.Random(0), 0
    for n in range(50):
        saved = processes.Semaphore(0)
        last_step = chance.randrange(1, 60) if n % 2 else None
        process = processes.Process(target=saver.save_for_ever, args=(tmp_path, n * 1000, 3_000_000, saved, last_step))
        process.start()
        if last_step is None:
            assert saved.acquire(timeout=120), "nothing was saved"
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        store = Store(tmp_path, "mark", 3_000_000)
        interrupted += any(tmp_path.rglob(".writing-*"))
        for _, manifest in list(store.manifests())[-4:]:
            assert (tmp_path / "v1" / "mark" / "blobs" / f"{manifest['rest']}.safetensors").exists()
        for seed in range(n * 1000, n * 1000 + 3):
            sequence = np.append(make(seed, 700).tokens, 0)
            found = store.deepest(sequence)
            assert found is None or check(found)
    assert interrupted > 0, "no kill came while a file was written"
    assert len(list(store.manifests())) > 1
    store.collect()
    assert not list(tmp_path.rglob(".writing-*"))


def test_processes_share_a_store(tmp_path, processes):
    """Two writers whose budget evicts each other's snapshots, and a reader."""
    workers = [processes.Process(target=saver.save_some, args=(tmp_path, 7, 600_000, 25)) for _ in range(2)]
    for p in workers:
        p.start()
    store = Store(tmp_path, "mark", 600_000)
    while any(p.is_alive() for p in workers):
        for n in range(0, 25, 3):
            found = store.deepest(longer(make(7 + n, 300 + n)))
            assert found is None or check(found)
    for p in workers:
        p.join()
    assert [p.exitcode for p in workers] == [0, 0]
    found = [store.deepest(longer(make(7 + n, 300 + n))) for n in range(25)]
    assert any(found)
    assert all(f is None or check(f) for f in found)
    assert isinstance(next(f for f in found if f), Snapshot)
