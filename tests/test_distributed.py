"""Several processes on loopback give what one gives, hold a part each, and end together; run as a module it is a rank."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from metal_kernels import launch
from ring_mlx import demo_model_path, load_model
from ring_mlx.bench.random_weights import empty_model, random_model_of, random_sharded
from ring_mlx.bench.shapes import GOLDEN, TINY
from ring_mlx.checkpoint.loading import assemble
from ring_mlx.distributed import loading
from ring_mlx.distributed.failure import DistributedError
from ring_mlx.distributed.group import together
from ring_mlx.distributed.pipeline import stages
from ring_mlx.distributed.tensor import local_config
from ring_mlx.generation.decoding import generate_step
from ring_mlx.model.config import RingConfig, read_config
from ring_mlx.model.decay import decay_rate
from ring_mlx.tuning.kernel_check import check_kernels
from tests.compare import assert_close
from tests.kernel_backends import backends, proving
from tests.tiny import GOLDENS, config, make_model, save_hf, write

ROOT = Path(__file__).parent.parent
STEPS = 4
# 8 heads, 4 heads of keys and values and 4 norm groups, so that four ranks can share them; 4 layer groups and a tail.
FOUR = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "group_norm_size": 4,
    "num_hidden_layers": 9,
    "layer_group_size": 2,
    "moe_shared_expert_intermediate_size": 48,
}
# Each layer waits for all ranks twice where tensors are cut.
FEW_LAYERS = FOUR | {"num_hidden_layers": 3}
PACKED = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "group_norm_size": 2,
    "head_dim": 32,
}


class OneOf:
    """Stands for a group where only its numbers are asked for."""

    def __init__(self, rank, size):
        self._numbers = rank, size

    def rank(self):
        return self._numbers[0]

    def size(self):
        return self._numbers[1]


def part_of(folder, mode, rank, size):
    """What a rank reads, before it talks to the others."""
    model, arrays, *_ = assemble(folder, mx.float32)
    model.load_weights(list(arrays.items()))
    del arrays
    way = loading.WAYS[mode]
    way.check(model, size)
    way.cut(model, OneOf(rank, size))
    loading.read(model, dict(tree_flatten(model.parameters())), folder)
    return model


def save_packed(folder, bits, group_size, mode="affine", **changes):
    """A quantized checkpoint in the mlx-community form."""
    raw = config(**PACKED | changes)
    model = make_model(3, **PACKED | changes)
    nn.quantize(
        model,
        group_size,
        bits,
        mode=mode,
        class_predicate=lambda p, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % group_size == 0,
    )
    raw["quantization"] = {"group_size": group_size, "bits": bits, "mode": mode}
    write(folder, raw, dict(tree_flatten(model.parameters())), shards=2)


def prompt_of(model):
    return [(7 * i + 3) % model.config.vocab_size for i in range(23)]


def greedy(model):
    """Tokens after a prompt read in steps of 8."""
    steps = generate_step(prompt_of(model), model, model.make_cache(), max_tokens=STEPS, prefill_step_size=8)
    return [token for token, _ in steps]


def padded(model):
    """Logits of two rows, one padded on the left, in two calls that are computed at once at the end."""
    cache = model.make_cache(left_padding=[4, 0])
    ids = mx.array([prompt_of(model)[:12], prompt_of(model)[5:17]])
    return mx.concatenate([model(ids[:, :7], cache), model(ids[:, 7:], cache)], axis=1)


# What is drawn, by name: config.json and bits.
DRAWN = {
    "plain": (GOLDEN, None),
    "packed": (TINY | {"moe_intermediate_size": 64, "intermediate_size": 128, "vocab_size": 96}, 4),
}

# What a rank does.


def rank_main(jobs, out):
    """Load each (folder, mode), and write what it gives to ``out``/rank.json."""
    group = mx.distributed.init(strict=True)
    found = []
    for folder, mode in jobs:
        mx.reset_peak_memory()
        try:
            model = loading.load_sharded(folder.replace("RANK", str(group.rank())), group, mode)
        except DistributedError as e:
            found.append({"refused": str(e)})
            continue
        loaded = mx.get_active_memory()
        found.append(
            {
                "tokens": greedy(model),
                "padded": padded(model).tolist(),
                "layers": len(model.make_cache()),
                "parameters": sum(p.nbytes for _, p in tree_flatten(model.parameters())),
                "active": loaded,
                "peak": mx.get_peak_memory(),
            }
        )
        del model
        mx.clear_cache()
    (Path(out) / f"{group.rank()}.json").write_text(json.dumps(found))


def random_main(out):
    """Make parts of each model of `DRAWN`, and write what they give to ``out``/rank.json."""
    group = mx.distributed.init(strict=True)
    found = []
    for (raw, bits), mode in itertools.product(DRAWN.values(), ("tensor", "pipeline")):
        make = partial(empty_model, RingConfig.from_dict(raw), bits, 32, False)
        model = random_sharded(group, mode, make=make, name="drawn", dtype=mx.float32, seed=5)
        parameters = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
        found.append({"tokens": greedy(model), "padded": padded(model).tolist(), "parameters": parameters})
    (Path(out) / f"{group.rank()}.json").write_text(json.dumps(found))


def endless_main(folder):
    """Generate until something ends it; says so on standard error after a few tokens."""
    from ring_mlx.distributed.rank import joined
    from ring_mlx.errors import RingError

    try:
        with joined("tensor") as rank:
            model = loading.load_sharded(folder, rank.group, "tensor")
            for n, _ in enumerate(generate_step([1, 2, 3], model, model.make_cache(), max_tokens=10**6)):
                if n == 3:
                    print("under way", file=sys.stderr, flush=True)
    except RingError as e:
        print(f"ring-mlx: {e}", file=sys.stderr)
        raise SystemExit(2) from None


# How ranks are started.


def free_ports(count):
    """Ports that follow each other, as mlx.launch counts them, and that no other test gets while this process lives.

    They lie below those that systems give to everybody who asks, and below those that the launcher looks for itself.
    """
    while True:
        ports = range(first := random.randrange(10000, 20000), first + count)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            held = [stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in ports]
            for port, datagrams in zip(ports, held, strict=True):
                datagrams.bind(("127.0.0.1", port))
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            # What holds a port for datagrams leaves it to a rank for connections.
            for datagrams in held:
                datagrams.detach()
            return list(ports)


@contextlib.contextmanager
def ranks(tmp_path, size, *arguments, module="tests.test_distributed", stdout=None):
    """Processes of a module with a ring between them; killed at the end."""
    file = tmp_path / f"ring{size}.json"
    file.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    command = [sys.executable, "-m", module, *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        yield processes
    finally:
        for p in processes:
            if p.poll() is None:
                p.send_signal(signal.SIGCONT)
                p.kill()
            p.communicate()


def results(tmp_path, size, jobs):
    """What every rank found, by job."""
    with ranks(tmp_path, size, "jobs", json.dumps([(str(f), m) for f, m in jobs]), tmp_path) as processes:
        errors = [p.communicate(timeout=300)[1] for p in processes]
    assert [p.returncode for p in processes] == [0] * size, errors
    return list(zip(*(json.loads((tmp_path / f"{r}.json").read_text()) for r in range(size)), strict=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The jobs of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    save_packed(folder / "q4", 4, 64)
    save_packed(folder / "q3", 3, 64)
    save_packed(folder / "mxfp4", 4, 32, "mxfp4")
    save_hf(folder / "odd", config(num_attention_heads=9, num_key_value_heads=3, group_norm_size=3))
    for rank in range(2):
        save_hf(folder / f"seed{rank}", config(), seed=rank)
    save_hf(folder / "only0", config())
    jobs = {
        "seeds": folder / "seedRANK",
        "only": folder / "onlyRANK",
        "demo": demo_model_path(),
        "mini_like": GOLDENS / "mini_like",
        "flash_like": GOLDENS / "flash_like",
        **{n: folder / n for n in ("q4", "q3", "mxfp4", "odd")},
    }
    names = [(n, m) for n in jobs for m in ("tensor", "pipeline")]
    found = results(folder, 2, [(jobs[n], m) for n, m in names])
    return jobs, dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The jobs of four ranks."""
    folder = tmp_path_factory.mktemp("four")
    for name, sizes in (("few", FEW_LAYERS), ("four", FOUR)):
        save_hf(folder / name, config(**sizes), shards=3)
    jobs = {"demo": demo_model_path(), "flash_like": GOLDENS / "flash_like"}
    jobs |= {name: folder / name for name in ("few", "four")}
    names = [("demo", "tensor"), ("flash_like", "pipeline"), ("few", "tensor"), ("four", "pipeline")]
    found = results(folder, 4, [(jobs[n], m) for n, m in names])
    return jobs, dict(zip(names, found, strict=True))


