"""A wrapper runs once for each kind of arguments and choices; what it launched is repeated for all others of that kind."""

from __future__ import annotations

import mlx.core as mx
import pytest

from benchmarks.path_of_a_token import of_a_token
from metal_kernels import Experts, Matrices, Packed, choices, launch, recorded
from metal_kernels.constants import ints
from metal_kernels.launch import Kernel
from metal_kernels.recorded import NoKernelError, find, run
from tests.kernel_backends import takes

MOST_FILES, MOST_FUNCTIONS = 12, 77


class Sum(Kernel):
    """The sum of all inputs, so that each array that goes to a wrong place changes it."""

    def __init__(self):
        super().__init__(None, (), ())

    def __call__(self, inputs, **how):
        return [sum((i + 1) * x.sum() for i, x in enumerate(inputs)).reshape(1)]


SUM, ran = Sum(), []


def twice(x, y, weights, factor, none=None):
    """Its second launch reads the first's result, a constant and the weights."""
    ran.append(factor)
    if x.size > 100:
        raise NoKernelError("too many")
    (s,) = SUM.launch([x, y, ints(factor)], shapes=[(1,)], dtypes=[mx.float32])
    (t,) = SUM.launch([s, *weights.leaves, y], shapes=[(1,)], dtypes=[mx.float32])
    return t, x


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(choices, "NOTHING", choices.Held({}))
    ran.clear()


def packed(seed, shape=(4, 8)):
    keys = mx.random.split(mx.random.key(seed), 3)
    return Packed(*(mx.random.normal(shape, key=k) for k in keys), 4, 32, "affine")


def test_other_arrays_of_the_same_kind_are_launched_without_the_wrapper():
    x, y = mx.random.normal((3,)), mx.random.normal((3,))
    stacks, shared = [packed(n, (2, 64, 8)) for n in (5, 6, 7)], tuple(packed(n, (64, 8)) for n in (8, 9, 10))
    kinds = packed(1), Matrices(packed(2)), Matrices(packed(3), packed(4)), Experts(*stacks), Experts(*stacks, shared)
    for number, weights in enumerate(kinds, 1):
        run(twice, x, x, weights, 3)  # the same array in two places, which it is not later
        other = weights.map(lambda a: a + 1)
        found, expected = run(twice, x, y, other, 3), twice(x, y, other, 3)
        assert found[1] is x
        assert mx.allclose(found[0], expected[0])
        assert len(ran) == 2 * number


def test_what_makes_another_kind():
    x, w = mx.zeros((3,)), packed(1)
    plain = Packed(mx.zeros((4, 8)))
    for given in (
        (x, x, w, 1),
        (x, x, w, 2),
        (x[:2], x, w, 1),
        (x.astype(mx.float16), x, w, 1),
        (x, x, plain, 1),
        (x, x, Matrices(w), 1),
        (x, x, Matrices(w, w), 1),
        (x, x, packed(1, (5, 8)), 1),
        (x, x, w, 1, x),
    ):
        ran.clear()
        assert takes(twice, *given)
        run(twice, *given)
        assert len(ran) == 1, given
    ran.clear()
    with launch.use(launch.Backend("another", print)):
        run(twice, x, x, w, 1)
    assert len(ran) == 1


def test_a_refusal_is_kept_too_and_told_as_the_wrapper_tells_it():
    x, w = mx.zeros((101,)), packed(1)
    assert not takes(twice, x, x, w, 1)
    assert not takes(twice, x, x, w, 1)
    assert len(ran) == 1
    with pytest.raises(NoKernelError, match="too many"):
        run(twice, x, x, w, 1)


def test_other_choices_are_worked_out_anew_and_their_names_are_told_each_time():
    x = mx.zeros((3,))

    def choosing(x):
        ran.append(choices.variant("route", 1))
        return SUM.launch([x], shapes=[(1,)], dtypes=[mx.float32])

    with launch.use(launch.Backend("metal", print)):
        for _ in range(2):
            for chosen, seen in (({}, {"route/1"}), ({"route/1": "mlx"}, {"route/1"})):
                with choices.use(chosen) as asked:
                    run(choosing, x)
                assert asked == seen
        assert len(ran) == 2
        run(choosing, x)
        choices.apply({"prefill_step": 512}, "metal")
        run(choosing, x)
        choices.apply({}, "metal")
        run(choosing, x)
        assert len(ran) == 5
        with choices.use({"route/1": "mlx"}):
            assert find(choosing, (x[None],), "route")[0] is None
            assert find(choosing, (x[None],))[0] is not None
        del choices.applied["metal"]


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(recorded, "MOST_KEPT", 5)
    for n in range(30):
        run(twice, mx.zeros((n + 1,)), mx.zeros((1,)), packed(1), 1)
        assert len(choices.NOTHING.calls) <= 5


def test_a_wrapper_that_computes_with_its_arrays_is_refused():
    with pytest.raises(TypeError):
        run(lambda x: SUM.launch([x + 1], shapes=[(1,)], dtypes=[mx.float32]), mx.zeros((3,)))


def test_how_many_files_and_functions_a_decoded_token_goes_through():
    found = of_a_token()
    assert found.counts["files"] <= MOST_FILES, found.functions
    assert found.counts["functions"] <= MOST_FUNCTIONS, found.functions
    # So that it is no other path: kernels of both kinds of layer, of experts and of the dense block, in a compiled step.
    names = {f.partition(":")[0] for functions in found.functions.values() for f in functions}
    assert {"traced", "recur", "attend", "after_norm", "qkv_lightning_attn", "norm_router", "moe_kernel"} <= names
