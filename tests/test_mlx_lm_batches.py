"""mlx-lm's batch generator and caches on our model: rows that differ in length, join and leave."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm import utils
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

from ring_mlx import mlx_lm_plugin
from ring_mlx.model.decode_step import DecodeStep
from tests.compare import assert_close
from tests.through_mlx_lm import said_alone
from tests.tiny import config, save_hf, tokens

pytestmark = pytest.mark.usefixtures("registered")
LENGTHS = (1, 2, 63, 64, 65, 130, 7)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_hf(folder, config())
    mlx_lm_plugin.register()
    return utils.load_model(folder)[0]


def prompt(n):
    return tokens(n, seed=n)[0].tolist()


@pytest.fixture(scope="module")
def alone(tiny):
    return {n: said_alone(tiny, prompt(n), 24) for n in LENGTHS}


def drain(generator, said, caches):
    while found := generator.next_generated():
        for r in found:
            said.setdefault(r.uid, []).append(r.token)
            if r.finish_reason:
                caches[r.uid] = r.prompt_cache


@pytest.mark.parametrize(("step", "rows"), [(2048, 8), (32, 3)])
def test_a_batch_says_what_each_prompt_says_alone(tiny, alone, step, rows):
    """Lengths differ, rows end at different times, and with fewer places than prompts later ones join earlier ones."""
    generator = BatchGenerator(tiny, prefill_step_size=step, prefill_batch_size=rows, completion_batch_size=rows)
    counts = [5, 24, 11, 1, 17, 8, 24]
    uids = generator.insert([prompt(n) for n in LENGTHS], max_tokens=counts)
    said, caches = {}, {}
    drain(generator, said, caches)
    for uid, n, count in zip(uids, LENGTHS, counts, strict=True):
        assert said[uid] == alone[n][:count]
    # What a row leaves behind goes on alone and in another batch, beside a new prompt.
    for n, count in ((65, 17), (130, 8), (1, 5)):
        uid = uids[LENGTHS.index(n)]
        again = BatchGenerator(tiny)
        old, new = again.insert([[3, 4], prompt(63)], max_tokens=[6, 9], caches=[caches[uid], None])
        found = {}
        drain(again, found, {})
        assert found[old] == said_alone(tiny, [*prompt(n), *alone[n][:count], 3, 4], 6)
        assert found[new] == alone[63][:9]


def test_a_row_may_be_removed_and_another_join_in_between(tiny, alone):
    generator, said = BatchGenerator(tiny, prefill_step_size=16), {}
    first = generator.insert([prompt(65), prompt(7)], max_tokens=[24, 24])
    for _ in range(4):
        for r in generator.next_generated():
            said.setdefault(r.uid, []).append(r.token)
    kept = generator.remove([first[1]], return_prompt_caches=True)[first[1]][0]
    late = generator.insert([prompt(130)], max_tokens=[10])
    drain(generator, said, {})
    assert said[first[0]] == alone[65]
    assert said[late[0]] == alone[130][:10]
    assert said[first[1]] == alone[7][: len(said[first[1]])]
    seen = kept[-1].offset
    whole = [*prompt(7), *alone[7]]
    logits = tiny(mx.array([whole[seen : seen + 1]]), cache=kept)
    assert_close(logits[:, -1], tiny(mx.array([whole[: seen + 1]]))[:, -1], 1e-4)


def merged(model, lengths):
    """The batch cache of prompts that were read alone, and a cache of each."""
    caches = []
    for n in lengths:
        cache = make_prompt_cache(model)
        if n:
            model(mx.array([prompt(n)]), cache=cache)
        caches.append(cache)
    return [parts[0].merge(list(parts)) for parts in zip(*caches, strict=True)]


def expected(model, lengths, more):
    return mx.concatenate([model(mx.array([prompt(n) * bool(n) + more]))[:, -1] for n in lengths])


def read(model, cache, more, rows):
    return model(mx.array([more] * rows), cache=cache)[:, -1]


@pytest.mark.parametrize("more", [[9], [9, 8, 7]])
def test_each_operation_of_a_batch_cache(tiny, more):
    cache = merged(tiny, [7, 65, 0, 2])
    assert_close(read(tiny, cache, more, 4), expected(tiny, [7, 65, 0, 2], more), 1e-4)
    cache = merged(tiny, [7, 65, 0, 2])
    for c, other in zip(cache, merged(tiny, [130, 0]), strict=True):
        c.extend(other)
    for c in cache:
        c.filter([0, 2, 3, 4, 5])
    rows = [7, 0, 2, 130, 0]
    assert_close(read(tiny, cache, more, 5), expected(tiny, rows, more), 1e-4)
    for row in (0, 1, 3):
        one = [c.extract(row) for c in cache]
        assert_close(read(tiny, one, [5], 1), expected(tiny, rows[row : row + 1], [*more, 5]), 1e-4)
    cache = merged(tiny, [7, 65])
    for c in cache:
        c.filter([0])
    assert_close(read(tiny, cache, more, 1), expected(tiny, [7], more), 1e-4)


@pytest.mark.parametrize("step", [2, 3, 100])
def test_right_padding_neither_enters_nor_decays_a_state(tiny, step):
    rows = [[5], [6, 7, 8, 9, 4], [6, 7, 1]]
    cache = merged(tiny, [7, 0, 65])
    for c in cache:
        c.prepare(lengths=[1, 5, 3], right_padding=[4, 0, 2])
    ids = mx.array([r + [0] * (5 - len(r)) for r in rows])
    for at in range(0, 5, step):
        tiny(ids[:, at : at + step], cache=cache)
    for c in cache:
        c.finalize()
    whole = [[*prompt(7), *rows[0]], rows[1], [*prompt(65), *rows[2]]]
    right = mx.concatenate([tiny(mx.array([[*w, 9]]))[:, -1] for w in whole])
    assert_close(read(tiny, cache, [9], 3), right, 1e-4)


def test_padding_is_forgotten_once_it_has_been_read(tiny):
    cache, alone_cache = merged(tiny, [0, 0]), make_prompt_cache(tiny)
    rows, single = mx.array([[0, 0, 5], [1, 2, 3]]), mx.array([[5]])
    for c in cache:
        c.left_padding = mx.array([2, 0])
        if not hasattr(c, "advance"):
            c.offset = mx.array([-2, 0])
    tiny(rows[:, :1], cache=cache)
    for at in (1, 2):
        assert cache[0].left_padding is not None
        logits = tiny(rows[:, at : at + 1], cache=cache)
    assert_close(logits[:1, -1], tiny(single, cache=alone_cache)[:, -1], 1e-4)
    logits = tiny(mx.array([[6], [6]]), cache=cache)
    assert all(c.left_padding is None for c in cache if hasattr(c, "advance"))
    assert_close(logits[:1, -1], tiny(mx.array([[6]]), cache=alone_cache)[:, -1], 1e-4)


@pytest.mark.parametrize("lengths", [[64], [64, 64], [7, 65]])
def test_a_batch_takes_the_compiled_step(tiny, alone, monkeypatch, lengths):
    taken = []
    run = DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, *a: taken.append(1) or run(self, *a))
    monkeypatch.setattr("ring_mlx.model.model.is_worthwhile", lambda: True)  # as on a GPU
    monkeypatch.setattr(tiny.model, "_step", None)
    monkeypatch.setattr(mx, "compile", lambda f, **_: f)
    generator, said = BatchGenerator(tiny), {}
    uids = generator.insert([prompt(n) for n in lengths], max_tokens=[9] * len(lengths))
    drain(generator, said, {})
    assert [said[u] for u in uids] == [alone[n][:9] for n in lengths]
    assert len(taken) >= 9
    tiny.model._step = None


def test_a_prompt_cache_file(tiny, tmp_path):
    cache = make_prompt_cache(tiny)
    tiny(mx.array([prompt(65)]), cache=cache)
    save_prompt_cache(str(tmp_path / "c.safetensors"), cache, {"model": "x"})
    loaded = load_prompt_cache(str(tmp_path / "c.safetensors"))
    assert loaded[0][0].dtype == mx.float32
    assert mx.array_equal(read(tiny, loaded, [9], 1), read(tiny, cache, [9], 1))
