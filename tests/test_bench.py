"""The benchmark: random weights, both engines, counted dispatches, hand-checked floors, and its files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks import report as red_or_green
from benchmarks import siblings
from metal_kernels import launch
from ring_mlx import demo_model_path, load_model
from ring_mlx.bench import machine, plot
from ring_mlx.bench import run as benchmark
from ring_mlx.bench.config import ALONE, BenchConfig, BenchError, Ranks
from ring_mlx.bench.dispatches import count_decode_step, count_primitives
from ring_mlx.bench.engines import OURS, Engine, seeded_cache, theirs
from ring_mlx.bench.floor import decode_bytes, prefill_operations, weight_bytes_read
from ring_mlx.bench.measure import Cell, Run, measure
from ring_mlx.bench.random_weights import random_model, random_model_of, random_words
from ring_mlx.bench.run import COLUMNS, LATER, Files
from ring_mlx.bench.shapes import GOLDEN, MINI, SHAPES, TINY, cut
from ring_mlx.checkpoint.weights import lies_by_columns
from ring_mlx.cli import main
from ring_mlx.model.config import RingConfig, read_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cli(capsys):
    def call(*args):
        try:
            code = main(["bench", *map(str, args)])
        except SystemExit as e:
            code = e.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def tiny():
    return random_model("tiny", 4, 32)


@pytest.fixture(scope="module")
def golden():
    """Ours and mlx-lm's, unquantized; mlx-lm wants head_dim = hidden_size / heads."""
    model = random_model("golden", None)
    return Engine(OURS, model), theirs(model, GOLDEN)


@pytest.mark.parametrize(
    ("error", "ranks", "expected"),
    [
        (
            RuntimeError("[metal::malloc]\n too much"),
            ALONE,
            "MLX gave up ([metal::malloc] too much); try shorter contexts",
        ),
        (MemoryError(), ALONE, "MLX gave up (MemoryError); try"),
        (OverflowError("int too large"), ALONE, "MLX gave up (int too large); try"),
        (OSError(5, "Input/output error"), ALONE, "could not be read or written ([Errno 5] Input/output error); check"),
        (RuntimeError("[send] rank 1 is gone"), Ranks(count=2), RuntimeError),  # the caller knows more
        (RuntimeError("too much"), Ranks(count=2), "MLX gave up (too much); try"),
        (BrokenPipeError(), ALONE, BrokenPipeError),
    ],
)
def test_what_mlx_or_a_disk_raises_is_one_line(error, ranks, expected):
    def make():
        raise error

    is_told = isinstance(expected, str)
    with pytest.raises(BenchError if is_told else expected) as raised:
        benchmark.bench(make, BenchConfig((16,)), Files(), ranks=ranks)
    assert not is_told or expected in str(raised.value)


@pytest.mark.parametrize(
    ("device", "is_metal", "named"), [(mx.cpu, True, "cpu"), (mx.gpu, True, "metal"), (mx.gpu, False, "cuda")]
)
def test_a_result_names_its_backend(monkeypatch, device, is_metal, named):
    monkeypatch.setattr(mx, "default_device", lambda: device)
    monkeypatch.setattr(mx.metal, "is_available", lambda: is_metal)
    with launch.use(launch.Backend("metal", None)):
        on = machine.describe()
    assert (on["backend"], on["kernels"]) == (named, "metal")


def test_random_words_are_evenly_distributed():
    mx.random.seed(3)
    words = np.asarray(random_words((64, 1000)))
    assert words.dtype == np.uint32
    assert len(np.unique(words)) > 0.999 * words.size
    shares = [((words >> bit) & 1).mean() for bit in range(32)]
    assert min(shares) > 0.49
    assert max(shares) < 0.51


def test_random_weights_have_the_spread_of_an_initialised_model(tiny):
    experts = tiny.layers[1].mlp.switch_mlp.up_proj
    w = mx.dequantize(experts.weight, experts.scales, experts.biases, 32, 4)
    assert w.shape == (8, 32, 64)
    assert abs(float(w.mean())) < 0.01
    assert float(w.std()) == pytest.approx(64**-0.5, rel=0.15)
    assert tiny.layers[1].mlp.gate.gate_proj.weight.dtype == mx.float32
    assert not tiny.training


