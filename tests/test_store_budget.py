"""What a full store keeps, and what it does not even write."""

from __future__ import annotations

import time

import pytest

from ring_mlx.engine.snapshots import Store
from ring_mlx.engine.stored.keeping import STALE_S, Stored, in_order, kept
from tests.saver import make
from tests.sessions import DirectSession, Talk, options

BIG = 1 << 40
NOW = time.time()


def stored(name, parent, offset, age, kind="user", **sizes):
    return Stored(name, parent, offset, kind, NOW - age, sizes or {name: 10})


def names(found):
    return "".join(s.name for s in in_order(found))


CHAT = [stored("s", None, 5, 50, "system"), stored("a", "s", 10, 40), stored("b", "a", 20, 30), stored("c", "b", 30, 0)]


def test_earlier_places_go_before_other_conversations_by_age():
    others = [stored("x", "s", 9, 45), stored("y", "x", 12, 20), stored("z", None, 7, 10)]
    assert names([*CHAT, *others]) == "absxyzc"


def test_a_conversation_of_last_week_goes_before_all():
    assert names([*CHAT, stored("z", None, 7, STALE_S + 1)]) == "zabsc"


def test_what_is_kept_counts_shared_files_once():
    found = [stored("a", None, 10, 2, one=50, own=9), stored("b", "a", 20, 1, one=50, two=9)]
    assert [sorted(kept(found, budget)) for budget in (68, 67, 58)] == [["a", "b"], ["b"], []]
    assert kept([*found, stored("c", None, 99, 0, huge=1000)], 68) == {"a", "b"}, "it takes no other's place"


def blobs(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_what_would_go_at_once_is_not_written(tmp_path, monkeypatch):
    small, large = make(1, 20), make(2, 3000)
    store = Store(tmp_path, "mark", sum(p.nbytes for p in large.parts))
    assert store.save([small]) == 1
    monkeypatch.setattr("ring_mlx.engine.snapshots.store.write_blob", pytest.fail)
    before = blobs(tmp_path)
    assert store.save([large]) == 0
    assert (large.durable, large.saved, blobs(tmp_path)) == (False, False, before)
    assert store.deepest([*small.tokens, 0]) is not None


def test_a_growing_conversation_keeps_its_end_and_writes_no_more_than_that(tmp_path):
    store, last = Store(tmp_path, "mark", 250_000), None
    for n in range(1, 25):
        last = make(0, 20 * n, last.blocks if last else ())
        assert store.save([last]) == 1
        assert store.deepest([*last.tokens, 0]).offset == 20 * n
        assert sum(f.stat().st_size for f in blobs(tmp_path)) <= 250_000
    assert len(list(store.manifests())) >= 2


@pytest.mark.parametrize("conversations", [1, 2])
def test_after_a_restart_only_what_is_new_is_read(chat, tmp_path, conversations):
    """Of a disk that holds two snapshots, whatever else was said before."""
    settings = options(store=tmp_path, store_budget_bytes=150_000 * conversations, read_ahead=True)
    talks, worker = [[{"role": "user", "content": f"Talk {n}."}] for n in range(conversations)], None
    twin = Talk(DirectSession(*chat, options(read_ahead=True)), max_tokens=9)
    for turn in range(3):
        for n in range(conversations):
            worker = DirectSession(*chat, settings)
            talk = Talk(worker, max_tokens=9)
            (found, message, _), (best, _, _) = talk.ask(talks[n]), twin.ask(talks[n])
            assert turn == 0 or found.read_tokens == best.read_tokens
            talks[n] += [message, {"role": "user", "content": f"And {turn}?"}]
            for w in (worker, twin.session):
                w.use_idle_time(lambda: False)
    assert worker is not None
    files = [f.stat().st_size for f in blobs(tmp_path)]
    assert sum(files) <= 150_000 * conversations
    assert len(list(worker.reader.store.manifests())) < 7 * conversations, "not all of it fits"
