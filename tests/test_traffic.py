"""Launches at true shapes: threads that every pipeline allows, and bytes and lines that decode kernels ask for."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import mlx.core as mx
import pytest

from benchmarks.traffic import Launch, launches, measure, recorded, row, step_bytes, true_model
from metal_kernels import Experts, add_norm, choices, launch, moe_kernel, route
from metal_kernels.packed import Packed
from tests.kernel_backends import PIPELINE_THREADS
from tests.metal_sim.marks import needs_simulator

SIZES = {
    choices.HALF,
    choices.DOUBLE,
    choices.OTHER_WIDTH,
    "half first",
    "double first",
    "half second",
    "double second",
}


def most_threads(found: Iterable[Launch]) -> int:
    return max(prod(dict(one.call)["threadgroup"]) for one in found)


@pytest.fixture(scope="module")
def mini():
    """Three layers: dense and linear, experts and linear, experts and softmax; in 4 and 8 bits."""
    return [true_model("mini", bits, layers=3) for bits in (4, 8)]


@pytest.mark.parametrize("size", [choices.KERNEL, *sorted(SIZES)])
def test_no_launch_asks_for_more_threads_than_every_pipeline_allows(mini, size):
    models = [*mini, true_model("flash", 4, layers=3)]
    chosen = {name: size for name, entry in choices.TABLE.items() if size in entry.values_on("metal")}
    with choices.use(chosen):
        for tokens in (1, 3, 8, 512):
            for model in models:
                assert 64 <= most_threads(launches(model, tokens)) <= PIPELINE_THREADS


def test_nor_do_wider_models_and_more_experts():
    def run():
        route(mx.zeros((1, 1024)), None, 32, 1, 1, 1.0, True)
        add_norm(mx.zeros((1, 8192)), mx.zeros((1, 8192)), mx.zeros((8192,)), 1e-6)
        w = [Packed(mx.zeros((40, 64, 64))) for _ in range(3)]
        x, experts = mx.zeros((1, 64)), Experts(*w)
        moe_kernel(experts, x)(x, mx.zeros((1, 32), mx.int32), mx.zeros((1, 32)), experts, None)

    found = recorded(run)
    assert len(found) == 4
    assert most_threads(found) <= PIPELINE_THREADS


@needs_simulator
def test_decode_kernels_ask_for_each_byte_once_and_use_whole_lines(mini):
    """Nine threadgroups stand for all: one of each expert's, as a token has eight and the shared one."""
    found = {one: None for model in mini for one in launches(model, 1)}
    seen = set()
    for one in found:
        m = measure(one, threadgroups=9)
        if sum(m.needed.values()) < 100_000:
            continue
        seen.add(one.name.removeprefix("ring_"))
        assert 1 <= m.ratio(m.memory) <= 1.1, row(one, 1, m)
        assert m.line_use >= 0.9, row(one, 1, m)
    assert seen == {"fused_qmv", "fused_recurrent", "norm_router", "decode_gate_up", "decode_down"}


@needs_simulator
@pytest.mark.slow
def test_a_step_of_several_tokens_asks_for_what_its_experts_take():
    """As estimated from sizes, with experts drawn for each token alone: what several tokens share is read once."""
    model = true_model("mini", 4)
    one, *several = (step_bytes(model, tokens, threadgroups=160) for tokens in (1, 2, 3, 4, 8))
    for asked, estimate in zip(several, (1.33, 1.65, 1.96, 3.10), strict=True):
        assert asked / one == pytest.approx(estimate, rel=0.04)


def test_a_recorded_pass_computes_nothing_and_leaves_no_backend(mini):
    before = launch.backend()
    names = {one.name.removeprefix("ring_") for one in launches(mini[0], 512)}
    assert {"qk_norm_rope", "linear_gate", "segment_states", "simd_chunk"} <= names
    assert "grouped_down" not in names  # on Metal MLX's own product takes the experts of a prompt
    assert launch.backend() is before
