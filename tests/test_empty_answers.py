"""An answer of which nothing can be seen is told at every door, with the reason."""

from __future__ import annotations

import gzip
import io
import json

import pytest

from ring_mlx.checkpoint.loading import load
from ring_mlx.cli import main
from ring_mlx.evaluation import evaluate
from ring_mlx.evaluation.suite import Question
from tests.parrot import make_parrot, teach
from tests.serving import client_of, user

TEMPLATE = (
    "{% for m in messages %}{{ '<role>HUMAN</role>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)
AT_ONCE, THOUGHT, UNSEEN = "the model ended it at once", "tokens were thought", "nothing of it can be seen"
CAUSES = {
    "ended": ([], AT_ONCE),
    "thought": (["<think>", "hm", "</think>"], THOUGHT),
    "open": (["<think>", "hm"], THOUGHT),
    "blank": ([" \n"], "2 tokens"),
    "unseen": (["\u200b"], UNSEEN),
}
PIECES = {piece for pieces, _ in CAUSES.values() for piece in pieces} | {"62", "so 62"}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    folder = make_parrot(tmp_path_factory.mktemp("empty") / "model", ["62"], spare=sorted(PIECES))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder, *load(folder)


@pytest.fixture
def say(parrot, monkeypatch):
    folder, model, tokenizer = parrot
    for place in ("ring_mlx.cli.from_options", "ring_mlx.engine.loaded"):
        monkeypatch.setattr(f"{place}.load", lambda *args, **options: (model, tokenizer))
    return lambda pieces: (teach(model, tokenizer, pieces), folder)[1]


@pytest.mark.parametrize("cause", CAUSES)
def test_commands(say, cause, capsys, monkeypatch, tmp_path):
    pieces, why = CAUSES[cause]
    folder = str(say(pieces))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "RING_MLX_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    for flags in (["--thinking", "hide"], ["--json"], ["--ignore-chat-template"]):
        assert main(["generate", "--model", folder, *flags]) == 0
        said = capsys.readouterr().err
        assert "[generate] the answer is empty: " in said
        assert why in said
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main(["chat", "--plain", "--model", folder]) == 0
    said = capsys.readouterr().err
    assert "[chat] the answer is empty: " in said
    assert why in said


def test_serve_tells_its_log(say, serve, capsys):
    server = serve(model=say([]))
    with client_of(server) as client:
        chat, completions = client.chat.completions.create, client.completions.create
        for pieces, why, more in [*((*c, {}) for c in CAUSES.values()), (["62"], "2 tokens and no", {"stop": "62"})]:
            say(pieces)
            capsys.readouterr()
            for stream in (False, True):
                request = {"model": "toy", "temperature": 0, "stream": stream, "max_tokens": 9, **more}
                for answer in (chat(messages=user("hi"), **request), completions(prompt="hi", **request)):
                    assert not stream or list(answer)
            said = capsys.readouterr().err
            shown = {"thought": 2, "open": 2}.get(next((k for k, c in CAUSES.items() if c[0] is pieces), ""), 4)
            assert said.count("[serve] the answer is empty: ") == shown, (pieces, said)  # a completion is no thought
            assert why in said
        say(["62"])
        chat(messages=user("hi"), model="toy")
    assert not capsys.readouterr().err


def test_eval_counts_them_and_takes_no_thought_for_an_answer(say, parrot, capsys, tmp_path):
    suite, (_, model, tokenizer) = tmp_path / "suite.gz", parrot
    question = {"task": "sum", "messages": user("hi"), "answer": "62"}
    suite.write_bytes(gzip.compress(json.dumps(question).encode()))
    for pieces, right, empty in ((["62"], 1, 0), (["<think>", "so 62"], 0, 1), ([], 0, 1), (["\u200b"], 0, 1)):
        folder = say(pieces)
        assert main(["eval", "--model", str(folder), "--suite", str(suite), "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["tasks"]["sum"]["right"] == right
        assert err.count("[eval] 1 of 1 answers are empty or all thought") == empty
    say(["so 62"])
    assert evaluate(model, tokenizer, [Question("sum", tuple(user("hi")), "62")])[0].right
