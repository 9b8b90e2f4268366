"""Divergence of a conversion from its source: equal to the whole models', and smaller than mlx-lm's at equal size."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import convert as mlx_lm_convert

from ring_mlx import demo_model_path, load_model
from ring_mlx.cli import main
from ring_mlx.convert import convert, report, verify
from ring_mlx.errors import OptionError
from ring_mlx.evaluation.divergence import divergence
from tests import foreign
from tests.compare import assert_close
from tests.tiny import config, save_hf

ROOT = Path(__file__).parent.parent
ROWS = [r for r in report.read_text() if "messages" in r][:6]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The demo model in bfloat16, as it would come from its training."""
    return convert(demo_model_path(), tmp_path_factory.mktemp("demo") / "float", dequantize=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("small") / "hf"
    save_hf(folder, config(vocab_size=1024, hidden_size=64, intermediate_size=96, moe_intermediate_size=64))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((demo_model_path() / name).read_bytes())
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_does_not_differ_from_itself(small, tmp_path, tied):
    if tied:
        save_hf(tmp_path, config(vocab_size=1024, tie_word_embeddings=True))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / name).write_bytes((demo_model_path() / name).read_bytes())
        small = tmp_path
    found = report.compare(small, small, ROWS[:2]).kinds["conversations"]
    assert abs(found.kl_mean) < 1e-6
    assert found.flips == 0
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-5)


def test_layer_by_layer_is_the_whole_model(small, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "BATCH_TOKENS", 400)
    monkeypatch.setattr(report, "HEAD_TOKENS", 7)
    seen, result = [], convert(small, tmp_path / "out", quantize=True, bits=3, group_size=32, fit="rtn")
    found = report.compare(small, result, ROWS, progress=lambda done, total, what: seen.append((done, total)))
    assert seen == [*((i + 1, 6) for i in range(5)), (5.5, 6), (6, 6)]
    assert found.result_bytes < 0.2 * found.source_bytes
    batches = report.make_batches(small, ROWS)
    assert len(batches) > 1
    assert max(len(b.spans) for b in batches) > 1
    left, right = load_model(small), load_model(result)
    kl = []
    for batch in batches:
        a, b = left(batch.tokens), right(batch.tokens)
        for row, (first, end) in enumerate(batch.spans):
            p, q = (np.array(x[row, first - 1 : end - 1], dtype=np.float64) for x in (a, b))
            p, q = (
                x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
                for x in (p, q)
            )
            kl.append((np.exp(p) * (p - q)).sum(-1))
    kl = np.concatenate(kl)
    d = found.kinds["conversations"]
    assert d.tokens == len(kl)
    assert d.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert d.kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")
def test_at_equal_size_ours_diverges_less_than_mlx_lms(plain):
    theirs = plain.parent / "theirs"
    four_bits = convert(plain, plain.parent / "four", quantize=True, overrides=["mlp.gate.gate_proj=8"])
    mlx_lm_convert(str(plain), str(theirs), quantize=True)
    size = {p: sum(a.nbytes for a in mx.load(str(p / "model.safetensors")).values()) for p in (four_bits, theirs)}
    assert size[four_bits] == size[theirs]
    # All tokens of the shortest conversations, questions too: of its answers the toy is too sure for so few.
    batch = report.make_batches(plain, report.read_text())[0]
    tokens, spans = batch.tokens[:14], batch.spans[:14]
    logits = {p: load_model(p, dtype=mx.float32)(tokens) for p in (plain, *size)}
    mean = {}
    for p in size:
        rows = [
            divergence(logits[plain][i, : end - 1], logits[p][i, : end - 1], tokens[i, 1:end])[0]
            for i, (_, end) in enumerate(spans)
        ]
        mean[p] = np.concatenate(rows).mean()
    assert mean[four_bits] < 0.95 * mean[theirs]


def test_a_packed_source_is_compared_as_what_it_means(tmp_path, monkeypatch):
    raw = foreign.shape(vocab_size=1024)
    tensors = {}
    for name, value in foreign.float_weights(raw).items():
        parts = foreign.gptq(value, 64, None)[0] if foreign.is_packed(name) else {"weight": value}
        if "qweight" in parts:
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": a for suffix, a in parts.items()}
        else:
            tensors[name] = value
    foreign.write(tmp_path / "in", raw | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "in" / name).write_bytes((demo_model_path() / name).read_bytes())
    out = convert(tmp_path / "in", tmp_path / "out")
    assert report.compare(tmp_path / "in", out, ROWS[:2]).kinds["conversations"].kl_mean < 1e-4


def test_the_divergence_of_two_known_distributions():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    logits = [mx.array(np.log(x).astype(np.float32) + 3) for x in (p, q)]
    kl, flips, ours, theirs = map(mx.array, divergence(*logits, mx.array([1])))
    assert_close(kl, np.array([0.25 * np.log(2)]), 1e-5)
    assert flips.tolist() == [1]
    assert_close(ours, np.log([4.0]), 1e-5)
    assert_close(theirs, np.log([2.0]), 1e-5)


def test_text_of_ones_own(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\nthree four\n\n \n\n")
    assert [r["text"] for r in report.read_text(tmp_path / "a.txt")] == ["one two", "three four"]
    odd = ("{", "[1]", '{"kind": "text"}', '{"text": 3}', '{"messages": []}', '{"messages": "Hello"}', "null")
    for name, content in ((f"{i}.jsonl", line) for i, line in enumerate(odd)):
        (tmp_path / name).write_text(content)
        with pytest.raises(OptionError, match=r"cannot be read"):
            report.read_text(tmp_path / name)
    with pytest.raises(OptionError, match="cannot be read"):
        report.read_text(tmp_path / "none.txt")
    with pytest.raises(OptionError, match="no two tokens"):
        report.make_batches(demo_model_path(), [{"text": ""}])


def test_the_command_reports_and_the_folder_keeps_it(small, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("What is 27 + 35? The sum is 62.")
    out = tmp_path / "out"
    command = ["convert", "--model", str(small), "--mlx-path", str(out)]
    command += ["-q", "--q-group-size", "32", "--q-fit", "rtn", "--report", str(text), "--verify"]
    for extra in ([], ["--resume"]):
        assert main([*command, *extra]) == 0
        assert "KL mean" in capsys.readouterr().out
    saved = json.loads((out / "report.json").read_text())
    assert saved["kinds"]["text"]["kl_mean"] > 0
    names = ["positions", "kl_mean", "kl_median", "kl_99", "flips", "perplexity", "perplexity_ratio"]
    assert list(saved["kinds"]["text"]) == names, "the file's names are not those of Divergence"
    assert (out / "README.md").read_text().count("## Divergence from the source") == 1
    assert verify(out) == len(list(out.iterdir())) - 1
    assert main(["convert", "--verify", "--mlx-path", str(out)]) == 0
    assert "files are as they were written" in capsys.readouterr().out


def test_long_rows_are_cut(monkeypatch):
    monkeypatch.setattr(report, "BATCH_TOKENS", 50)
    question = {"role": "user", "content": "What is 27 + 35? " * 30}
    rows = [
        {"text": "one two three " * 200},
        {"text": "one two"},
        {"messages": [question, {"role": "assistant", "content": "62"}]},
    ]
    batches = report.make_batches(demo_model_path(), rows)
    assert max(b.tokens.shape[1] for b in batches) == 50
    assert sum(len(b.spans) for b in batches) == 2, "the answer lies beyond"
