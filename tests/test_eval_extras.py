"""Perplexity, divergence and recall: against computations by hand, against each prompt alone, and as commands."""

from __future__ import annotations

import json
import random
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_mlx.cli import main
from ring_mlx.errors import NoFitError, OptionError
from ring_mlx.evaluation import heat_map
from ring_mlx.evaluation.divergence import check_both_fit, check_same_tokens, diverge
from ring_mlx.evaluation.needles import draw_facts, sentences_of
from ring_mlx.evaluation.perplexity import perplexity, token_nats, window_of, windows
from ring_mlx.evaluation.recall import depths_of, holds, recall, table
from ring_mlx.evaluation.sharing import SharedReader
from ring_mlx.generation.decoding import generate_step
from ring_mlx.model import memory
from tests.compare import to_numpy
from tests.tiny import make_model, tokens

TEXT = "\n".join(f"What is {a} + {a + 3}? The weather is fine at the {p}." for a, p in enumerate(["park", "beach"] * 4))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def log_softmax(model, ids):
    """Of one whole pass, [T, vocab] float64."""
    logits = to_numpy(model(mx.array([ids]))[0])
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def by_hand(model, ids, window, stride):
    """Log-softmax rows and target of every counted token, from one pass over each window."""
    counted = 1
    while counted < len(ids):
        end = min(len(ids), window if counted == 1 else counted + stride)
        rows = log_softmax(model, ids[end - min(window, end) : end])
        for t in range(counted, end):
            yield rows[t - end - 1], ids[t]
        counted = end


@given(total=st.integers(2, 200), window=st.integers(2, 60), data=st.data())
def test_windows_count_every_token_but_the_first_once(total, window, data):
    stride = data.draw(st.integers(1, window - 1))
    parts = windows(total, window, stride)
    assert [t for p in parts for t in range(p.first, p.end)] == list(range(1, total))
    assert all(0 <= p.start < p.first and p.end - p.start <= window for p in parts)
    assert all(p.first - p.start >= window - stride for p in parts[1:])


@pytest.mark.parametrize("stride", [0, 8, 9])
def test_a_stride_that_leaves_no_context_is_refused(stride):
    with pytest.raises(OptionError, match=rf"stride {stride} is not from 1 to 7"):
        windows(50, 8, stride)


@pytest.mark.parametrize(("window", "stride"), [(53, 20), (16, 5), (7, 6), (200, 100)])
def test_perplexity_is_that_by_hand_in_float64(window, stride):
    model, ids = make_model(), tokens(53)[0].tolist()
    found = perplexity(model, ids, window, stride)
    nats = [-row[target] for row, target in by_hand(model, ids, window, stride)]
    assert found.tokens == len(nats) == 52
    assert found.nats == pytest.approx(np.mean(nats), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)


@pytest.mark.parametrize("first", [1, 2, 30, 52])
def test_steps_change_nothing(first):
    model, ids = make_model(), tokens(53)[0].tolist()
    whole = -log_softmax(model, ids)[np.arange(first - 1, 52), ids[first:]]
    for step in (1, 7, 64):
        np.testing.assert_allclose(token_nats(model, ids, first, step=step), whole, rtol=1e-4, atol=1e-5)
    cache = model.make_cache()
    model(mx.array([ids[:11]]), cache)
    if first > 11:
        np.testing.assert_allclose(token_nats(model, ids[11:], first - 11, cache), whole, rtol=1e-4, atol=1e-5)


def test_windows_fit_the_context_and_the_text():
    assert window_of(8192, None, None, 100_000) == (4096, 2048)
    assert window_of(512, None, None, 100_000) == (512, 256)
    assert window_of(512, None, None, 30) == (30, 15)
    assert window_of(512, 100, 7, 100_000) == (100, 7)
    with pytest.raises(OptionError, match="--window 513 exceeds the model's context of 512"):
        window_of(512, 513, None, 1000)


def test_a_model_does_not_diverge_from_itself():
    model, ids = make_model(), tokens(53)[0].tolist()
    found = diverge(model, make_model(), ids, 20, 10)
    assert (found.tokens, found.kl_mean, found.kl_99, found.top1_agreement) == (52, 0, 0, 1)
    assert found.perplexity == found.reference_perplexity == pytest.approx(perplexity(model, ids, 20, 10).perplexity)


