"""Sizes and refusals."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from ring_mlx import Session, load_model
from ring_mlx.bench.random_weights import random_model
from ring_mlx.checkpoint import weights
from ring_mlx.distributed.loading import load_sharded
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.errors import NoFitError
from ring_mlx.model import memory
from ring_mlx.model.config import RingConfig
from ring_mlx.serve.engine import Settings
from tests.fake_mac import FREE, Mac
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


def test_a_mac_is_told_how_much_to_give_where_it_could(monkeypatch):
    Mac(monkeypatch).metal(max_recommended_working_set_size=24 << 30, memory_size=32 << 30)
    with pytest.raises(NoFitError, match=r"8-bit .* start: sudo sysctl iogpu\.wired_limit_mb=27648\.$"):
        memory.check_fit(MINI, int(28e9), "ring")
    with pytest.raises(NoFitError) as refused:
        memory.check_fit(MINI, int(31e9), "ring")
    assert "sysctl" not in str(refused.value)  # less than an eighth would be left
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": 32 << 30})
    assert memory.wired_limit_command(1 << 30) is None  # no Metal


@pytest.mark.parametrize(
    ("total", "most"), [(16 << 30, 12 << 30), (64 << 30, 56 << 30), (128 << 30, 112 << 30), (512 << 30, 448 << 30)]
)
def test_what_the_working_set_may_be_raised_to(monkeypatch, total, most):
    Mac(monkeypatch).metal(memory_size=total)
    assert memory.wired_limit_command(most) == f"sudo sysctl iogpu.wired_limit_mb={most >> 20}"
    assert memory.wired_limit_command(most - (1 << 29)) == f"sudo sysctl iogpu.wired_limit_mb={most >> 20}"
    assert memory.wired_limit_command(most + 1) is None


@pytest.mark.parametrize(("free", "is_short"), [(90, False), (20, True)])
def test_memory_that_other_programs_hold_is_a_warning(monkeypatch, free, is_short):
    Mac(monkeypatch, **{FREE: free}).metal()
    caught = pytest.warns(
        UserWarning, match=r"weights of ring take 20\.0 GB, but other programs leave 13\.7 GB now; close some"
    )
    with caught if is_short else nullcontext():
        memory.claim(MINI, int(20e9), "ring")


def test_a_model_that_does_not_fit_is_refused_at_every_door(tmp_path, monkeypatch, registered, chat_folder):
    monkeypatch.setattr(memory, "budget_bytes", lambda: 1000)
    doors = [
        lambda: load_model(chat_folder),
        lambda: Session(chat_folder, store=False).wait_until_loaded(60),
        lambda: LoadedModel.load(Settings(chat_folder, "x")),
        lambda: load_sharded(chat_folder, mx.distributed.init(), "tensor"),
        lambda: random_model("golden", bits=None),
        lambda: mlx_lm.load(str(chat_folder)),
    ]
    for door in doors:
        with pytest.raises(NoFitError, match=r"needs \d\.\d GB .* but this machine can give 0\.0 GB"):
            door()
    mlx_lm.load(str(chat_folder), lazy=True)  # a conversion reads it part by part


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