def test_random_weights_depend_on_the_seed_alone(tiny):
    same, other = random_model("tiny", 4, 32), random_model("tiny", 4, 32, seed=1)
    for (name, a), (_, b) in zip(tree_flatten(tiny.parameters()), tree_flatten(same.parameters()), strict=True):
        assert mx.array_equal(a, b), name
    assert not mx.array_equal(tiny.lm_head.weight, other.lm_head.weight)
    logits = tiny(mx.array([[1, 2, 3]]))
    assert bool(mx.isfinite(logits).all())


def test_building_never_holds_weights_in_full_precision():
    raw = TINY | {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128, "num_experts": 64}
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = random_model_of(raw, "test", 4, 64, False, mx.float32, 0)
    held = mx.get_active_memory() - before
    words = model.layers[1].mlp.switch_mlp.up_proj.weight.nbytes
    assert mx.get_peak_memory() - before < held + 3 * words


def test_fewer_layers_keep_both_kinds():
    config = RingConfig.from_dict(cut(MINI, 2))
    assert [config.is_linear(i) for i in range(2)] == [True, False]
    assert cut(MINI, None) is MINI
    assert RingConfig.from_dict(cut(MINI, 10)).layer_group_size == 5


def test_softmax_siblings_have_no_linear_layer():
    config = RingConfig.from_dict(SHAPES["mini-softmax"])
    assert config.num_hidden_layers == 20
    assert not any(config.is_linear(i) for i in range(20))


def test_primitives_of_a_small_graph():
    x, y = mx.ones((2, 3)), mx.ones((3, 2))
    mx.eval(x, y)
    out = mx.exp(x) + y.T.reshape(2, 3)  # one exp, one add; transpose and reshape are views
    assert count_primitives(out) == {"Exp": 1, "Add": 1}
    assert count_primitives([out, {"a": (out, x)}]) == {"Exp": 1, "Add": 1}
    mx.eval(out)
    assert not count_primitives(out)
    (compiled,) = count_primitives(mx.compile(lambda a: mx.exp(a) + a * a)(x)).items()
    assert compiled[0].startswith("Compiled")
    assert compiled[1] == 1


def test_primitives_of_mlx_lms_decode_step():
    model, raw = load_model(demo_model_path()), read_config(demo_model_path())[1]
    other = theirs(model, raw)
    counts = count_decode_step(other, 1024)
    # 6 linear layers x 3 projections, 2 softmax x 2, 1 dense x 3, 7 shared experts x 3, the head
    assert counts["QuantizedMatmul"] == 6 * 3 + 2 * 2 + 3 + 7 * 3 + 1
    assert counts["GatherQMM"] == 7 * 3
    assert counts["LogSumExp"] == 1
    ours = count_decode_step(Engine(OURS, model), 1024)
    assert (ours["ArgReduce"], ours["LogSumExp"], ours["GatherQMM"]) == (1, 0, 7 * 3)


def test_mlx_lms_model_shares_our_arrays(golden):
    model, raw = load_model(demo_model_path()), read_config(demo_model_path())[1]
    for ours, other in (golden, (Engine(OURS, model), theirs(model, raw))):
        mine, yours = (dict(tree_flatten(e.model.parameters())) for e in (ours, other))
        assert mine.keys() == yours.keys()
        copied = {name for name in mine if mine[name] is not yours[name]}
        router = {name for name in mine if name.endswith(".mlp.gate.gate_proj.weight")}
        by_columns = {name for name in mine if lies_by_columns(name, mine[name])}
        assert by_columns <= copied <= router | by_columns
        for name in copied - router:
            assert mx.array_equal(mine[name], yours[name])
            assert memoryview(mine[name]).strides[-2:] == (4, 4 * mine[name].shape[-2])
            assert memoryview(yours[name]).strides[-1] == 4
    assert len(copied) < len(mine) / 10  # of the quantized model