def test_divergence_is_that_by_hand_and_has_a_direction():
    model, reference, ids = make_model(0), make_model(1), tokens(53)[0].tolist()
    found = diverge(model, reference, ids, 20, 10)
    pairs = list(zip(by_hand(reference, ids, 20, 10), by_hand(model, ids, 20, 10), strict=True))
    kl = [float((np.exp(p) * (p - q)).sum()) for (p, _), (q, _) in pairs]
    assert found.kl_mean == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-4)
    assert found.kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.top1_agreement == pytest.approx(np.mean([p.argmax() == q.argmax() for (p, _), (q, _) in pairs]))
    assert found.perplexity == pytest.approx(np.exp(-np.mean([q[t] for _, (q, t) in pairs])), rel=1e-4)
    assert diverge(reference, model, ids, 20, 10).kl_mean != pytest.approx(found.kl_mean, rel=1e-3)


def test_models_that_cannot_be_compared_are_refused(tmp_path, monkeypatch, toy):
    with pytest.raises(OptionError, match="vocabularies of 70 and 71"):
        diverge(make_model(), make_model(vocab_size=71), [1, 2, 3], 3, 1)

    class Letters:
        def encode(self, text):
            return list(text.encode())

    with pytest.raises(OptionError, match="--kl other splits the text into other tokens"):
        check_same_tokens(toy[1], Letters(), "What is 2 + 2?", "other")
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    check_both_fit(make_model(), tmp_path)
    monkeypatch.setattr(memory, "budget_bytes", lambda: memory.WORKSPACE_BYTES)
    with pytest.raises(NoFitError, match=r"layer by layer with `ring-mlx convert --report`"):
        check_both_fit(make_model(), tmp_path)


def test_shared_starts_are_read_once_and_change_nothing():
    model, rng = make_model(), random.Random(0)
    text = [rng.randrange(70) for _ in range(60)]
    ends = [(20, 1, 2), (20, 1, 3), (50, 4), (50, 5, 6), (9, 7), (20,), (20, 1, 2), (20, 1, 2, 9), (1,)]
    prompts = [text[:shared] + end for shared, *end in ends]
    reader = SharedReader(model, prompts, step=8)
    seen = []
    for i, cache, rest in reader.read():
        seen.append(i)
        alone = [t for t, _ in generate_step(prompts[i], model, model.make_cache(), max_tokens=6)]
        assert [t for t, _ in generate_step(rest, model, cache, max_tokens=6)] == alone
        assert cache.offset == len(prompts[i]) + 5
    assert sorted(seen) == list(range(len(prompts)))
    assert 0 <= reader.read_tokens - reader.total_tokens() <= len(prompts)
    different = {tuple(p[: n + 1]) for p in prompts for n in range(len(p))}
    assert len(different) <= reader.read_tokens <= len(different) + len(prompts)
    assert list(SharedReader(model, [], 8).read()) == []


def test_the_toy_recalls_from_short_texts(toy):
    seen = []
    grid = recall(*toy, [250, 120], 2, needles=2, max_tokens=60, progress=lambda *a: seen.append(a))
    assert [(c.length, c.depth, c.asked) for c in grid.cells] == [(120, 0, 2), (120, 1, 2), (250, 0, 2), (250, 1, 2)]
    assert sum(c.right for c in grid.cells) >= 7
    assert all(0.7 * c.length <= c.tokens <= c.length for c in grid.cells)
    assert grid.read_tokens < 0.6 * grid.prompt_tokens
    assert sorted({s[:2] for s in seen}) == [(i, 8) for i in range(9)]
    assert seen[-1][2:] == (f"{sum(c.right for c in grid.cells)} right", 0)
    lines = table(grid).splitlines()
    assert lines[0].split() == ["tokens", "at", "0%", "at", "100%"]
    assert [line.split()[0] for line in lines[1:3]] == ["120", "250"]


def test_a_random_model_recalls_nothing(chat):
    grid = recall(*chat, [100], 1, needles=2, max_tokens=4)
    assert [(c.depth, c.right, c.asked, c.cut_off) for c in grid.cells] == [(0.5, 0, 2, 2)]
    assert "2 answers did not end within --max-tokens" in table(grid)


def test_facts_stand_where_they_are_meant_to(toy, monkeypatch):
    prompts = {}

    def looked_at(model, tokenizer, asked, cache, rest, max_tokens, *_):
        text = tokenizer.decode(asked.ids)
        prompts[asked.depth] = text.index(asked.fact.stated) / len(text)
        assert text.count(asked.fact.question) == 1
        return True, False

    monkeypatch.setattr("ring_mlx.evaluation.recall._answer", looked_at)
    recall(*toy, [600], 5, needles=1)
    assert list(prompts) == [0, 0.25, 0.5, 0.75, 1]
    for depth, place in prompts.items():
        assert place == pytest.approx(depth, abs=0.12)


