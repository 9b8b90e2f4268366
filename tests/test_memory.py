"""Sizes and refusals."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from ring_mlx import load_model, memory, weights
from ring_mlx.config import RingConfig
from ring_mlx.errors import NoFitError
from tests.tiny import config, make_model, save_hf, tokens

MINI = RingConfig.from_dict(
    config(
        hidden_size=2048,
        intermediate_size=5120,
        moe_intermediate_size=512,
        moe_shared_expert_intermediate_size=512,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        layer_group_size=5,
        group_norm_size=4,
        num_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        vocab_size=157184,
        max_position_embeddings=131072,
    )
)


def test_the_published_sizes_of_ring_mini():
    assert memory.parameter_count(MINI) == pytest.approx(16.4e9, rel=0.01)
    assert memory.cache_bytes(MINI, 0) == 16 << 20
    assert memory.cache_bytes(MINI, 1001) - memory.cache_bytes(MINI, 1000) == 8192


def test_parameter_count_is_that_of_the_modules():
    for changes in ({}, {"tie_word_embeddings": True}, {"num_experts": 0}):
        model = make_model(**changes)
        counted = sum(v.size for n, v in tree_flatten(model.parameters()) if v.ndim > 1)
        assert memory.parameter_count(model.config) == counted


def test_cache_bytes_is_that_of_a_cache():
    model = make_model()
    cache = model.make_cache()
    model(tokens(256), cache)
    assert memory.cache_bytes(model.config, 256, element_bytes=4) == cache.nbytes


def test_a_refusal_says_what_would_fit():
    with pytest.raises(NoFitError, match=r"needs 33\.\d GB .* can give 16\.0 GB; a 6-bit conversion would fit"):
        memory.check_fit(MINI, int(32.8e9), "ring", int(16e9))
    with pytest.raises(NoFitError, match="a 4-bit conversion would fit"):
        memory.check_fit(MINI, int(32.8e9), "ring", int(10.9e9))
    with pytest.raises(NoFitError, match=r"even at 4 bits it takes about 9\.2 GB"):
        memory.check_fit(MINI, int(32.8e9), "ring", int(6e9))
    memory.check_fit(MINI, int(9.2e9), "ring", int(16e9))


def test_limits_are_set(monkeypatch):
    seen = {}
    monkeypatch.setattr(mx, "set_cache_limit", lambda n: seen.update(cache=n))
    monkeypatch.setattr(mx, "set_memory_limit", lambda n: seen.update(memory=n))
    memory.bound_memory(100 << 30)
    assert seen == {"cache": 2 << 30, "memory": 100 << 30}
    memory.bound_memory(10 << 30)
    assert seen["cache"] == (10 << 30) // 20


@pytest.mark.parametrize(
    ("info", "budget"),
    [
        ({"max_recommended_working_set_size": 48 << 30, "memory_size": 64 << 30}, 48 << 30),
        ({"total_memory": 80 << 30, "memory_size": 64 << 30}, int((80 << 30) * 0.9)),
        ({"memory_size": 64 << 30}, int((64 << 30) * 0.9)),
        ({}, int(3000 * 4096 * 0.9)),
    ],
)
def test_the_budget_is_what_the_device_says(monkeypatch, info, budget):
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 3000}.get)
    assert memory.budget_bytes() == budget


@pytest.mark.parametrize("is_metal", [True, False])
def test_weights_are_wired_on_metal_only(monkeypatch, is_metal):
    wired = []
    monkeypatch.setattr(mx, "set_cache_limit", lambda n: None)
    monkeypatch.setattr(mx, "set_memory_limit", lambda n: None)
    monkeypatch.setattr(mx.metal, "is_available", lambda: is_metal)
    monkeypatch.setattr(memory, "maybe_set_recommended_wired_limit", lambda: wired.append(True))
    memory.bound_memory(1 << 30)
    assert wired == [True] * is_metal


@pytest.mark.parametrize(
    ("budget", "used", "room"),
    [
        (20 << 30, 8 << 30, 3 << 30),
        (20 << 30, 0, 4 << 30),
        (20 << 30, 20 << 30, 1 << 26),
        (1 << 30, (1 << 30) - (400 << 20), 100 << 20),
    ],
)
def test_snapshots_get_a_quarter_of_what_is_left(monkeypatch, budget, used, room):
    monkeypatch.setattr(memory, "budget_bytes", lambda: budget)
    monkeypatch.setattr(mx, "get_active_memory", lambda: used)
    assert memory.snapshot_budget_bytes() == room


def test_memory_is_bounded_before_weights_are_read(tmp_path, monkeypatch):
    order = []
    save_hf(tmp_path, config())
    for module, name in ((memory, "check_fit"), (memory, "bound_memory"), (weights, "give")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    load_model(tmp_path)
    assert order == ["check_fit", "bound_memory", "give"]


def test_the_budget_is_the_machines():
    assert 1 << 28 < memory.budget_bytes() < 1 << 45
