"""Snapshots in memory: blocks, the live cache, the tree and its budget."""

from __future__ import annotations

from collections import OrderedDict

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_mlx.engine.snapshots import BLOCK_TOKENS, Live, Snapshot, SnapshotTree, common_prefix
from ring_mlx.engine.snapshots.tree import PLACE_AGES
from ring_mlx.generation.decoding import prefill
from ring_mlx.model.kv_quantization import KVQuantization
from tests.compare import assert_close
from tests.tiny import make_model, softmax_config, tokens


@pytest.fixture(scope="module")
def model():
    return make_model()


def ids(T, seed=1):
    return np.array(tokens(T, seed=seed)[0], dtype=np.int32)


def feed(model, live, sequence, kv=None):
    """Run the model to the end of the sequence; the logits of the next token."""
    more = mx.array(sequence[len(live.tokens) :])
    for _, last in prefill(more, model, live.cache, [more.size], kv):
        logits = last
    live.advance(sequence)
    return logits


def plain(model, sequence):
    return model(mx.array(sequence)[None], last_only=True)[:, 0]


@pytest.mark.parametrize("T", [1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_live_cache_goes_back(model, T, elsewhere):
    """In the same buffer, where nothing is copied, or in another cache that has never seen the tokens."""
    live, sequence = Live(model.make_cache), ids(300)
    feed(model, live, sequence[:T])
    taken = live.snapshot("test")
    feed(model, live, sequence)
    if elsewhere:
        live = Live(model.make_cache)
    live.restore(taken)
    assert live.cache.offset == T
    other = np.concatenate([sequence[:T], ids(40, seed=5)])
    assert_close(feed(model, live, other), plain(model, other), 1e-4)
    live.restore(taken)
    assert_close(feed(model, live, sequence), plain(model, sequence), 1e-4)


def test_going_back_in_the_same_buffer_copies_nothing(model):
    live, sequence = Live(model.make_cache), ids(700)
    feed(model, live, sequence[:300])
    taken = live.snapshot("test")
    feed(model, live, sequence)
    mx.eval(live.cache.state)
    before, held = [c.keys for c in live.cache[2:]], mx.get_active_memory()
    live.restore(taken)
    assert all(c.keys is k for c, k in zip(live.cache[2:], before, strict=True))
    assert mx.get_active_memory() <= held


def test_a_partly_known_snapshot_is_completed(model):
    """The buffer shares 300 tokens with the snapshot of 600: only the rest comes from blocks."""
    live, sequence = Live(model.make_cache), ids(650)
    feed(model, live, sequence[:600])
    taken = live.snapshot("test")
    live.restore(None)
    feed(model, live, np.concatenate([sequence[:300], ids(200, seed=9)]))
    live.restore(taken)
    assert_close(feed(model, live, sequence), plain(model, sequence), 1e-4)


def test_snapshots_share_blocks_and_count_them_once(model):
    live, sequence = Live(model.make_cache), ids(900)
    tree, taken = SnapshotTree(1 << 40), []
    for end in (300, 600, 900):
        feed(model, live, sequence[:end])
        taken.append(tree.add(live.snapshot("test")))
    assert [len(s.blocks) for s in taken] == [1, 2, 3]
    assert taken[2].blocks[:2] == taken[1].blocks
    per_token = 3 * 2 * 2 * 16 * 4
    state = 2 * 6 * 16 * 16 * 4
    tails = sum(end % BLOCK_TOKENS for end in (300, 600, 900))
    assert tree.nbytes == (3 * BLOCK_TOKENS + tails) * per_token + 3 * state
    tree.remove(taken[2])
    assert tree.nbytes == (2 * BLOCK_TOKENS + tails - 900 % BLOCK_TOKENS) * per_token + 2 * state
    tree.remove(taken[0])
    tree.remove(taken[1])
    assert (tree.nbytes, len(tree)) == (0, 0)


def test_a_snapshot_does_not_keep_the_live_buffer(model):
    """What a snapshot holds is its own: going on writes in place and changes nothing of it."""
    live, sequence = Live(model.make_cache), ids(700)
    feed(model, live, sequence[:300])
    taken = live.snapshot("test")
    before = [np.array(a) for p in taken.parts for a in p.arrays] + [np.array(s) for s in taken.states]
    feed(model, live, sequence)
    after = [np.array(a) for p in taken.parts for a in p.arrays] + [np.array(s) for s in taken.states]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("start", [0, 400])
def test_quantized_keys_and_values_go_back(start):
    model, kv = make_model(head_dim=32), KVQuantization(8, 32, start)
    live, sequence, taken, expected = Live(model.make_cache), ids(650), [], []
    for end in (300, 500, 650):
        logits = feed(model, live, sequence[:end], kv)
        taken.append(live.snapshot("test", logits))
        expected.append(logits)
    assert (taken[0].form[0] is None) == (start > 300)
    assert taken[2].form == ((8, 32),) * 3
    for order in ((0, 2, 1), (2, 0, 1)):
        for n in order:
            live.restore(taken[n])
            assert live.cache.offset == taken[n].offset
            if n < 2:
                assert_close(feed(model, live, sequence[: taken[n + 1].offset], kv), expected[n + 1], 2e-2)


def test_a_model_without_linear_layers_goes_back():
    model = make_model(**{k: v for k, v in softmax_config().items() if k != "layer_group_size"})
    live, sequence = Live(model.make_cache), ids(60)
    feed(model, live, sequence[:30])
    taken = live.snapshot("test")
    feed(model, live, sequence)
    live.restore(taken)
    assert taken.states == []
    assert_close(feed(model, live, sequence), plain(model, sequence), 1e-4)


# The tree


def snapshot(sequence, nbytes=4, logits=False, kind=""):
    state, known = mx.zeros(nbytes // 4), mx.zeros(0) if logits else None
    return Snapshot(np.asarray(sequence, dtype=np.int32), [state], [], None, (), known, kind)


PREFIXES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)


@settings(deadline=None)
@given(PREFIXES, PREFIXES, st.lists(st.integers(0, 11), max_size=8))
def test_the_tree_finds_the_deepest_prefix(added, asked, removed):
    tree, held = SnapshotTree(1 << 40), {}
    for sequence in added:
        held[tuple(sequence)] = tree.add(snapshot(sequence))
    for n in removed:
        gone = held.pop(tuple(added[n % len(added)]), None)
        if gone:
            tree.remove(gone)
    assert len(tree) == len(held)
    assert tree.nbytes == 4 * len(held)
    for sequence in [*asked, *added]:
        prefixes = [h for h in held if h == tuple(sequence[: len(h)]) and len(h) < len(sequence)]
        found = tree.deepest(sequence)
        assert (found and tuple(found.tokens)) == max(prefixes, key=len, default=None)


def test_a_whole_prompt_needs_logits():
    tree = SnapshotTree(1 << 40)
    tree.add(snapshot([1, 2]))
    tree.add(snapshot([1, 2, 3]))
    assert tree.deepest([1, 2, 3]).offset == 2
    tree.add(snapshot([1, 2, 3], logits=True))
    assert tree.deepest([1, 2, 3]).offset == 3
    tree.add(snapshot([1, 2, 3]))
    assert tree.deepest([1, 2, 3]).logits is not None
    assert len(tree) == 2


class Reader:
    """Stands for one: what is held for it is let go with it."""


def tree_of(budget, *conversations, kind="user"):
    """A tree of 8-byte snapshots in which conversations were settled one after the other."""
    tree = SnapshotTree(1 << 40)
    for sequence in conversations:
        for end in range(1, len(sequence) + 1):
            tree.add(snapshot(sequence[:end], 8, kind=kind))
        tree.settle(sequence)
    tree.budget_bytes = budget
    tree.evict()
    return tree


def left(tree):
    return sorted(s.tokens.tolist() for s in tree)


def test_inner_places_go_before_the_first_ones_of_any_conversation():
    a, b = [1, 2, 3, 4], [5, 6, 7]
    assert left(tree_of(40, a, b)) == sorted([a[:3], a, b[:1], b[:2], b]), "the oldest inner ones first"
    assert left(tree_of(32, a, b)) == sorted([a[:3], a, b[:2], b])
    assert left(tree_of(24, a, b)) == sorted([a, b[:2], b]), "the older conversation's newest place"
    assert left(tree_of(16, a, b)) == sorted([a, b]), "where two conversations go on is worth more than an edit of one"
    assert left(tree_of(8, a, b)) == [b]
    assert left(tree_of(1, a, b)) == [b], "the latest conversation goes on, over the budget if need be"
    assert left(tree_of(0, a, b)) == []


def test_at_most_so_many_are_kept():
    tree, reader = SnapshotTree(1 << 40, 3), Reader()
    for end in range(1, 7):
        turn(tree, reader, list(range(end)))
        assert len(tree) == min(end, 3)
    assert tree.deepest(list(range(9))).offset == 6


def test_a_conversation_that_is_over_gives_way_to_edits_of_the_latest():
    tree = tree_of(1 << 40, [1, 2], *([[5, 6, 7]] * PLACE_AGES))
    tree.budget_bytes = 16
    tree.evict()
    assert left(tree) == [[1, 2], [5, 6, 7]]
    tree = tree_of(1 << 40, [1, 2], *([[5, 6, 7]] * (PLACE_AGES + 1)))
    tree.budget_bytes = 16
    tree.evict()
    assert left(tree) == [[5, 6], [5, 6, 7]]


def turn(tree, reader, sequence):
    """Read a prompt up to its answer's place as a reader does; returns where it started."""
    found = tree.deepest(sequence)
    if found is not None:
        tree.hold(reader, found)
    tree.add(snapshot(sequence, 8, kind="answer"), reader)
    tree.settle(sequence, reader)
    return found.offset if found else 0


def test_a_start_that_new_chats_share_is_kept_for_what_it_saves():
    tree, reader = SnapshotTree(24), Reader()
    tree.add(snapshot([1, 1], 8, kind="system"))
    assert [turn(tree, reader, [1, 1, 2 + n]) for n in range(40)] == [2] * 40
    assert left(tree) == [[1, 1], [1, 1, 40], [1, 1, 41]], "chats that are over go before it"
    talk = [1, 1, 41, 3, 4, 5]
    assert [turn(tree, reader, talk[:end]) for end in (4, 5, 6)] == [3, 4, 5]
    assert left(tree) == [[1, 1, 40], talk[:5], talk], "less than half of a chat is less than another answer"


def test_what_a_prompt_in_flight_has_got_to_stays():
    tree, readers = SnapshotTree(1), [Reader(), Reader()]
    for n, reader in enumerate(readers):
        tree.add(snapshot([n, 1], 8), reader)
        tree.add(snapshot([n, 1, 2], 8), reader)
    assert left(tree) == [[0, 1, 2], [1, 1, 2]], "each prompt its last one, whatever the other does"
    tree.settle([0, 1, 2], readers[0])
    assert left(tree) == [[0, 1, 2], [1, 1, 2]]
    tree.settle([1, 1, 2], readers[1])
    assert left(tree) == [[1, 1, 2]]
    tree.add(snapshot([7], 8), readers[0])
    del reader, readers
    tree.evict()
    assert left(tree) == [[1, 1, 2]], "a reader that failed holds nothing"


def test_the_end_of_a_prompt_takes_no_place_of_an_edit():
    tree = tree_of(24, [1, 2, 3])
    assert len(tree) == 3
    tree.add(snapshot([1, 2, 3, 4], 8, logits=True, kind="prompt"))
    assert left(tree) == [[1], [1, 2], [1, 2, 3]]


def test_dropping_one_of_thousands_looks_at_a_few():
    looked = []

    class Counted(OrderedDict):
        def __iter__(self):
            for key in super().__iter__():
                looked.append(key)
                yield key

    tree = SnapshotTree(8 * 1500)
    tree._ranks = tuple(Counted() for _ in tree._ranks)
    for n in range(2000):
        tree.add(snapshot([n, 1], 8))
        tree.add(snapshot([n, 1, 2], 8))
        tree.settle([n, 1, 2])
    assert len(tree) == 1500
    assert len(looked) < 5 * (4000 - 1500)


def test_common_prefix():
    a = np.array([1, 2, 3], dtype=np.int32)
    assert [common_prefix(a, np.array(b, dtype=np.int32)) for b in ([], [1], [1, 2, 3, 4], [1, 9, 3])] == [0, 1, 3, 1]