def assert_equal_to_one(found, folder):
    """Every rank's tokens are those of one process, and its logits to within rounding."""
    alone = load_model(folder)
    tokens, logits = greedy(alone), padded(alone)
    for rank in found:
        assert rank["tokens"] == tokens
        assert_close(mx.array(rank["padded"])[:, 4:], logits[:, 4:], 1e-5)
    return alone


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((n, m) for n in ("demo", "mini_like", "q4", "q3", "mxfp4") for m in ("tensor", "pipeline")),
        ("flash_like", "tensor"),
        ("odd", "pipeline"),
    ],
)
def test_two_ranks_give_what_one_gives(two, name, mode):
    jobs, found = two
    alone = assert_equal_to_one(found[name, mode], jobs[name])
    layers = alone.config.num_hidden_layers
    counts = [rank["layers"] for rank in found[name, mode]]
    assert counts == [layers, layers] if mode == "tensor" else sum(counts) == layers and min(counts) > 0


@pytest.mark.parametrize(("name", "mode"), [("few", "tensor"), ("four", "pipeline")])
def test_four_ranks_give_what_one_gives(four, name, mode):
    jobs, found = four
    assert_equal_to_one(found[name, mode], jobs[name])


def test_what_cannot_be_cut_is_refused_on_every_rank(two, four):
    for jobs, key, why in (
        (two, ("odd", "tensor"), "num_attention_heads 9 does not divide among 2 ranks"),
        (two, ("flash_like", "pipeline"), "1 layer group cannot be shared out whole among"),
        (four, ("demo", "tensor"), "num_attention_heads 6 does not divide among 4 ranks"),
        (four, ("flash_like", "pipeline"), "1 layer group cannot be shared out whole among"),
    ):
        for rank in jobs[1][key]:
            assert rank["refused"].startswith(f"[distributed] {why}")