def test_small_things(tmp_path):
    assert depths_of(1) == [0.5]
    assert depths_of(3) == [0, 0.5, 1]
    assert holds("It is 1234.", "1234")
    assert not holds("It is 12345.", "1234")
    facts = draw_facts(random.Random(0), 40)
    assert len({(f.name, f.thing) for f in facts}) == 40
    file = tmp_path / "filler.txt"
    file.write_text("One day.\nTwo\ndays! Three?")
    assert list(islice(sentences_of(file), 4)) == ["One day.", "Two days!", "Three?", "One day."]


def test_json_of_every_measurement_at_once(text_file, capsys, chat_folder):
    arguments = ["--perplexity", text_file, "--window", 50, "--kl", chat_folder, "--recall", 90, "--depths", 1, "-m", 3]
    arguments += ["--needles", 1, "--filler", text_file, "--seed", 5, "--suite", "demo", "--task", "add", "--limit", 1]
    assert main(["eval", "--model", str(chat_folder), "--json", *map(str, arguments)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"model", "suite", "limit", "mean", "cut_off", "tasks", "kl", "recall"}
    assert found["kl"]["kl_mean"] == 0
    assert found["kl"]["window"] == 50
    assert found["recall"]["cells"][0]["asked"] == 1
    assert main(["eval", "--model", str(chat_folder), "--json", "--perplexity", str(text_file)]) == 0
    found = json.loads(capsys.readouterr().out)["perplexity"]
    assert found["perplexity"] == pytest.approx(np.exp(found["nats"]))
    assert found["windows"] == 1


def test_text_of_every_measurement(text_file, capsys, chat_folder):
    arguments = ["eval", "--model", str(chat_folder), "--perplexity", str(text_file)]
    assert main([*arguments, "--recall", "90", "--depths", "2", "-m", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("perplexity ")
    assert out[0].endswith("tokens counted in 1 window")
    assert out[1].split() == ["tokens", "at", "0%", "at", "100%"]
    assert main([*arguments, "--kl", str(chat_folder)]) == 0
    assert "same likeliest token 100.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kl", "x"], "--kl is for --perplexity"),
        (["--plot", "x.png"], "--plot is for --recall"),
        (["--perplexity", "/nowhere"], "--perplexity /nowhere cannot be read"),
        (["--perplexity", "{empty}"], "has 0 tokens, so none follows another"),
        (["--perplexity", "{binary}"], "cannot be read"),
        (["--perplexity", "{text}", "--limit", "2"], "--limit is for --suite"),
        (["--perplexity", "{text}", "--window", "20", "--stride", "20"], "stride 20 is not from 1 to 19"),
        (["--perplexity", "{text}", "--kl", "/nowhere"], "no such folder"),
        (["--recall", "20"], "--recall 20 has no room for filler"),
        (["--recall", "2048"], "exceed the context of 2048"),
        (["--recall", "100", "--needles", "99"], "--needles 99 is more than"),
        (["--recall", "100", "--filler", "{empty}"], "holds no sentence"),
        (["--recall", "x"], "is not a list of numbers"),
    ],
)
def test_bad_input_is_one_line(arguments, said, text_file, tmp_path, capsys, chat_folder):
    files = {"text": text_file, "empty": tmp_path / "empty", "binary": tmp_path / "binary"}
    files["empty"].write_text("")
    files["binary"].write_bytes(b"\xff\xfe\x00")
    try:
        code = main(["eval", "--model", str(chat_folder), *(a.format(**files) for a in arguments)])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code == 2
    assert len(err.splitlines()) == 1
    assert said in err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_read(capsys, monkeypatch):
    monkeypatch.setattr(heat_map, "find_spec", lambda name: None)
    assert main(["eval", "--model", "/nowhere", "--recall", "100", "--plot", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_heat_map_is_a_png(tmp_path, capsys, chat_folder):
    pytest.importorskip("matplotlib")
    file = tmp_path / "recall.png"
    arguments = ["eval", "--model", str(chat_folder), "--recall", "90,120", "--depths", "2", "-m", "2"]
    assert main([*arguments, "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--plot", str(tmp_path / "none" / "x.png")]) == 2
    assert "is in a folder that does not exist" in capsys.readouterr().err