def test_vs_refuses_what_mlx_lm_cannot_hold(tiny):
    with pytest.raises(BenchError, match=r"\[bench\] mlx-lm cannot hold this model"):
        theirs(tiny, TINY)  # its linear layers ignore head_dim
    with pytest.raises(BenchError, match="bailing_moe_v2"):
        theirs(tiny, SHAPES["mini-softmax"])


def test_a_long_prompt_is_read_for_mlx_lm(golden):
    ours, other = golden
    prompt = mx.arange(9, dtype=mx.int32)[None]
    cache = seeded_cache(ours, other, prompt, 4)
    read = other.make_cache()
    other.model(prompt, cache=read)
    assert cache[4].offset == read[4].offset == 9
    assert all(found[0].shape == wanted[0].shape for found, wanted in zip(cache[:4], read[:4], strict=True))
    assert mx.allclose(cache[0][0], read[0][0], rtol=1e-3, atol=1e-4)  # mlx-lm's decay differs from the second layer on


@pytest.mark.parametrize("rows", [1, 2])
def test_both_loops_give_as_many_tokens_as_asked(golden, rows):
    prompt = mx.random.randint(0, 128, (rows, 5), dtype=mx.int32, key=mx.random.key(0))
    for engine in golden:
        cache = engine.make_cache()
        assert len(list(engine.tokens(prompt, cache, 3, 2))) == 3
    ours = golden[0]
    alone = [int(t) for t, _ in ours.tokens(prompt[:1], ours.make_cache(), 3, 2)]
    if rows > 1:
        together = [int(t[0]) for t in ours.tokens(prompt, ours.make_cache(), 3, 5)]
        assert together == alone


def test_cells_hold_every_run_but_the_warm_up(golden):
    settings = BenchConfig((4, 6), generate=2, repeats=3, batch_sizes=(1, 2), vs=True, vs_repeats=2, vs_max_prefill=4)
    found = [c for cells in measure(*golden, settings, 128) for c in cells]
    assert [(c.batch, c.context, c.engine) for c in found[:3]] == [(1, 4, OURS), (1, 4, "mlx-lm"), (1, 6, OURS)]
    assert [len(c.runs) for c in found] == [3, 2] * 4
    assert [bool(c.prefill_tps()) for c in found] == [True, True, True, False] * 2
    assert all(c.peak_bytes() > 0 for c in found)


def test_speeds_count_all_rows():
    cell = Cell(OURS, 4, 100, [Run(2.0, 7.0, 5), Run(None, 8.0, 6)])
    assert cell.prefill_tps() == [200.0]
    assert cell.decode_tps() == [7.0, 8.0]
    assert cell.peak_bytes() == 6


def test_bytes_of_a_decode_step_by_hand(golden):
    model = golden[0].model
    c, total = model.config, 0
    width = 4 * 16
    for i in range(10):
        is_linear = i not in (4, 9)
        projections = 64 * (4 * width + width if is_linear else 2 * width + 2 * 2 * 16)
        norms = 2 * 64 + 2 * 16 + (width if is_linear else 0)
        mlp = 3 * 64 * 96 if i == 0 else 3 * 64 * 32 * (4 + 1) + 64 * 8 + 8
        total += projections + norms + mlp
    total += 64 * 128 + 64  # head and last norm, and not the embedding
    assert c.num_hidden_layers == 10
    assert weight_bytes_read(model, 1) == 4 * total
    assert decode_bytes(model, 1, 0) == 4 * total + 2 * 8 * 4 * 16 * 16 * 4
    assert decode_bytes(model, 1, 10) - decode_bytes(model, 1, 0) == 2 * 2 * 2 * 16 * 10 * 4
    everything = sum(a.nbytes for name, a in tree_flatten(model.parameters()) if "word_embeddings" not in name)
    assert weight_bytes_read(model, 10_000) == pytest.approx(everything)