def test_ranks_that_differ_are_named_on_both(two):
    for rank in two[1]["seeds", "pipeline"]:
        assert "rank 1 (" in rank["refused"]
        assert "has other weights than rank 0" in rank["refused"]
    for rank in two[1]["only", "pipeline"]:
        assert rank["refused"].startswith("[distributed] rank 1 (")
        assert "only1" in rank["refused"]


def test_a_rank_holds_its_part_only(two, four):
    for jobs, key, share in (
        # Embedding, head and routers are whole on every rank.
        (two, ("demo", "tensor"), 0.58),
        (two, ("demo", "pipeline"), 0.58),
        (two, ("q4", "tensor"), 0.62),
        (four, ("few", "tensor"), 0.40),
        (four, ("four", "pipeline"), 0.40),
    ):
        folder = jobs[0][key[0]]
        whole = sum(p.nbytes for _, p in tree_flatten(load_model(folder).parameters()))
        for rank in jobs[1][key]:
            assert rank["parameters"] <= share * whole
            assert rank["active"] <= rank["parameters"] + 64_000


def test_ranks_draw_parts_of_one_random_model(tmp_path):
    with ranks(tmp_path, 2, "random", tmp_path) as processes:
        errors = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    both = zip(*(json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)), strict=True)
    for ((raw, bits), _), found in zip(itertools.product(DRAWN.values(), range(2)), both, strict=True):
        alone = random_model_of(raw, "drawn", bits, 32, False, mx.float32, 5)
        whole = sum(p.nbytes for _, p in tree_flatten(alone.parameters()))
        tokens, logits = greedy(alone), padded(alone)
        for rank in found:
            assert rank["tokens"] == tokens
            assert_close(mx.array(rank["padded"])[:, 4:], logits[:, 4:], 1e-5)
            assert rank["parameters"] < 0.8 * whole


# Why a model is refused, and what is read.


@pytest.mark.parametrize(
    ("changes", "size", "why"),
    [
        ({"num_attention_heads": 7, "num_key_value_heads": 7, "group_norm_size": 7}, 2, "num_attention_heads 7"),
        ({"group_norm_size": 2, "num_key_value_heads": 3}, 2, "num_key_value_heads 3 neither"),
        ({"group_norm_size": 3}, 2, "group_norm_size 3"),
        ({"group_norm_size": 2, "intermediate_size": 81}, 2, "intermediate_size 81"),
        ({"group_norm_size": 2, "moe_intermediate_size": 33}, 2, "moe_intermediate_size 33"),
        ({"group_norm_size": 2, "moe_shared_expert_intermediate_size": 41}, 2, "num_shared_experts x"),
    ],
)
def test_what_does_not_divide_is_named(changes, size, why):
    with pytest.raises(DistributedError, match=rf"\[distributed\] {why}.*pipeline\."):
        local_config(RingConfig.from_dict(config(**changes)), size)


def test_stages_are_whole_groups_with_the_tail():
    c = RingConfig.from_dict(config(**FOUR))
    assert stages(c, 2) == [(0, 4), (4, 9)]
    assert stages(c, 4) == [(0, 2), (2, 4), (4, 6), (6, 9)]
    assert stages(c, 5)[-1] == (8, 9)
    with pytest.raises(DistributedError, match=r"5 layer groups cannot .* at most 5 ranks"):
        stages(c, 6)


def test_a_cut_within_a_group_is_refused(tmp_path):
    save_packed(tmp_path, 4, 32, "mxfp4", moe_intermediate_size=96)
    with pytest.raises(DistributedError, match=r"down_proj has 96 columns in groups of 32.*2 parts of 48"):
        part_of(tmp_path, "tensor", 0, 2)


