"""Slots of experts: none is filled again while something that reads it is still to be computed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from ring_mlx.checkpoint.safetensors_header import TensorSpec
from ring_mlx.errors import OptionError
from ring_mlx.experts import pool as pool_module
from ring_mlx.experts.layout import LayerPlaces, Piece, Place
from ring_mlx.experts.policies import POLICIES
from ring_mlx.experts.pool import Pool
from ring_mlx.experts.reader import ExpertReader
from ring_mlx.experts.slots import Slots, is_on_cuda
from ring_mlx.experts.statistics import Counts

WIDTH, EXPERTS = 64, 6

pytestmark = pytest.mark.skipif(is_on_cuda(), reason="experts on disk are refused there")


@pytest.fixture
def make_pool(tmp_path, monkeypatch):
    """A pool of experts that are their own number, where nothing is computed before somebody waits for it.

    A device that is slow does the same now and then; here it is certain.
    """
    file = tmp_path / "experts"
    file.write_bytes(np.repeat(np.arange(EXPERTS, dtype=np.float32), WIDTH).tobytes())
    nbytes = 4 * WIDTH
    part = TensorSpec("weight", "F32", (WIDTH,))
    places = LayerPlaces((part,), tuple(Place((Piece(file, e * nbytes, (0,)),), None) for e in range(EXPERTS)))
    monkeypatch.setattr(pool_module.mx, "async_eval", lambda *_: None)
    readers = []

    def make(slots, policy):
        readers.append(ExpertReader([file]))
        pool = Pool({0: places, 1: places}, Slots([part], slots, pool_module.mx.float32), readers[-1], policy != "none")

        def run(layer, needed, at_once=False):
            """What is computed with each part of the experts: 1 + their numbers, in the order of the parts."""
            order = []

            def compute(found):
                order.append(list(found))
                return pool.slots.arrays["weight"][pool_module.mx.array(list(found.values()))] + 1

            out = pool.run(layer, needed, compute, Counts(), at_once)
            return list(zip(order, out, strict=True))

        return run

    yield make
    for reader in readers:
        reader.close()


def check(results):
    for experts, y in results:
        expected = np.repeat(np.array(experts, dtype=np.float32)[:, None] + 1, WIDTH, axis=1)
        np.testing.assert_array_equal(np.array(y), expected)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("at_once", [True, False])
def test_a_slot_is_filled_again_only_when_what_reads_it_is_computed(make_pool, policy, at_once):
    run = make_pool(2, policy)
    first, second, third = run(0, [0, 1], at_once), run(0, [2, 3], at_once), run(1, [4, 0], at_once)
    check(third)
    check(second)
    check(first)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_more_experts_than_slots_wait_for_one_another(make_pool, policy):
    run = make_pool(3, policy)
    results = run(0, [5, 4, 3, 2, 1, 0])
    assert len(results) == 6
    check(run(1, [2, 1]))
    check(results)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_experts_that_are_held_stay_while_others_are_read(make_pool, policy):
    run = make_pool(2, policy)
    results = [pair for _ in range(5) for pair in run(0, [0])]
    results += run(0, [0, 1]) + run(0, [1, 2]) + run(1, [1]) + run(0, [2, 0])
    check(results[::-1])


def test_a_gpu_of_nvidia_is_refused(monkeypatch):
    part = TensorSpec("weight", "F32", (WIDTH,))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    with pytest.raises(OptionError, match="cannot work on"):
        Slots([part], 2, mx.float32)