def test_operations_of_a_prompt_by_hand():
    config = RingConfig.from_dict(GOLDEN)
    width, T = 64, 5
    linear = 2 * 64 * 5 * width + 4 * width * 16
    softmax = 2 * 64 * (2 * width + 2 * 2 * 16) + 2 * width * (T + 1)
    moe = 2 * (3 * 64 * 32 * 5 + 64 * 8)
    per_token = 8 * linear + 2 * softmax + 9 * moe + 2 * 3 * 64 * 96
    assert prefill_operations(config, T) == T * per_token + 2 * 64 * 128


def test_the_command_prints_and_writes_everything(cli, tmp_path):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "markdown")}
    options = [x for kind, path in files.items() for x in (f"--{kind}", path)]
    args = ["-p", "6,9", "-g", 2, "-n", 2, "--vs", "mlx-lm", "--vs-max-prefill", 6, "--floor", "--ops", *options]
    code, out, err = cli(*args)
    assert code == 0
    assert "the packaged toy" in err
    for text in (out, files["markdown"].read_text()):
        assert "mlx-lm 0.32" in text
        assert "prefill of floor" in text
        assert "GatherQMM" in text
    with files["csv"].open() as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == COLUMNS
    assert [(r["engine"], r["context"], r["runs"]) for r in rows] == [
        ("ring-mlx", "6", "2"),
        ("mlx-lm", "6", "2"),
        ("ring-mlx", "9", "2"),
        ("mlx-lm", "9", "2"),
    ]
    assert float(rows[0]["prefill_ratio"]) == pytest.approx(
        float(rows[0]["prefill_tps_median"]) / float(rows[1]["prefill_tps_median"]), rel=1e-3
    )
    assert rows[3]["prefill_tps_median"] == "" != rows[3]["decode_tps_median"]
    found = json.loads(files["json"].read_text())
    assert found["kernels"] == "none" or found["backend"] != "cpu"
    assert len(found["cells"]) == 4
    assert sum(found["primitives"]["mlx-lm"].values()) == found["cells"][1]["dispatches"]
    assert [("LogSumExp" in found["primitives"][name]) for name in ("ring-mlx", "mlx-lm")] == [False, True]
    assert cli("-p", 4, "-g", 1, "-n", 1, "--csv", files["csv"])[0] == 0
    assert len(files["csv"].read_text().splitlines()) == 6


def test_experts_read_on_demand_are_measured_and_said(cli, tmp_path):
    files = tmp_path / "x.csv", tmp_path / "x.json"
    args = ["-p", 6, "-g", 2, "-n", 1, "--expert-cache-bytes", "1MB", "--csv", files[0], "--json", files[1]]
    code, out, _ = cli(*args)
    assert code == 0
    assert "the packaged toy, experts in 0.001 GB: " in out
    assert "% in memory" in out.splitlines()[-1]
    with files[0].open() as f:
        (row,) = csv.DictReader(f)
    assert (row["ranks"], row["distributed"], row["expert_cache_gb"]) == ("1", "", "0.001")
    found = json.loads(files[1].read_text())
    assert found["expert_cache_gb"] == 0.001
    assert found["experts"]["decode"]["lookups"] > 0


def test_a_file_of_an_earlier_version_is_appended_to_where_nothing_is_lost(cli, tmp_path):
    path, earlier = tmp_path / "x.csv", [c for c in COLUMNS if c not in LATER]
    path.write_text(",".join(earlier) + "\n")
    assert cli("-p", 4, "-g", 1, "-n", 1, "--csv", path)[0] == 0
    with path.open() as f:
        (row,) = csv.DictReader(f)
    assert list(row) == earlier
    assert None not in row.values()
    code, _, err = cli("-p", 4, "-g", 1, "-n", 1, "--csv", path, "--expert-cache-bytes", "1MB")
    assert code == 2
    assert "it lacks expert_cache_gb" in err
    path.write_text(",".join(reversed(COLUMNS)) + "\n")
    assert "other columns" in cli("-p", 4, "--csv", path)[2]


