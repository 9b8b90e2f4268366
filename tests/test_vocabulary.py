"""Nothing reaches a model that it has no row for, every id has some text, and what is not finite is said."""

from __future__ import annotations

import io
import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils
from safetensors.numpy import load_file, save_file

from ring_mlx import Sampling, Session, load, load_model, stream_generate
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.checkpoint.vocabulary import ByteDetokenizer
from ring_mlx.cli import main
from ring_mlx.errors import ModelError, OptionError, PromptError, TokenizerError
from ring_mlx.evaluation.perplexity import perplexity
from ring_mlx.generation.batch import Batch
from ring_mlx.generation.decoding import generate_step
from tests.parrot import NAME, ROLE_END, byte_letters, make_parrot
from tests.serving import send


def post(server, path, body, code=200):
    """The JSON answer, which has the status ``code``."""
    status, _, answer = send(server, "POST", path, body)
    assert status == code, answer
    return answer


POISON = 300  # a token of the demo's that the tests do not say otherwise


def change(folder, name, edit):
    """Edit one JSON file of a folder."""
    value = json.loads((folder / name).read_text())
    edit(value)
    (folder / name).write_text(json.dumps(value))


def add_token(tokenizer, number, special=False):
    entry = {"id": number, "content": "<x>", "special": special, "normalized": False}
    tokenizer["added_tokens"].append(entry | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))


def surround(tokenizer, ids):
    """Let the post-processor put a token of these ids before every text."""
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<x>": {"id": "<x>", "ids": ids, "tokens": ["<x>"] * len(ids)}},
    }


ROWS = 1026
WRONG = {
    "vocabulary": ("tokenizer.json", lambda t: t["model"]["vocab"].update({"zzz": 5_000_000}), "'zzz' .* id 5000000"),
    "one past the last": ("tokenizer.json", lambda t: t["model"]["vocab"].update({"zzz": ROWS}), f"'zzz' .* {ROWS}"),
    "added token": (
        "tokenizer.json",
        lambda t: (add_token(t, ROWS), t["model"]["vocab"].update({"<x>": ROWS})),
        "'<x>' .* id 1026",
    ),
    "template": ("tokenizer.json", lambda t: surround(t, [ROWS + 7]), "'of its post-processor' .* id 1033"),
    "template of two": ("tokenizer.json", lambda t: surround(t, [3, 1 << 20]), "post-processor"),
    "new special token": (
        "tokenizer_config.json",
        lambda t: t.update({"additional_special_tokens": [f"<{i}>" for i in range(3)]}),
        "'<2>' .* id 1027",
    ),
    "eos": ("config.json", lambda c: c.update({"eos_token_id": [2, 1 << 30]}), "'eos_token_id' .* id 1073741824"),
    "negative eos": ("config.json", lambda c: c.update({"eos_token_id": -1}), "eos_token_id -1 "),
    "boolean eos": ("generation_config.json", lambda c: c.update({"eos_token_id": [True]}), "eos_token_id .*[Tt]rue"),
}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """Says words around ids of a gap, with rows beyond the last token; 1,026 rows."""
    return make_parrot(tmp_path_factory.mktemp("parrot") / "model", ["Hel", "lo"], rows=1)


