"""What an answer is when nobody says how: as long as the model wants, sampled as the checkpoint or its family says."""

from __future__ import annotations

import gzip
import json

import pytest

from ring_mlx import Session, load
from ring_mlx.checkpoint.loading import demo_model_path
from ring_mlx.cli import main
from ring_mlx.cli.exit_codes import CUT_OFF
from ring_mlx.engine.events import Sampling
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.request import Request
from ring_mlx.errors import ConfigError
from ring_mlx.generation.defaults import FAMILY, filled, read_defaults
from ring_mlx.generation.sampling import start_sampling
from ring_mlx.serve.engine import Engine, Settings
from ring_mlx.serve.protocol import parse_chat
from tests.parrot import make_parrot
from tests.serving import user
from tests.sessions import options
from tui import messages as chat
from tui.messages import Figures, Loaded
from tui.records import record_of

ANSWER = ["</think>", "\n\n", "The", " answer", " is", " 42", "."]
FILE = "generation_config.json"
ASK = [{"role": "user", "content": "hi"}]


def generate(capsys, *args):
    """Exit code, the run as JSON, standard error."""
    code = main(["generate", "--json", *map(str, args)])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A thinker of 90 tokens."""
    return make_parrot(tmp_path_factory.mktemp("parrot") / "model", [*(f" t{n}" for n in range(90)), *ANSWER])


def test_the_first_answer_of_the_toy_is_complete(capsys):
    code, found, err = generate(capsys, "--prompt", "What is 27 + 35?")
    assert (code, found["finish_reason"]) == (0, "stop")
    assert found["answer"] == "The sum is 62."
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_thought_of_3000_tokens_is_followed_by_its_answer(tmp_path, capsys):
    """Long after every limit that there was; 5 s of processor time, which no shorter thought would show."""
    folder = make_parrot(tmp_path / "model", [*(f" t{n}" for n in range(3000)), *ANSWER])
    code, found, err = generate(capsys, "--model", folder, "--prompt", "hi")
    assert (code, found["finish_reason"], found["answer"], err) == (0, "stop", "The answer is 42.", "")
    assert found["thinking_tokens"] == 3001
    assert found["thinking"].endswith(" t2998 t2999")


def test_no_door_has_a_shorter_limit(parrot):
    """Session, chat and serve go on to the end of the context as well."""
    model, tokenizer = load(parrot)
    turn = LoadedModel(model, tokenizer, options()).prepare(Request(ASK))
    assert turn.limit == model.config.context_tokens - len(turn.prompt.ids) + 1
    engine = Engine(Settings(parrot, "parrot", store=False), Metrics())
    try:
        assert engine.wait_until_loaded(60)
        job = engine.prepare(parse_chat({"messages": user("hi")}, engine.settings.sampling))
    finally:
        engine.close()
    assert job.prepared.limit == model.config.context_tokens - len(job.prepared.prompt.ids) + 1


@pytest.mark.parametrize(
    ("tokens", "room", "said"),
    [
        (96, (), "the answer was cut off after 96 tokens; raise --max-tokens, or leave it out to have all."),
        (40, ("--answer-room", 0), "the answer is empty: all 40 tokens were thought; raise --max-tokens, or leave"),
    ],
    ids=["in the answer", "in the thought"],
)
def test_an_answer_that_was_cut_says_so_and_the_exit_code_too(parrot, capsys, tokens, room, said):
    code, found, err = generate(capsys, "--model", parrot, "--max-tokens", tokens, "--answer-room", 0, *room)
    assert (code, found["finish_reason"]) == (CUT_OFF, "length")
    assert err.startswith(f"ring-mlx: [generate] {said}")
    assert err.count("\n") == 1


def test_an_answer_that_fills_the_context_says_so(parrot, tmp_path, capsys):
    for file in parrot.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    raw = json.loads((parrot / "config.json").read_text()) | {"max_position_embeddings": 60}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    code, found, err = generate(capsys, "--model", tmp_path, "--answer-room", 0)
    assert (code, found["finish_reason"]) == (CUT_OFF, "length")
    assert found["prompt_tokens"] + found["generation_tokens"] == 61
    assert "the context of 60 tokens is full: shorten the prompt." in err


def test_an_evaluation_lets_answers_end_and_says_how_many_were_cut_off(parrot, tmp_path, capsys):
    suite = tmp_path / "suite.jsonl.gz"
    question = {"task": "ask", "messages": ASK, "answer": "The answer is 42."}
    suite.write_bytes(gzip.compress(json.dumps(question).encode()))
    words = ["eval", "--model", str(parrot), "--suite", str(suite), "--json"]
    for flags, cut_off in (((), 0), (("--max-tokens", "50"), 1)):
        assert main([*words, *flags]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["cut_off"] == cut_off
        assert ("[eval] 1 answers were cut off" in err) == bool(cut_off)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, FAMILY),
        ({"eos_token_id": 2, "temperature": None, "max_new_tokens": 20}, FAMILY),
        ({"do_sample": False}, Sampling(0.0, 1.0, 0.0, 0)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, Sampling(0.0, 0.9, 0.0, 0)),
        ({"do_sample": True, "temperature": 0, "min_p": 0.1}, Sampling(0.0, 1.0, 0.1, 0)),
        ({"temperature": 1, "top_k": 20}, Sampling(1.0, 1.0, 0.0, 20)),
        ({"top_k": -1, "repetition_penalty": 1.05}, Sampling(0.6, 1.0, 0.0, 0, repetition_penalty=1.05)),
        ({"top_k": 99_999}, FAMILY),
    ],
)
def test_what_a_generation_config_says_holds(tmp_path, raw, expected):
    (tmp_path / FILE).write_text(json.dumps(raw))
    assert read_defaults(tmp_path, 1024) == expected


def test_without_a_generation_config_the_family_holds(tmp_path):
    assert read_defaults(tmp_path, 1024) == Sampling(0.6, 1.0, 0.0, 0) == filled(Sampling())


@pytest.mark.parametrize(
    "raw",
    [
        *({"temperature": -1}, {"temperature": "hot"}, {"temperature": float("nan")}, {"top_p": 2}, {"top_k": 1.5}),
        *({"top_k": True}, {"do_sample": "no"}, {"do_sample": 0}, {"min_p": []}, {"repetition_penalty": 0}),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path, raw):
    (tmp_path / FILE).write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=rf"{next(iter(raw))} .* is .*\({tmp_path}/{FILE}\); correct it"):
        read_defaults(tmp_path, 1024)


@pytest.fixture
def greedy(parrot, tmp_path):
    """The same checkpoint, which asks for greedy answers."""
    for file in parrot.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / FILE).write_text('{"do_sample": false, "top_p": 0.9}')
    return tmp_path


def test_every_door_takes_the_checkpoints_settings_and_an_option_wins(greedy, parrot, monkeypatch, capsys):
    seen = []

    def recording(s, vocabulary, tokenizer, defaults=FAMILY):
        found = filled(s, defaults)
        seen.append((found.temp, found.top_p))
        return start_sampling(s, vocabulary, tokenizer, defaults)

    for place in ("ring_mlx.cli.from_options", "ring_mlx.engine.row"):
        monkeypatch.setattr(f"{place}.start_sampling", recording)
    for folder, plain in ((greedy, (0.0, 0.9)), (parrot, (0.6, 1.0))):
        for option, expected in (((), plain), (("--temp", "0.3"), (0.3, plain[1]))):
            generate(capsys, "--model", folder, "--max-tokens", 1, *option)
            assert seen.pop() == expected
        with Session(folder, store=False) as session:
            list(session.send(ASK, max_tokens=1))
            assert seen.pop() == plain
            list(session.send(ASK, max_tokens=1, sampling=Sampling(temp=0.3, seed=1)))
            assert seen.pop() == (0.3, plain[1])
            assert (session.wait_until_loaded().sampling.temp, session.wait_until_loaded().sampling.top_p) == plain
        # Of a server's three: the request wins over its option, its option over the checkpoint.
        engine = Engine(Settings(folder, "x", sampling=Sampling(top_p=0.7), store=False), Metrics())
        try:
            assert engine.wait_until_loaded(60)
            for more, expected in (({}, (plain[0], 0.7)), ({"temperature": 0.3, "top_p": 0.8}, (0.3, 0.8))):
                body = {"messages": user("hi"), "max_tokens": 1} | more
                job = engine.prepare(parse_chat(body, engine.settings.sampling))
                assert (job.sampling.temp, job.sampling.top_p) == expected
        finally:
            engine.close()


def test_the_toy_is_greedy_at_every_door():
    assert load(demo_model_path())[0].sampling.temp == 0


def test_a_record_in_the_chat_says_what_was_used():
    """The settings, and of what they leave open what the model says."""
    model = Loaded("x", 4096, sampling=chat.Sampling(temp=0.25, top_p=1.0))
    record = record_of(model, chat.Sampling(top_p=0.5, max_tokens=9), Figures(seed=3), "stop")
    assert record.sampling == {"temp": 0.25, "top_p": 0.5, "max_tokens": 9, "seed": 3}