def test_parts_dequantize_to_the_whole(tmp_path):
    save_packed(tmp_path, 4, 64)

    def values(dense, group_size):
        assert dense.group_size == group_size
        return mx.dequantize(dense.weight, dense.scales, dense.biases, group_size, 4)

    parts = [values(part_of(tmp_path, "tensor", rank, 2).layers[1].attention.dense, 32) for rank in range(2)]
    assert mx.array_equal(mx.concatenate(parts, axis=-1), values(load_model(tmp_path).layers[1].attention.dense, 64))


@pytest.mark.parametrize(("size", "kv"), [(4, 4), (4, 2), (8, 2)])
def test_shares_of_every_block_add_up_with_biases(tmp_path, size, kv):
    sizes = FOUR | {"num_attention_heads": 8, "num_key_value_heads": kv, "group_norm_size": 8}
    save_hf(tmp_path, config(**sizes, use_bias=True, use_qkv_bias=True))
    whole = load_model(tmp_path)
    parts = [part_of(tmp_path, "tensor", rank, size) for rank in range(size)]
    x = mx.random.normal((2, 9, whole.config.hidden_size))
    for layer, *shares in zip(whole.layers, *(part.layers for part in parts), strict=True):
        mask = None if layer.is_linear else "causal"
        all_y = [each.attention(x, each.input_layernorm, mask, None, 0)[1] for each in (layer, *shares)]
        assert_close(sum(all_y[1:]), all_y[0], 1e-5)
        all_y = [each.mlp(x) for each in (layer, *shares)]
        assert_close(sum(all_y[1:]), all_y[0], 1e-5)


def test_an_error_of_many_letters_is_told():
    with pytest.raises(DistributedError, match=r"(?:\U0001f40d){1000}"), together(mx.distributed.init()):
        raise DistributedError("\U0001f40d" * 3000)


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_kernels_run_in_a_part(tmp_path, mode, backend):
    save_packed(tmp_path, 4, 32, decay_layer_offset=-1)
    c, model = read_config(tmp_path)[0], part_of(tmp_path, mode, 0, 2)
    rates = model.layers[0].attention.decay_rate
    assert mx.array_equal(rates, decay_rate(c.num_attention_heads, 0, c.num_hidden_layers, -1)[: len(rates)])
    where = proving(backend.constructor, backend.name)
    with launch.use(where):
        check_kernels(model)
    verdicts = {entry["operation"]: entry["passed"] for entry in where.ledger.entries()}
    assert {"lightning_attn", "qkv_lightning_attn", "norm_qmv", "decode_moe"} <= set(verdicts)
    assert all(verdicts.values())


# A rank that goes.


@pytest.mark.parametrize(
    ("size", "victim", "how"), [(2, 0, "KILL"), pytest.param(4, 2, "KILL", marks=pytest.mark.slow), (2, 1, "STOP")]
)
def test_a_lost_rank_ends_the_others(tmp_path, size, victim, how):
    with ranks(tmp_path, size, "endless", GOLDENS / "flash_like") as processes:
        for p in processes:
            assert p.stderr.readline() == "under way\n"
        processes[victim].send_signal(getattr(signal, f"SIG{how}"))
        started = time.monotonic()
        others = [p for rank, p in enumerate(processes) if rank != victim]
        said = [p.communicate(timeout=30)[1] for p in others]
        assert time.monotonic() - started < 10
        assert all(p.returncode not in (0, None) for p in others)
        for text in said:
            assert f"[distributed] rank {victim} (" in text or "has lost another" in text, said
        assert any(f"[distributed] rank {victim} (" in text for text in said), said
        assert not any("Traceback" in text for text in said)


def test_a_rank_lost_while_measuring_ends_the_others(tmp_path):
    words = ("bench", "--random", "golden", "-p", 6, "-g", 2000, "-n", 20)
    with ranks(tmp_path, 2, *words, module="ring_mlx", stdout=subprocess.PIPE) as processes:
        assert [processes[0].stdout.readline() for _ in range(3)][-1].startswith("  engine")
        processes[1].kill()
        started = time.monotonic()
        _, said = processes[0].communicate(timeout=30)
        assert time.monotonic() - started < 10
        assert processes[0].returncode not in (0, None)
    assert "[distributed] rank 1 (" in said
    assert "MLX gave up" not in said
    assert "Traceback" not in said


def refusal(size, folder):
    with pytest.raises(DistributedError) as e:
        local_config(read_config(folder)[0], size)
    return str(e.value)


def running():
    lines = subprocess.run(["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=True).stdout
    return [(int(line.split()[0]), line) for line in lines.splitlines()]


if __name__ == "__main__":
    if sys.argv[1] == "jobs":
        rank_main(json.loads(sys.argv[2]), sys.argv[3])
    elif sys.argv[1] == "random":
        random_main(sys.argv[2])
    else:
        endless_main(sys.argv[2])