@pytest.fixture
def copied(parrot, tmp_path):
    shutil.copytree(parrot, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("what", WRONG)
def test_ids_past_the_embedding_are_refused_at_load(copied, what):
    file, edit, words = WRONG[what]
    change(copied, file, edit)
    with pytest.raises(TokenizerError, match=words):
        load_tokenizer(copied)


def test_every_id_within_the_rows_is_taken(copied):
    change(copied, "tokenizer.json", lambda t: (t["model"]["vocab"].update({"zzz": ROWS - 1}), surround(t, [ROWS - 1])))
    assert load_tokenizer(copied).encode("a")[0] == ROWS - 1


@pytest.mark.parametrize(
    "command",
    [
        ("generate",),
        ("chat", "--plain"),
        ("cache-prompt", "--prompt", "a", "--prompt-cache-file", "{tmp}/c"),
        ("eval", "--perplexity", __file__),
        ("serve", "--port", "0"),
        ("mlx-lm", "generate"),
    ],
    ids=lambda c: c[0],
)
def test_commands_say_it_in_one_line(copied, command, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("RING_MLX_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    change(copied, "tokenizer.json", lambda t: t["model"]["vocab"].update({"zzz": 5_000_000}))
    assert main([*(c.format(tmp=tmp_path) for c in command), "--model", str(copied)]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "[tokenizer]" in line]
    assert len(said) == 1
    assert "token 'zzz'" in said[0]
    assert "5000000" in said[0]
    assert "1026" in said[0]


def test_the_plug_in_refuses_them_too(copied, registered):
    change(copied, "tokenizer.json", lambda t: t["model"]["vocab"].update({"zzz": 5_000_000}))
    with pytest.raises(TokenizerError, match="zzz"):
        utils.load(str(copied))


# Ids that no token has.


@pytest.fixture(scope="module")
def gappy(tmp_path_factory):
    """Says ids of a gap (1,030), rows past the last token (1,070) and tokens behind the gap."""
    pieces = ["Hel", 1030, "lo", " wörld".encode()[:3], " wörld".encode()[3:], 1070, "!"]
    return make_parrot(tmp_path_factory.mktemp("gappy") / "model", pieces, gap=40, rows=8)


@pytest.mark.parametrize("temp", ["0", "1"])
def test_generating_them_is_no_text(gappy, capsys, temp):
    assert main(["generate", "--model", str(gappy), "--temp", temp, "--verbose", "False"]) == 0
    assert capsys.readouterr().out == "Hello wörld!\n"


def test_session_and_server_take_them(gappy, serve, tmp_path):
    with Session(gappy, store=False) as session:
        reply = list(session.send([{"role": "user", "content": "hi"}]))
    assert reply[-1].message["reasoning_content"] == "Hello wörld!"
    server = serve(model=gappy)
    answer = post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "temperature": 0})
    assert answer["choices"][0]["message"]["reasoning_content"] == "Hello wörld!"
    body = {"prompt": [1030, 1071, 5], "max_tokens": 20, "temperature": 0, "logprobs": 3}
    answer = post(server, "/v1/completions", body)["choices"][0]
    assert answer["text"] == "Hello wörld!"
    assert len(answer["logprobs"]["tokens"]) == 7


def test_text_is_that_of_the_whole_whatever_is_cut(gappy):
    tokenizer = load(gappy)[1]
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(3, 1075, 30).tolist()
        detokenizer = tokenizer.detokenizer
        for i in ids:
            detokenizer.add_token(i)
        detokenizer.finalize()
        assert detokenizer.text == tokenizer.decode(ids)


def test_added_tokens_are_text_though_their_letters_stand_for_bytes():
    detokenizer = ByteDetokenizer(["é\ufffd", "Hel", "Ġé", "é ü"])
    for i in (0, 1, 2, 3, 9):
        detokenizer.add_token(i)
    detokenizer.finalize()
    assert detokenizer.text == "é\ufffdHel \ufffdé ü"


# Ids that a caller gives.


@pytest.mark.parametrize("wrong", [-1, 1026, 5_000_000, 1 << 40, True, 1.0, "7", None])
def test_ids_of_a_caller_are_held_against_the_rows(parrot, wrong):
    model, tokenizer = load(parrot)
    with pytest.raises(PromptError, match="is not a token id from 0 to 1025"):
        next(stream_generate(model, tokenizer, [5, wrong]))
    with pytest.raises(PromptError, match="is not a token id from 0 to 1025"):
        Batch(model).add([5, wrong])
    if type(wrong) is int and wrong < 1 << 40:
        with pytest.raises(PromptError, match="is not a token id"):
            next(stream_generate(model, tokenizer, mx.array([5, wrong])))


def test_ids_of_arrays_are_taken(parrot):
    model, tokenizer = load(parrot)
    for prompt in (mx.array([5, 6]), np.array([5, 6]), [np.int64(5), 6]):
        assert "".join(e.text for e in stream_generate(model, tokenizer, prompt)) == "Hello"


@pytest.mark.parametrize(
    "flags",
    [
        ("--extra-eos-token", "1026"),
        ("--extra-eos-token", "9" * 5000),
        ("--logit-bias", '{"1026": 1}'),
        ("--logit-bias", '{"²": 1}'),
        ("--logit-bias", '{"-1": 1}'),
        ("--logit-bias", '{"%s": 1}' % ("9" * 5000)),
        ("--logit-bias", '{"7": Infinity}'),
        ("--logit-bias", '{"7": NaN}'),
        ("--logit-bias", '{"7": true}'),
    ],
)
def test_ids_of_flags(parrot, capsys, flags):
    assert main(["generate", "--model", str(parrot), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ring-mlx: [option]")
    assert err.count("\n") == 1


def test_ids_of_a_session_and_a_server(parrot, serve):
    with Session(parrot, store=False) as session:
        for bias in ({1026: 1.0}, {-1: 1.0}, {True: 1.0}):
            with pytest.raises(OptionError, match="logit bias"):
                list(session.send("hi", sampling=Sampling(logit_bias=bias)))
    server = serve(model=parrot)
    for body in ({"prompt": [-1]}, {"prompt": [1026]}, {"prompt": [True]}, {"prompt": "a", "logit_bias": {"1026": 1}}):
        post(server, "/v1/completions", body, code=400)


# What is not finite.


def poison(folder, name, value, row=None):
    """Put a value into a tensor: all of it, or one row."""
    tensors = load_file(folder / NAME)
    tensors[name][... if row is None else row] = value
    save_file(tensors, folder / NAME)


BROKEN = {
    "norm": ("model.norm.weight", math.nan, None),
    "head": ("lm_head.weight", math.nan, None),
    "a row of the head": ("lm_head.weight", math.nan, POISON),
    "first row of the head": ("lm_head.weight", math.nan, 0),
    "infinite": ("lm_head.weight", math.inf, POISON),
    "all ruled out": ("lm_head.weight", -math.inf, None),
}


@pytest.mark.parametrize("temp", ["0", "1"])
@pytest.mark.parametrize("where", BROKEN)
def test_generate_says_that_logits_are_not_finite(copied, capsys, where, temp):
    poison(copied, *BROKEN[where])
    assert main(["generate", "--model", str(copied), "--temp", temp]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ring-mlx: [model] the largest logit is ")
    assert err.count("\n") == 1


def test_a_session_ends_in_an_error_and_lives_on(copied):
    poison(copied, "model.word_embeddings.weight", math.nan, POISON)
    word = load_tokenizer(copied).decode([POISON])
    with Session(copied, store=False) as session:
        reply, events = session.send([{"role": "user", "content": f"{word}{word}"}]), []
        with pytest.raises(ModelError, match="largest logit is nan"):
            events.extend(iter(lambda: next(reply), None))
        events = list(session.send([{"role": "user", "content": "1"}]))
        assert events[-1].reason == "stop"
        assert events[-1].message["reasoning_content"] == "Hello"


def test_the_chat_says_it_and_ends_with_2(copied, capsys, monkeypatch, tmp_path):
    poison(copied, "model.norm.weight", math.nan)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "RING_MLX_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert main(["chat", "--plain", "--model", str(copied)]) == 2
    assert "[model] the largest logit is nan" in capsys.readouterr().err


def test_the_server_fails_one_request_and_not_its_neighbours(copied, serve):
    poison(copied, "model.word_embeddings.weight", math.nan, POISON)
    server = serve(model=copied)
    error = post(server, "/v1/completions", {"prompt": [5, POISON], "max_tokens": 3}, code=500)["error"]
    assert error["code"] == "model_error"
    assert error["message"].startswith("[model] the largest logit is nan")
    assert post(server, "/v1/completions", {"prompt": [5, 6], "temperature": 0})["choices"][0]["text"] == "Hello"


def test_a_bad_row_of_a_batch_leaves_the_others(copied):
    poison(copied, "model.word_embeddings.weight", math.nan, POISON)
    batch = Batch(load_model(copied))
    good, bad = batch.add([5, 6]), batch.add([5, POISON])
    batch.step()
    found = batch.step()
    assert {good, bad} == set(found)
    batch.check(good)
    with pytest.raises(ModelError):
        batch.check(bad)
    batch.remove(bad)
    assert batch.step()[good] != ROLE_END or batch.step()


def test_measurements_say_it(copied, capsys):
    poison(copied, "lm_head.weight", math.nan, POISON)
    with pytest.raises(ModelError):
        perplexity(load_model(copied), [5, 6, 7, 8], 4, 2)
    assert main(["eval", "--model", str(copied), "--task", "add", "--limit", "1", "-m", "2"]) == 2
    assert "[model]" in capsys.readouterr().err


def test_processors_may_rule_tokens_out(parrot):
    """Also all but one, whose logit may be any; and a model's own -inf is no reason either."""
    model = load_model(parrot)
    only = mx.where(mx.arange(ROWS) == 77, 0.0, -math.inf)[None]
    steps = generate_step([5], model, model.make_cache(), max_tokens=3, logits_processors=[lambda _, x: x + only])
    assert [token for token, _ in steps] == [77] * 3
    weight = np.array(model.lm_head.weight)
    weight[POISON] = -1e38
    model.lm_head.weight = mx.array(weight)
    assert len(list(generate_step([5], model, model.make_cache(), max_tokens=2))) == 2


def test_looking_costs_no_wait(parrot, monkeypatch):
    """The next token is under way before this one is looked at, and what is looked at was asked for with it."""
    model, order = load_model(parrot), []
    forward, scheduled = type(model).__call__, mx.async_eval
    monkeypatch.setattr(type(model), "__call__", lambda *a, **k: order.append("forward") or forward(*a, **k))
    monkeypatch.setattr(mx, "async_eval", lambda *a: order.append(f"schedule {len(a)}") or scheduled(*a))
    steps = generate_step([5], model, model.make_cache(), max_tokens=3)
    next(steps)
    assert order[-3:] == ["schedule 2", "forward", "schedule 2"]


def test_letters_of_bytes():
    assert len(set(byte_letters())) == 256