def test_siblings_are_compared_at_what_both_have_of_one_day(tmp_path):
    path = tmp_path / "results.csv"
    rows = [("mini", 4096, 30, 9), ("mini", 4096, 40, 8), ("mini-softmax", 4096, 20, 16), ("mini", 8192, 5, 5)]
    lines = [
        f'2026-11-25T0{i}:00,H,"{name}, random",ring-mlx,1,{at},9,{p},{d}' for i, (name, at, p, d) in enumerate(rows)
    ]
    others = [
        '2026-11-25T09:00,H,"mini-softmax, random",mlx-lm,1,8192,9,1,1',
        '2026-11-26T09:00,H,"mini, random",ring-mlx,1,4096,9,7,7',
    ]
    header = "date,device,model,engine,batch,context,prefill_step,prefill_tps_median,decode_tps_median"
    path.write_text("\n".join([header, *lines, *others]) + "\n")
    assert list(siblings.pairs(path, "prefill", "mini")) == [(1, 4096, 40.0, 20.0)]
    (decode,) = (row for row in siblings.table(path, "mini") if row["part"] == "decode")
    shown = [f"{decode[name]:.2f}" for name in ("hybrid tok/s", "softmax tok/s", "ratio", "paper")]
    assert (decode["rows"], decode["context"], *shown) == (1, 4096, "8.00", "16.00", "0.50", "1.05")


def test_kept_results_can_be_appended_to():
    files = [p for p in (ROOT / "benchmarks" / "results").glob("*.csv") if not p.stem.endswith("_kernels")]
    assert files
    for path in files:
        Files(path).check()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--random", "mini", "--model", "x"], "makes its own weights"),
        (["--random", "golden", "--expert-cache-bytes", "1MB"], "random weights have none"),
        (["--vs", "mlx-lm", "--expert-cache-bytes", "1MB"], "mlx-lm would need all experts"),
        (["--floor", "--expert-cache-bytes", "1MB"], "rate of the disk"),
        (["--ops", "--expert-cache-bytes", "1MB"], "no graph of a whole step"),
        (["--layers", "2"], "add --random"),
        (["--random", "mini", "--layers", "21"], "more than the 20 of mini"),
        (["--random", "golden", "--bits", "4"], "too narrow"),
        (["--batch-size", "2000000", "-p", "2000"], "fewer rows or tokens"),
        (["-p", "8190"], "this model's context is 8192"),
        (["--csv", "no/such/folder.csv"], "folder that exists"),
        (["--json", "."], "cannot be written"),
        (["--csv", __file__], "other columns"),
    ],
)
def test_bad_input_is_one_line(cli, args, message):
    code, out, err = cli(*args)
    assert code == 2
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("ring-mlx: [bench] ")
    assert message in line


@pytest.mark.parametrize("value", ["", "x", "0", "5,", "-3", "1.5"])
def test_a_list_of_contexts_is_checked(cli, value):
    code, _, err = cli(f"-p={value}")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "[option]" in err


def test_default_contexts_fit_the_model():
    assert BenchConfig().fitted(131072).contexts == (512, 2048, 8192)
    assert BenchConfig().fitted(8192).contexts == (512, 2048)
    with pytest.raises(BenchError, match="give less"):
        BenchConfig(generate=100).fitted(200)


def test_a_plot_needs_matplotlib(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    code, _, err = cli("--plot", tmp_path / "x.png")
    assert code == 2
    assert "pip install matplotlib" in err


def test_a_plot_is_a_png(cli, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "x.png"
    assert cli("-p", "4,8", "-g", 1, "-n", 1, "--plot", path)[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("outcome", "code"), [("True", 0), ("False", 1)])
def test_nothing_is_reported_on_red_tests(capfd, tmp_path, outcome, code):
    test = tmp_path / "test_it.py"
    test.write_text(f"def test_it():\n    assert {outcome}\n")
    assert red_or_green.main(["--tests", str(test), "--", "-p", "4", "-g", "1", "-n", "1"]) == code
    out = capfd.readouterr().out
    assert ("decode tok/s" in out) == (code == 0)
    assert ("nothing is measured" in out) == (code == 1)
