"""Calibrated conversions: the solver against its definition, what each layer sees, interruptions, and odd texts and sources."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest

from ring_mlx import demo_model_path, load_model
from ring_mlx.cli import main
from ring_mlx.convert import activations, calibration, convert, report, second_order, shard_files, writer
from ring_mlx.convert.fit import dequantize, quantize
from ring_mlx.convert.recipes import Setting
from ring_mlx.errors import ConvertError, TokenizerError, WeightsError
from tests.compare import relative_rms
from tests.kill_and_resume import folder_hashes
from tests.test_convert_resume import killed_and_resumed
from tests.tiny import GOLDENS, config, save_hf

TEXT = [{"text": "What is 27 + 35? The sum is 62."}, {"text": "Spell the word again: a, g, a, i, n."}]
OPTIONS = {"quantize": True, "bits": 3, "group_size": 32, "calibrate": True, "text": TEXT}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random model of a linear layer and a softmax one with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"moe_shared_expert_intermediate_size": 32, "num_experts": 4, "n_group": 2, "topk_group": 1}
    save_hf(
        folder,
        config(
            vocab_size=1024,
            num_attention_heads=4,
            num_experts_per_tok=2,
            group_norm_size=2,
            layer_group_size=2,
            **sizes,
        ),
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model_path() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def calibrated(source, tmp_path_factory):
    return convert(source, tmp_path_factory.mktemp("calibrated") / "out", **OPTIONS)


def correlated(E, T, K):
    """Inputs [E, T, K] of which some columns are much larger than others, and all depend on each other."""
    mx.random.seed(3)
    return mx.random.normal((E, T, K)) @ mx.random.normal((E, K, K)) * mx.exp(mx.random.normal((E, 1, K)))


def costs(w, h, packed, setting):
    """tr(E H E^T) of each matrix."""
    error = dequantize(packed, setting).reshape(w.shape) - w
    return np.array(((error @ h) * error).sum(axis=(1, 2)))


def test_a_sweep_is_optimal_brain_quantization_column_by_column():
    E, R, K, setting = 3, 7, 96, Setting(32, 3)
    x, w = correlated(E, 200, K), mx.random.normal((E, R, K))
    h = x.swapaxes(1, 2) @ x
    packed = second_order.solve(w, second_order.prepare(h, 32), setting, mx.bfloat16, rounds=0)
    found = np.array(dequantize(packed, setting)).reshape(E, R, K)
    for e in range(E):
        exact = (np.array(a[e]).astype(np.float64) for a in (w, h))
        stored, cost = second_order.naive_solve(*exact, setting, mx.bfloat16)
        # A code at the edge between two may fall to either, and what follows it then differs.
        assert (np.abs(stored - found[e]) < 1e-4).mean() > 0.8
        damped = h[e] + second_order.DAMPING * mx.diag(h[e]).mean() * mx.eye(K)
        one = {part: a.reshape(E, R, -1)[e] for part, a in packed.items()}
        assert costs(w[e : e + 1], damped, one, setting)[0] == pytest.approx(cost, rel=0.05)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128), (8, 64)])
def test_errors_fall_with_each_step_of_the_way(bits, group):
    x, w, setting = correlated(2, 400, 128), mx.random.normal((2, 24, 128)), Setting(group, bits)
    h = x.swapaxes(1, 2) @ x
    inputs = second_order.prepare(h, group)
    fitted = quantize(w.reshape(-1, 128), setting, mx.bfloat16)
    steps = [fitted, *(second_order.solve(w, inputs, setting, mx.bfloat16, rounds=n) for n in (0, 1, 3))]
    fit, sweep, once, more = (costs(w, h, packed, setting).sum() for packed in steps)
    assert sweep < 0.7 * fit
    assert more < once < sweep
    assert {k: (v.shape, v.dtype) for k, v in steps[-1].items()} == {k: (v.shape, v.dtype) for k, v in fitted.items()}


def test_inputs_that_say_little_or_nothing():
    w, setting = mx.random.normal((1, 5, 64)), Setting(32, 4)
    one = mx.random.normal((1, 64))
    for h in (one.T @ one, mx.zeros((64, 64)), mx.eye(64) * 1e-30, mx.ones((64, 64)) * 1e12):
        packed = second_order.solve(w, second_order.prepare(h[None], 32), setting, mx.bfloat16)
        assert relative_rms(dequantize(packed, setting), w[0]) < 0.5
    for h in (mx.full((64, 64), float("nan")), mx.full((64, 64), float("inf")), -mx.eye(64)):
        assert second_order.prepare(h[None], 32) is None


def test_columns_that_no_input_reaches_keep_their_weights():
    h = mx.diag(mx.where(mx.arange(64) < 32, 1.0, 0.0))
    w, setting = mx.random.normal((1, 5, 64)), Setting(32, 8)
    packed = second_order.solve(w, second_order.prepare(h[None], 32), setting, mx.bfloat16)
    assert relative_rms(dequantize(packed, setting), w[0]) < 0.02


def test_each_layer_sees_what_those_before_it_give_as_they_are_stored(source, tmp_path, monkeypatch):
    seen = {}
    advance = calibration.Calibration.advance

    def listen(self, stage, shards):
        advance(self, stage, shards)
        seen[stage] = (self._tokens, self._lengths, list(self._states))

    monkeypatch.setattr(calibration.Calibration, "advance", listen)
    model = load_model(convert(source, tmp_path / "out", **OPTIONS), dtype=mx.float32)
    assert sorted(seen) == [0, 1, 2]
    for stage, (tokens, lengths, states) in seen.items():
        for batch, ends, state in zip(tokens, lengths, states, strict=True):
            hidden = []
            model(batch, hidden_states=hidden)
            for row, end in enumerate(ends):
                assert relative_rms(state[row, :end], hidden[stage][row, :end]) < 1e-4


def test_the_logits_are_nearer_than_with_the_fit(source, calibrated, tmp_path):
    fitted = convert(source, tmp_path / "fit", **OPTIONS | {"calibrate": False})
    (batch,) = report.make_batches(source, TEXT)
    exact, *others = (load_model(f, dtype=mx.float32)(batch.tokens) for f in (source, fitted, calibrated))
    # Of the row that is not padded.
    errors = [relative_rms(logits[-1], exact[-1]) for logits in others]
    assert errors[1] < 0.8 * errors[0]
    arrays, plain = (mx.load(str(source / "model.safetensors")), {})
    for shard in calibrated.glob("*.safetensors"):
        plain |= mx.load(str(shard))
    router = plain["model.layers.1.mlp.gate.gate_proj.weight"]
    assert mx.array_equal(router, arrays["model.layers.1.mlp.gate.weight"]), "routers stay as they are"
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (fitted, calibrated)]
    assert abs(sizes[0] - sizes[1]) < 2000, "but for headers of more shards"


def test_experts_that_hardly_a_token_reaches_are_fitted(source, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "LEAST_TOKENS", 1 << 30)
    said = []
    out = convert(source, tmp_path / "out", **OPTIONS | {"say": said.append})
    assert any(f"{3 * 4} matrices of experts were fitted" in line for line in said)
    fitted = convert(source, tmp_path / "fit", **OPTIONS | {"calibrate": False})
    theirs, ours = mx.load(str(fitted / "model.safetensors")), {}
    for shard in out.glob("*.safetensors"):
        ours |= mx.load(str(shard))
    assert set(ours) == set(theirs)
    for name in ours:
        assert mx.array_equal(ours[name], theirs[name]) or ".switch_mlp." not in name


class Stopped(BaseException):
    """Stands for a kill in a test that counts."""


def test_stopped_after_each_shard_it_goes_on_to_the_same_bytes(source, calibrated, tmp_path, monkeypatch):
    whole, count = folder_hashes(calibrated), len(list(calibrated.glob("*.safetensors")))
    assert count == 4
    finish = writer.PartialFolder.finish_shard
    for stop in range(1, count + 1):
        target = tmp_path / str(stop)

        def finishing(self, shard, unfinished, stop=stop):
            finish(self, shard, unfinished)
            if len(self.done) == stop:
                raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(writer.PartialFolder, "finish_shard", finishing)
            with pytest.raises(Stopped):
                convert(source, target, **OPTIONS)
        if stop == 2:
            with pytest.raises(ConvertError, match="started with another calibration_text"):
                convert(source, target, resume=True, **OPTIONS | {"text": TEXT[:1]})
            with pytest.raises(ConvertError, match="started with another options"):
                convert(source, target, resume=True, **OPTIONS | {"calibrate": False})
        assert folder_hashes(convert(source, target, resume=True, **OPTIONS)) == whole


@pytest.mark.skipif(sys.platform == "darwin", reason="Metal does not survive a fork")
def test_killed_while_bits_are_chosen_and_matrices_calibrated_it_goes_on_to_the_same_bytes(source, tmp_path):
    killed_and_resumed(source, tmp_path, 4, **OPTIONS | {"bits": None, "target_bits": 5.5})


def test_a_full_disk_is_one_line_and_can_be_resumed(source, calibrated, tmp_path, monkeypatch):
    written, write = set(), shard_files.ShardFile.write

    def full(self, *args):
        written.add(self)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shard_files.ShardFile, "write", full)
        with pytest.raises(ConvertError, match="the disk is full"):
            convert(source, tmp_path / "out", **OPTIONS)
    assert len(list(writer.partial_folder(tmp_path / "out").glob("*.safetensors"))) == 2
    assert folder_hashes(convert(source, tmp_path / "out", resume=True, **OPTIONS)) == folder_hashes(calibrated)


def test_shards_of_a_layer_that_are_lost_are_made_again(source, tmp_path):
    small = OPTIONS | {"shard_bytes": 12_000}
    whole = folder_hashes(convert(source, tmp_path / "whole", **small))
    finish, done = writer.PartialFolder.finish_shard, []

    def finishing(self, shard, unfinished):
        finish(self, shard, unfinished)
        done.append(shard)
        if len(done) == 5:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer.PartialFolder, "finish_shard", finishing)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "out", **small)
    (writer.partial_folder(tmp_path / "out") / done[2]).unlink()
    assert folder_hashes(convert(source, tmp_path / "out", resume=True, **small)) == whole


def test_three_tokens_are_enough_to_go_on(source, tmp_path):
    out = convert(source, tmp_path / "out", **OPTIONS | {"text": [{"text": "a b"}]})
    assert mx.isfinite(load_model(out)(mx.array([[5, 6, 7]]))).all()


def test_weights_that_are_not_finite_are_named(source, tmp_path):
    bad = shutil.copytree(source, tmp_path / "bad")
    arrays = mx.load(str(source / "model.safetensors"))
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    mx.save_safetensors(str(bad / "model.safetensors"), arrays | {name: arrays[name] * float("nan")})
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.switch_mlp\.down_proj\.weight holds values that are not"):
        convert(bad, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_matrices_that_are_quantized_so_already_are_kept(source, tmp_path):
    fitted = convert(source, tmp_path / "fit", **OPTIONS | {"calibrate": False})
    again, theirs = convert(fitted, tmp_path / "again", **OPTIONS), mx.load(str(fitted / "model.safetensors"))
    for shard in again.glob("*.safetensors"):
        for name, array in mx.load(str(shard)).items():
            assert mx.array_equal(array, theirs[name])
    other = load_model(convert(fitted, tmp_path / "other", **OPTIONS | {"bits": 2}))
    assert other.lm_head.bits == 2


def test_a_machine_that_is_too_small_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "budget_bytes", lambda: 1000)
    with pytest.raises(ConvertError, match=r"needs about \d+\.\d GB of memory, but this machine can give 0\.0 GB"):
        convert(source, tmp_path / "out", **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_the_text_is_bounded(source):
    rows = [{"text": f"{i} and " * (i % 7 + 2)} for i in range(200)]
    batches = report.make_batches(source, rows)
    kept = calibration.bounded(batches, 900)
    assert 800 < sum(end for b in kept for _, end in b.spans) <= 900 < sum(end for b in batches for _, end in b.spans)
    assert {b.spans[-1][1] for b in kept} == {b.spans[-1][1] for b in batches}, "rows of every length"
    assert [b.spans for b in calibration.bounded(batches, 3)] == [[(0, 3)]]


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["-q", "--calibrate", "/nowhere.txt"], "--calibrate /nowhere.txt cannot be read"),
        (["-q", "--calibrate", "BINARY"], "--calibrate BINARY cannot be read"),
        (["-q", "--calibrate", "EMPTY"], "the text of --calibrate has no two tokens together"),
        (["--calibrate"], "--calibrate needs --quantize"),
        (["-q", "--calibrate", "--q-mode", "mxfp4"], "--calibrate is for affine quantization"),
        (["-q", "--calibrate", "--expert-layout", "streamed"], "--calibrate writes stacked experts"),
    ],
)
def test_what_is_refused(source, tmp_path, capsys, args, match):
    (tmp_path / "BINARY").write_bytes(bytes(range(256)))
    (tmp_path / "EMPTY").write_text("\n\n\n")
    given = [str(tmp_path / a) if a.isupper() else a for a in args]
    command = ["convert", "--model", str(source), "--mlx-path", str(tmp_path / "out"), *given]
    assert main(command) == 2
    assert match in capsys.readouterr().err.replace(f"{tmp_path}/", "")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_cannot_be_calibrated(tmp_path):
    with pytest.raises(TokenizerError, match="no tokenizer in"):
        convert(GOLDENS / "mini_like", tmp_path / "out", **OPTIONS)


def test_the_time_is_said_first_and_what_is_left_falls(source, tmp_path, capsys):
    said, told = [], []
    convert(source, tmp_path / "out", **OPTIONS, say=said.append, progress=lambda *step: told.append(step))
    assert re.match(
        r"time: about \d+ s on this machine to calibrate on \d+ tokens, one layer in memory \(at most", said[0]
    )
    assert told[-1][0] == told[-1][1]
    assert all(math.isfinite(left_s) for *_, left_s in told)
    assert told[-1][-1] < told[0][-1]
    (tmp_path / "text.txt").write_text("What is 27 + 35?")
    options = ["-q", "--q-group-size", "32", "--calibrate", str(tmp_path / "text.txt"), "--dry-run"]
    assert main(["convert", "--model", str(source), *options]) == 0
    assert "to calibrate on" in capsys.readouterr().out


def test_the_command_takes_a_file(source, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXT))
    command = ["convert", "--model", str(source), "--mlx-path", str(tmp_path / "out"), "-q", "--q-bits", "3"]
    options = ["--q-group-size", "32", "--calibrate", str(tmp_path / "text.jsonl"), "--check-decay", "never"]
    assert main([*command, *options]) == 0
    assert "3-bit affine" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["calibration_text"] == calibration.digest(TEXT)
    assert manifest["options"]["calibrate"] is True
