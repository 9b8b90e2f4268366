"""Sizes and refusals."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from ring_mlx import memory
from ring_mlx.config import RingConfig
from ring_mlx.errors import NoFitError
from tests.tiny import config, make_model, tokens

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


def test_the_budget_is_the_machines():
    assert 1 << 28 < memory.budget_bytes() < 1 << 45
