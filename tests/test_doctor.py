"""The doctor: each check on sound and broken machines, and decays told apart by text written under each of them."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import constants
from packaging.specifiers import SpecifierSet

import ring_mlx
from metal_kernels import launch
from metal_kernels.linear_gate import fused as gate_kernel
from ring_mlx import demo_model_path, load, load_model
from ring_mlx.bench.shapes import FLASH, MINI
from ring_mlx.cli import main
from ring_mlx.convert import convert, verify
from ring_mlx.convert.sources import open_source
from ring_mlx.doctor import disk, kernels, machine, models, versions
from ring_mlx.doctor.decay_check import (
    Blocks,
    Measured,
    Verdict,
    affordable,
    announcement,
    compare,
    conclusion,
    decays,
    findings,
    judge,
    score,
    tokens_a_second,
)
from ring_mlx.doctor.decay_choice import choose, write_offset
from ring_mlx.doctor.decay_text import Part, Probe, packaged_parts, parts_of_file
from ring_mlx.doctor.finding import CHECKS, Finding, table
from ring_mlx.errors import NoFitError, OptionError, RingError, WeightsError
from ring_mlx.evaluation.perplexity import token_nats
from ring_mlx.experts import recommend_cache_bytes
from ring_mlx.model import memory
from ring_mlx.model.config import RingConfig
from ring_mlx.model.config_values import DECAY_OFFSETS
from ring_mlx.model.decay import decay_rate
from ring_mlx.system import install, macos
from tests.fake_mac import FREE, PRESSURE, Mac
from tests.kernel_backends import mutated, simulator
from tests.tiny import config, make_model, save_hf, softmax_config

GB = 10**9


def doctor(capsys, *arguments):
    """Exit code, and what was found by name."""
    code = main(["doctor", "--json", *map(str, arguments)])
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == sum(f["status"] == "problem" for f in found["findings"])
    return code, {f["name"]: f for f in found["findings"]}


def test_this_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10**12))
    code, found = doctor(capsys)
    assert code == 0
    expected = {"Python", "mlx", "mlx-lm", "system", "chip", "memory", "backend", "downloads", "Ring-mini-linear-2.0"}
    assert expected <= set(found)
    assert found["for models"]["data"]["bytes"] == memory.budget_bytes()
    assert all(f["remedy"] for f in found.values() if f["status"] != "ok")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "versions"
    assert lines[-1].startswith("0 problems, ")


@pytest.mark.parametrize(
    ("error", "said"),
    [(ImportError("no libmlx.so\nhere"), "no libmlx.so here"), (KeyError("x"), "failed (KeyError: 'x')")],
)
def test_a_check_that_fails_is_a_problem_and_the_others_go_on(capsys, monkeypatch, error, said):
    def fail():
        raise error

    for name in CHECKS:
        monkeypatch.setattr(f"ring_mlx.doctor.{name}.check", fail if name != "versions" else versions.check)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out.count(said) == len(CHECKS) - 1
    assert "mlx-lm" in out
    assert out.splitlines()[-1] == f"{len(CHECKS) - 1} problems, 0 notes"


def test_a_table_has_sections_statuses_and_remedies():
    found = [Finding("a", "x", "ok", "1"), Finding("a", "long", "problem", "2", "do"), Finding("b", "y", "note", "3")]
    assert table(found).splitlines() == [
        "a",
        "  ok       x     1",
        "  problem  long  2",
        "                 -> do",
        "b",
        "  note     y     3",
        "1 problem, 1 note",
    ]


def test_ranges_of_the_checkout_and_of_the_installed_package_agree(monkeypatch, tmp_path):
    here = versions.ranges()
    assert {"mlx", "mlx-lm", "numpy", "huggingface-hub"} <= set(here.packages)
    monkeypatch.setattr(ring_mlx, "__file__", str(tmp_path / "ring_mlx" / "__init__.py"))
    installed = versions.ranges()
    assert installed.packages["mlx"] == here.packages["mlx"]
    monkeypatch.setattr(versions, "PROJECT", "no-such-project")
    assert versions.ranges() is None
    assert [f.status for f in versions.check()] == ["note"]


def test_versions_out_of_range():
    assert versions.python(SpecifierSet(">=3.11,<3.14"), "3.12.1").status == "ok"
    assert versions.python(SpecifierSet(">=3.11,<3.14"), "3.14.0").status == "problem"
    assert versions.package("mlx", SpecifierSet(">=0.1")).status == "ok"
    old = versions.package("mlx", SpecifierSet(">=99"))
    assert (old.status, old.remedy) == ("problem", install.command_for_extra(install.backend_extra()))
    other = versions.package("numpy", SpecifierSet(">=99"))
    assert (other.status, other.remedy) == ("problem", install.command_for("numpy>=99"))
    assert versions.package("no-such-package", SpecifierSet(">=1")).seen == "not installed"


@pytest.mark.parametrize(
    ("release", "processor", "translated", "status", "said"),
    [
        ("15.2", "arm64", False, "ok", "macOS 15.2"),
        ("13.6", "arm64", False, "problem", "update to macOS 14"),
        ("15.2", "x86_64", True, "problem", "Rosetta"),
        ("15.2", "x86_64", False, "problem", "Apple Silicon"),
    ],
)
def test_macs(monkeypatch, release, processor, translated, status, said):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr("platform.mac_ver", lambda: (release, ("", "", ""), ""))
    monkeypatch.setattr(macos, "is_translated", lambda: translated)
    found = machine.system()
    assert found.status == status
    assert said in found.seen + found.remedy


def test_a_mac_s_memory_is_explained_with_its_own_numbers(monkeypatch):
    mac = Mac(monkeypatch, **{FREE: 50, PRESSURE: 1, "machdep.cpu.brand_string": "Apple M2 Pro"})
    mac.metal(max_recommended_working_set_size=24 << 30, memory_size=32 << 30)
    found = {f.name: f for f in machine.check()}
    assert found["memory"].seen.endswith("of which others leave 34.4 GB now")
    assert found["for models"].seen.startswith("25.8 GB, the working set that Metal recommends")
    assert found["cache limit"].seen.startswith("1.3 GB of freed memory that MLX keeps")
    assert found["working set"].seen == (
        "macOS chose the working set; sudo sysctl iogpu.wired_limit_mb=28672 gives 30.1 GB, the most that leaves macOS "
        "enough, and a restart puts back what macOS chooses"
    )
    assert (found["memory pressure"].status, found["memory pressure"].seen) == ("ok", "normal")
    assert found["chip"].seen.startswith("Apple M2 Pro, ")
    mac.values |= {"iogpu.wired_limit_mb": 28672, PRESSURE: 4, "kern.hv_vmm_present": 1}
    mac.metal(max_recommended_working_set_size=28 << 30, memory_size=32 << 30, device_name="")
    found = {f.name: f for f in machine.check()}
    assert found["working set"].seen == (
        "iogpu.wired_limit_mb=28672 chose the working set, and a restart puts back what macOS chooses itself"
    )
    assert (found["memory pressure"].status, found["memory pressure"].seen) == ("note", "critical")
    assert found["chip"].seen.startswith("Apple M2 Pro, ")
    assert "virtual machine" in found["chip"].seen
    assert found["backend"].seen in ("Metal", "Metal, but the default device is the CPU")


@pytest.mark.parametrize(
    ("recommended", "total", "said"),
    [
        (16, 24, "; 8 bits 17.4 GB after sudo sysctl iogpu.wired_limit_mb=17408"),
        (24, 32, ""),  # 16 bits would leave macOS too little
        (8, 8, ""),
    ],
)
def test_what_a_raised_working_set_would_hold(monkeypatch, recommended, total, said):
    Mac(monkeypatch).metal(max_recommended_working_set_size=recommended << 30, memory_size=total << 30)
    seen = models.fit_finding("x", RingConfig.from_dict(MINI), recommended << 30).seen
    assert said in seen
    assert ("sysctl" in seen) == bool(said)


def test_what_is_too_large_even_so(monkeypatch):
    Mac(monkeypatch).metal(max_recommended_working_set_size=5 << 30, memory_size=8 << 30)
    seen = models.fit_finding("x", RingConfig.from_dict(MINI), 5 << 30).seen
    assert seen.startswith("no width fits")
    assert "sysctl" not in seen


def test_a_mac_without_metal_is_a_problem(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert machine.backend().status == "problem"


@pytest.mark.parametrize(("free", "status"), [(100e9, "ok"), (5e9, "note"), (0.5e9, "problem")])
def test_free_space(monkeypatch, tmp_path, free, status):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or namedtuple("Usage", "free")(free))
    found = disk.folder("downloads", tmp_path / "not" / "yet", 12e9, "HF_HOME")
    assert found.status == status
    assert asked == [tmp_path]
    assert ("HF_HOME" in found.remedy) == (status != "ok")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = disk.folder("snapshots", tmp_path / "file" / "below", 1e9, "RING_MLX_CACHE")
    assert (found.status, found.seen) == ("problem", f"{tmp_path / 'file'} cannot be written")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes a repository of the hub's cache; the cache is this test's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name, raw, **changes):
        repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repo / "snapshots" / ("0" * 40)
        save_hf(snapshot, raw, shards=2)
        (snapshot / "config.json").write_text(json.dumps(raw | changes))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
        return snapshot

    return add


def test_the_hub_cache(hub, tmp_path):
    assert [f.seen for f in models.cached(GB)] == [f"{tmp_path / 'hub'} is not there yet"]
    (tmp_path / "hub").mkdir()
    assert "no Ring model" in models.cached(GB)[0].seen
    hub("a/whole", config())
    (hub("a/half", config()) / "model-00002-of-00002.safetensors").unlink()
    hub("a/gptq", config(), quantization_config={"quant_method": "gptq"})
    hub("a/strange", config(), hidden_act="relu")
    hub("b/other", config(), model_type="llama")
    hub("a/softmax", softmax_config())
    (tmp_path / "hub" / "models--a--half" / "snapshots" / ".DS_Store").touch()
    (tmp_path / "hub" / "models--a--empty").mkdir()
    found = {f.name: f for f in models.cached(GB)}
    assert set(found) == {"a/whole", "a/half", "a/gptq", "a/strange", "a/softmax"}
    assert {n: f.status for n, f in found.items() if f.status == "ok"} == {"a/whole": "ok", "a/softmax": "ok"}
    assert "1 files of weights missing" in found["a/half"].seen
    assert found["a/gptq"].remedy == "ring-mlx convert --model a/gptq --mlx-path FOLDER"
    assert "hidden_act 'relu' is not supported" in found["a/strange"].seen
    small = {f.name: f for f in models.cached(1)}["a/whole"]
    assert "this machine can give 0.0 GB" in small.seen
    assert small.remedy


@pytest.mark.parametrize("raw", [MINI, FLASH], ids=["mini", "flash"])
@pytest.mark.parametrize("room_gb", [6, 10, 16, 24, 48, 64, 96, 128])
def test_what_fits_is_what_would_load(raw, room_gb):
    shape, room = RingConfig.from_dict(raw), room_gb * GB
    for bits, weights, tokens in models.fits(shape, room):
        try:
            memory.check_fit(shape, weights, "x", room)
            assert tokens >= memory.PLAIN_CONTEXT
        except NoFitError:
            assert tokens == 0, bits
        assert memory.cache_bytes(shape, tokens) + weights + memory.WORKSPACE_BYTES <= room or not tokens
        assert tokens <= shape.context_tokens
    found = models.fit_finding("x", shape, room)
    assert found.status == ("ok" if any(f.tokens for f in models.fits(shape, room)) else "note")
    streamed = recommend_cache_bytes(shape, room)
    assert ("--expert-cache-bytes" in found.seen + (found.remedy or "")) == bool(streamed)


def test_kernels_agree_on_a_backend_that_runs_them():
    with simulator("fast"):
        found = kernels.check()
    assert [f.name for f in found] == list(kernels.operations())
    assert {f.status for f in found} == {"ok"}
    assert all(f.data["launched"] for f in found)


def test_a_wrong_kernel_is_a_problem_and_names_itself():
    with simulator("fast"), mutated(gate_kernel.KERNEL, ("eps", "eps + 9.0f")):
        found = {f.name: f for f in kernels.check()}
    assert {n for n, f in found.items() if f.status == "problem"} == {"linear gate"}
    assert "ring_linear_gate" in found["linear gate"].seen
    assert "RING_MLX_KERNELS=off" in found["linear gate"].remedy


def test_a_kernel_that_does_not_build_is_a_problem():
    def refuse(**arguments):
        raise RuntimeError("no such\nfunction")

    with launch.use(launch.Backend("metal", refuse)):
        found = kernels.check()
    assert {f.seen for f in found if f.status == "problem"} == {"does not run on metal: no such function"}
    assert {f.name for f in found if f.status == "ok"} == {"experts, many tokens"}


def test_no_kernels(monkeypatch):
    with launch.use(None):
        assert [(f.status, f.seen) for f in kernels.check()] == [("ok", "no backend runs them here: plain operations")]
        monkeypatch.setenv("RING_MLX_KERNELS", "off")
        assert [f.status for f in kernels.check()] == ["note"]


def writer():
    """A model whose predictions are sharp and hang on what its linear layers remember."""
    model = make_model(num_hidden_layers=4, layer_group_size=4, num_experts=0)
    model.lm_head.weight = model.lm_head.weight * 3
    return model


@cache
def written(offset, is_rounded=False):
    """Texts that `writer` writes while it forgets by the formula, with mlx-lm's rounding of each token's factor or not."""
    model, rows = writer(), 12
    mx.random.seed(0)
    with decays(model, offset):
        for layer in model.layers[:3] if is_rounded else ():
            factor = mx.exp(-layer.attention.decay_rate).astype(mx.bfloat16).astype(mx.float32)
            layer.attention._decay_rate = -mx.log(factor)
        memory, out = model.make_cache(left_padding=[0] * rows), [mx.random.randint(0, 70, (rows, 1))]
        for _ in range(119):
            out.append(mx.random.categorical(model(out[-1], memory)[:, -1])[:, None])
            mx.eval(out[-1])
    return [Part(ids, []) for ids in mx.concatenate(out, axis=1).tolist()]


@pytest.mark.parametrize(
    ("offset", "is_rounded"),
    [
        pytest.param(0, False, marks=pytest.mark.slow),
        (-1, False),
        pytest.param("clamped", False, marks=pytest.mark.slow),
        ("clamped", True),
    ],
)
def test_the_decay_that_a_text_was_written_with_is_found(offset, is_rounded):
    model = writer()
    verdict = compare(model, written(offset, is_rounded))
    assert verdict.decided == offset
    assert (verdict.tokens, verdict.blocks) == (12 * 119, 24)
    assert verdict.excess < 0.15, "a text of its own is what a model expects"
    for configured in DECAY_OFFSETS:
        said = conclusion(verdict, configured, "here")
        assert f"decay_layer_offset {json.dumps(offset).replace(chr(34), chr(39))}: all others" in said.seen
        assert said.status == ("ok" if configured == offset else "problem")
        assert ("--check-decay here --write-decay" in said.remedy) == (configured != offset)
    for i, layer in enumerate(model.layers[:3]):
        assert mx.array_equal(layer.attention.decay_rate, decay_rate(6, i, 4)), "the model is as it was"


def test_a_text_that_tells_nothing_gets_no_verdict():
    model, parts = writer(), written(-1)
    short = compare(model, parts[:3])
    assert short.possible == list(DECAY_OFFSETS), "six blocks are no evidence"
    assert "fewer than 8 blocks" in conclusion(short, 0).remedy
    for layer in model.layers[:3]:
        layer.attention.dense.weight = mx.zeros_like(layer.attention.dense.weight)
    idle = compare(model, parts[:4])
    assert idle.decided is None
    assert idle.possible == list(DECAY_OFFSETS)
    said = conclusion(idle, 0)
    assert said.status == "note"
    assert said.seen.startswith("no verdict: this text cannot tell 0, -1, 'clamped' apart")


def test_a_text_that_the_model_does_not_know_gets_no_verdict():
    # A blunter model finds noise likelier, whatever it was trained with.
    noise = compare(
        writer(), [Part(row, []) for row in mx.random.randint(0, 70, (8, 120), key=mx.random.key(1)).tolist()]
    )
    assert noise.excess > 1
    assert max(m.sigmas for m in noise.measured.values()) > 2
    assert (noise.decided, noise.possible) == (None, list(DECAY_OFFSETS))


def lead(*, excess=0.0, **behind):
    """A verdict on 100 blocks: how far each is behind, with an error of a hundredth of a nat."""
    named = {0: "zero", -1: "one", "clamped": "clamped", 1: "late", -2: "soon"}
    return Verdict({k: Measured(2.0, behind.get(n, 0.2), 0.01) for k, n in named.items()}, 6400, 100, excess)


def test_a_lead_counts_beyond_noise_beyond_what_surprises_and_before_the_controls_only():
    assert lead(zero=0).decided == 0
    assert lead(zero=0, one=0.039).decided is None
    assert lead(zero=0, one=0.039).possible == [0, -1]
    assert (lead(zero=0, excess=0.79).decided, lead(zero=0, excess=0.81).decided) == (0, None)
    assert "0.810 nats a token more than the model expects" in conclusion(lead(zero=0, excess=0.81), 0).remedy
    for control in ("soon", "late"):
        near, best = lead(one=0, **{control: 0.03}), lead(one=0.02, **{control: 0})
        assert near.possible == best.possible == list(DECAY_OFFSETS), "so nothing is ruled out either"
        assert "which nobody computes, is the likeliest" in conclusion(best, 0).remedy
    assert "about 12,000 tokens of its kind may" in conclusion(lead(zero=0, one=0.03), 0).remedy


def pieces(*nats):
    return Blocks(np.array(nats), np.array(nats), np.full(len(nats), 2.0))


def test_differences_are_taken_block_by_block():
    hard = np.tile([1.0, 100.0], 10)
    far = {1: pieces(*hard + 5), -2: pieces(*hard + 5)}
    found = judge({0: pieces(*hard), -1: pieces(*hard + 0.2 + 0.01 * np.arange(20)), "clamped": pieces(*hard), **far})
    assert (found.decided, found.possible, found.tokens, found.blocks) == (None, [0, "clamped"], 40, 20)
    assert found.measured[-1].behind == pytest.approx(0.1475)
    assert found.measured[-1].error == pytest.approx(np.arange(20).std(ddof=1) * 0.01 / 20**0.5 / 2)
    lines = findings(judge({0: pieces(*hard + 1), -1: pieces(*hard), "clamped": pieces(*hard), **far}), 0, "m")
    assert [f.name for f in lines] == ["0", "-1", "clamped", "1", "-2", "verdict"]
    assert lines[-1].status == "problem"
    assert "cannot tell -1 from 'clamped'" in lines[-1].seen
    assert "it is not 0, which the model has" in lines[-1].seen
    assert conclusion(found, 0).remedy.startswith("more of it will hardly help")


@pytest.mark.parametrize(("offset", "written_to"), [(-1, True), (None, False)])
def test_the_key_is_written_on_request_if_there_is_a_verdict(capsys, monkeypatch, tmp_path, offset, written_to):
    model, file = writer(), tmp_path / "model" / "config.json"
    file.parent.mkdir()
    kept = tmp_path / "kept"
    kept.write_text('{"x": 1}')
    file.symlink_to(kept)
    monkeypatch.setattr("ring_mlx.cli.doctor_model_command.load", lambda folder, **_: (model, None))
    parts = written(-1)[: 8 if written_to else 3]
    monkeypatch.setattr("ring_mlx.doctor.decay_choice.packaged_parts", lambda *_: parts)
    code, found = doctor(capsys, "--check-decay", file.parent, "--write-decay")
    assert json.loads(file.read_text()) == {"x": 1} | ({"decay_layer_offset": offset} if written_to else {})
    assert kept.read_text() == '{"x": 1}', "what a link of the hub's cache points to stays"
    assert (code, found["config.json"]["status"]) == (1, "ok" if written_to else "problem")
    assert list(file.parent.iterdir()) == [file]


def test_the_key_of_a_converted_folder_is_in_its_manifest_too(tmp_path):
    save_hf(tmp_path / "hf", config())
    folder = convert(tmp_path / "hf", tmp_path / "out")
    write_offset(folder, "clamped")
    verify(folder)
    assert load_model(folder).config.decay_layer_offset == "clamped"


def test_the_time_is_told_before_and_a_minutes_text_is_read():
    assert [affordable(tps) for tps in (1, 100, 500, 10**6)] == [1024, 1024, 4096, 16384]
    parts = [Part([1] * 1000, []), Part([1] * 200, [])]
    assert announcement(parts, 100.0) == "reading 1,200 tokens under each of 3 decays and 2 controls, about 60 s ..."
    assert 0 < tokens_a_second(make_model()) < 1e9


def test_probes_score_answers_after_a_text_that_is_read_once():
    model, ids = make_model(), (np.arange(200) * 7 % 70).tolist()
    found = score(model, Part(ids[:40], [Probe(ids[40:50], 7), Probe(ids[40:60], 17)]))
    assert found.tokens.tolist() == [3, 3]
    for end, nats in zip((50, 60), found.nats, strict=True):
        assert nats == pytest.approx(token_nats(model, ids[:end], end - 3).sum(), rel=1e-4)
    assert score(model, Part(ids[:40], [])).tokens.tolist() == [39]
    assert score(model, Part(ids, [])).tokens.tolist() == [64, 64, 64, 7]


def test_the_packaged_text_asks_for_facts_that_it_states():
    _, tokenizer = load(demo_model_path())
    (part,) = packaged_parts(tokenizer, 8192, 6000)
    assert 3500 < len(part.shared) < 4352
    text = tokenizer.decode(part.shared)
    assert len(part.probes) > 8
    for probe in part.probes:
        answer = tokenizer.decode(probe.ids[probe.first :])
        fact = answer.partition("\n")[0].strip()
        assert fact in text
        assert answer.endswith(f"</think>\n\nIt is {fact.rstrip('.').rpartition(' ')[2]}.")
    parts = packaged_parts(tokenizer, 600, 3000)
    assert len(parts) > 1
    assert sum(p.tokens for p in parts) <= 3000
    for context, most in ((50, 3000), (3000, 50)):
        with pytest.raises(OptionError, match=f"the context of {context:,} and {most:,} tokens hold no conversation"):
            packaged_parts(tokenizer, context, most)


def test_a_given_text_comes_in_parts(tmp_path):
    _, tokenizer = load(demo_model_path())
    file = tmp_path / "text.txt"
    file.write_text("The weather is fine. " * 100)
    whole = parts_of_file(file, tokenizer, 8192, 10**6)
    assert len(whole) == 1
    cut = parts_of_file(file, tokenizer, 100, 250)
    assert [len(p.shared) for p in cut] == [100, 100, 50]
    assert [i for p in cut for i in p.shared] == whole[0].shared[:250]


def test_the_toy_is_not_said_to_have_another_decay_than_it_has(capsys, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("You should know that Vera's locker code is 3231. It was a long day. " * 30)
    assert (
        main(["doctor", "--check-decay", str(demo_model_path()), "--text", str(file), "--tokens", "66", "--json"]) == 0
    )
    out, err = capsys.readouterr()
    found = {f["name"]: f for f in json.loads(out)["findings"]}
    assert set(found) == {"0", "-1", "clamped", "1", "-2", "verdict"}
    assert 0 in found["verdict"]["data"]["possible"]
    assert re.fullmatch(r"ring-mlx: reading 66 tokens under each of 3 decays and 2 controls, about \d+ s \.\.\.\n", err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "x"], "--text is for --check-decay"),
        (["--tokens", "5"], "--tokens is for --check-decay"),
        (["--write-decay"], "--write-decay is for --check-decay"),
        (["--check-decay", "/nowhere"], "no such folder"),
        (["--check-decay", "{model}", "--text", "/nowhere"], "--text /nowhere cannot be read"),
        (["--check-decay", "{model}", "--text", "{empty}"], "has 0 tokens"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, chat_folder, arguments, said):
    (tmp_path / "empty").write_text("")
    assert main(["doctor", *(a.format(model=chat_folder, empty=tmp_path / "empty") for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert said in err


def test_a_model_without_linear_layers_has_no_decay():
    model = make_model(model_type="bailing_moe_v2", layer_group_size=..., group_norm_size=...)
    with pytest.raises(OptionError, match="'bailing_moe_v2' has none"):
        compare(model, [Part([1, 2, 3], [])])


@pytest.mark.parametrize("mode", ["auto", "always", "never", None])
def test_a_conversion_checks_the_decay_of_its_source_and_says_so(capsys, monkeypatch, tmp_path, mode):
    model, asked = writer(), "clamped" if mode is None else None
    save_hf(tmp_path / "hf", config(decay_layer_offset=...))
    parts = written(-1)[:8] if mode in ("auto", "always") else []
    monkeypatch.setattr("ring_mlx.doctor.decay_choice.load", lambda folder, **_: (model, None))
    monkeypatch.setattr("ring_mlx.doctor.decay_choice.packaged_parts", lambda *_: parts)
    options = ["--decay-layer-offset", "clamped"] if mode is None else ["--check-decay", mode]
    arguments = ["convert", "--model", tmp_path / "hf", "--mlx-path", tmp_path / "out", *options]
    assert main([*map(str, arguments)]) == 0
    card, err = (tmp_path / "out" / "README.md").read_text(), capsys.readouterr().err
    verify(tmp_path / "out")
    written_key = asked or (-1 if parts else 0)
    assert load_model(tmp_path / "out").config.decay_layer_offset == written_key
    assert ("decay_layer_offset" in json.loads((tmp_path / "out" / "config.json").read_text())) == (mode != "never")
    if parts:
        assert re.search(r"reading [\d,]+ tokens under each of 3 decays and 2 controls, about \d+ s", err)
        assert err.endswith("decay_layer_offset -1 is written.\n")
        assert card.count(" nats a token, perplexity ") == 5
        assert "\n    decay_layer_offset -1 is written\n" in card
    else:
        assert (err, "## Decay" in card) == ("", mode is None)


def test_a_conversion_goes_on_where_the_decay_cannot_be_checked_unless_that_was_asked_for(capsys, tmp_path):
    save_hf(tmp_path / "hf", config(decay_layer_offset=...))  # which has no tokenizer
    arguments = ["convert", "--model", str(tmp_path / "hf"), "--mlx-path", str(tmp_path / "out")]
    assert main([*arguments, "--check-decay", "always"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(arguments) == 0
    assert "the decay was not checked: [tokenizer]" in capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n    not checked; decay_layer_offset 0\n" in card
    assert str(tmp_path) not in card
    with pytest.raises(SystemExit, match="2"):
        main([*arguments[:-1], str(tmp_path / "b"), "--decay-layer-offset", "2"])
    assert "'2' is not 0 or -1 or clamped" in capsys.readouterr().err


@pytest.mark.parametrize("can_be", [True, False])
def test_where_the_source_cannot_be_loaded_the_result_is_checked(capsys, monkeypatch, tmp_path, can_be):
    model, loaded = save_hf(tmp_path / "hf", config(decay_layer_offset=...)), []

    def load_result(folder, **_):
        loaded.append(folder.name)
        if folder.name == "hf" or not can_be:
            raise WeightsError("quantization method 'gptq' cannot be loaded as it is; convert it.")
        return model, None

    monkeypatch.setattr("ring_mlx.doctor.decay_choice.load", load_result)
    monkeypatch.setattr("ring_mlx.doctor.decay_choice.check", lambda *_, **__: lead(one=0))
    assert main(["convert", "--model", str(tmp_path / "hf"), "--mlx-path", str(tmp_path / "out")]) == 0
    assert loaded == ["hf", "out"]
    verify(tmp_path / "out")
    raw, err = json.loads((tmp_path / "out" / "config.json").read_text()), capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert raw.get("decay_layer_offset") == (-1 if can_be else None)
    assert ("not checked" in card + err) != can_be
    assert ("\n    decay_layer_offset -1 is written\n" in card) == can_be
    assert err.endswith("is written.\n" if can_be else "--write-decay\n")
    assert list(raw) == sorted(raw)


def quantized_elsewhere(source, monkeypatch):
    file = source.folder / "config.json"
    file.write_text(json.dumps(source.raw | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    return source


def too_large(source, monkeypatch):
    monkeypatch.setattr(memory, "budget_bytes", lambda: 1 << 20)
    return source


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (quantized_elsewhere, "gptq"),
        (too_large, "this machine can give 0.0 GB"),
        (lambda source, _: replace(source, repo=("a/b", None)), "leave --stream out"),
        (lambda source, _: replace(source, config=RingConfig.from_dict(softmax_config())), "'bailing_moe_v2' has none"),
    ],
)
def test_where_a_source_cannot_be_checked_auto_names_what_can_be_and_always_refuses(
    monkeypatch, chat_copy, change, why
):
    source, said = change(open_source(chat_copy(decay_layer_offset=None)), monkeypatch), []
    with pytest.raises(RingError, match=re.escape(why)):
        choose(source, True, said.append, said.append)
    assert not said
    found = choose(source, False, said.append, said.append, result="here")
    if not source.config.has_linear:
        assert (found, said) == (None, [])
        return
    assert found.offset is None
    assert why in said[0]
    assert said[1:] == ["the result can be: ring-mlx doctor --check-decay here --write-decay"]


@pytest.mark.parametrize(("key", "is_checked"), [(None, True), (..., True), (0, False), ("clamped", False)])
def test_a_source_that_says_the_key_is_checked_only_on_request(monkeypatch, chat_copy, key, is_checked):
    asked = []
    monkeypatch.setattr("ring_mlx.doctor.decay_choice.load", lambda *_, **__: (None, None))
    monkeypatch.setattr("ring_mlx.doctor.decay_choice.check", lambda *_, **__: asked.append(1) or lead(one=0))
    source, said = open_source(chat_copy(decay_layer_offset=key)), []
    found = choose(source, False, said.append, said.append)
    assert (found is not None, bool(asked)) == (is_checked, is_checked)
    assert choose(source, True, said.append, said.append).offset == -1
    assert said[-1].endswith("decay_layer_offset -1 is written.")


@pytest.fixture
def chat_copy(chat_folder, tmp_path):
    """Copies the checkpoint that has a tokenizer, with changes of its config.json; ... takes a key away."""

    def copy(**changes):
        shutil.copytree(chat_folder, tmp_path / "hf")
        raw = json.loads((tmp_path / "hf" / "config.json").read_text()) | changes
        (tmp_path / "hf" / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
        return tmp_path / "hf"

    return copy
