"""What only a GPU would choose: the backend that is detected, numbers made resident, steps that are copied or changed."""

from __future__ import annotations

import copy
from functools import partial

import mlx.core as mx
import pytest

from metal_kernels import launch, resident
from metal_kernels.twin import metal_kernel
from ring_mlx.generation.batch import Batch
from ring_mlx.generation.decoding import decode, prefill
from ring_mlx.model.decode_step import DecodeStep, _Weights
from ring_mlx.model.moe import ExpertLinear
from tests.compare import assert_close
from tests.kernel_backends import proving
from tests.tiny import make_model


@pytest.fixture
def gpu(monkeypatch):
    """The default device is a GPU; which of MLX's backends is there is still to be said."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.delenv(launch.SWITCH, raising=False)
    launch._detected.cache_clear()
    yield lambda module: monkeypatch.setattr(module, "is_available", lambda: True)
    launch._detected.cache_clear()


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_on_a_gpu_its_kernels_have_to_prove_themselves(gpu, name):
    gpu(getattr(mx, name))
    found = launch.backend()
    assert found.name == name
    assert found.constructor is (mx.fast.metal_kernel if name == "metal" else metal_kernel)
    assert found.ledger is not None
    assert launch.backend() is found
    assert found.ledger.entries() == []


def test_a_switch_and_a_gpu_without_backend_mean_plain_forms(gpu, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert launch.backend() is None
    launch._detected.cache_clear()
    gpu(mx.metal)
    monkeypatch.setenv(launch.SWITCH, "off")
    assert launch.backend() is None


@pytest.mark.parametrize("values", [[7], [5, 6], [1, 2, 3]])
def test_numbers_are_made_resident_on_cuda_and_stay_what_they_are(values):
    x = mx.array(values, mx.int32)
    with launch.use(launch.Backend("metal", print)):
        assert resident(x) is x
    with launch.use(launch.Backend("cuda", print)):
        found = resident(x)
    assert found is not x
    assert (found.tolist(), found.dtype) == (values, mx.int32)


def test_a_copied_step_is_of_the_copied_layers():
    layers = make_model(num_hidden_layers=3, layer_group_size=3).layers
    step = DecodeStep(layers)
    step._pieces = [([], None, print)]
    copied = copy.deepcopy(step)
    assert not copied._pieces
    assert copied.layers is not layers
    assert len(copied.layers) == 3


def test_a_weight_under_another_name_is_a_change():
    weights = [{"a": mx.zeros(3)}, [mx.ones(2)]]
    seen = _Weights(weights)
    assert not seen.have_changed()
    weights[0]["b"] = weights[0].pop("a")
    assert seen.have_changed()


def test_experts_with_a_bias_in_half_precision():
    linear = ExpertLinear(8, 5, 3, bias=True)
    linear.bias = mx.random.normal((3, 5))
    x, chosen = mx.random.normal((2, 2, 1, 8)), mx.array([[0, 2], [1, 0]])
    expected = linear(x, chosen)
    linear.set_dtype(mx.float16)
    assert_close(linear(x.astype(mx.float16), chosen), expected, 2e-3, mx.float16)


def broken(*_, **__):
    raise RuntimeError("Command buffer execution failed")


@pytest.mark.parametrize("loop", ["prompt", "tokens", "batch"])
def test_after_an_answer_that_failed_no_proof_is_trusted(monkeypatch, loop):
    model, where = make_model(num_hidden_layers=3, layer_group_size=3), proving(print)
    how = {"sampler": partial(mx.argmax, axis=-1)}  # the greedy choice has a kernel of its own, which does not run here
    batch = Batch(model)
    batch.add([1, 2, 3], **how)
    with launch.use(None):
        batch.step()
    monkeypatch.setattr(type(model), "__call__", broken)
    run = {
        "prompt": lambda: list(prefill(mx.arange(3), model, model.make_cache(), [3])),
        "tokens": lambda: list(decode(mx.zeros((1, 70)), model, model.make_cache(), mx.arange(3), **how)),
        "batch": batch.step,
    }[loop]
    with launch.use(where), pytest.raises(RuntimeError, match="Command buffer"):
        run()
    assert where.ledger.turned_off == 1
    with launch.use(None), pytest.raises(RuntimeError, match="Command buffer"):
        batch.step()
