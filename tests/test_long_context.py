"""YaRN in config.json lengthens the context at every door: 16 tokens that the file names, times 16."""

from __future__ import annotations

import json

import pytest

from ring_mlx import Session
from ring_mlx.checkpoint.loading import load_model
from ring_mlx.cli import main
from ring_mlx.doctor import models
from ring_mlx.errors import PromptError
from ring_mlx.generation.batch import Batch
from ring_mlx.model.config import read_config
from tests.parrot import make_parrot
from tests.serving import send

CONTEXT = 256
FITS, TOO_LONG = "a b c d e f g h " * 8, "a b c d e f g h " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_parrot(tmp_path_factory.mktemp("yarn") / "model", ["Fine"])
    raw = json.loads((made / "config.json").read_text())
    raw |= {"max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": 16.0}}
    (made / "config.json").write_text(json.dumps(raw))
    return made


@pytest.mark.parametrize("command", ["generate", "cache-prompt"])
def test_commands(folder, tmp_path, capsys, command):
    flags = ["--ignore-chat-template"] if command == "generate" else ["--prompt-cache-file", str(tmp_path / "cache")]
    assert main([command, "--model", str(folder), "--prompt", FITS, *flags]) == 0
    assert main([command, "--model", str(folder), "--prompt", TOO_LONG, *flags]) == 2
    assert f"exceed the context of {CONTEXT}" in capsys.readouterr().err.replace("leave no room in", "exceed")


def test_session_and_the_gauge_of_the_chat(folder):
    with Session(folder, store=False) as session:
        assert list(session.send(FITS))[-1].message["content"] == "Fine"
        assert session.wait_until_loaded().context_tokens == CONTEXT
        with pytest.raises(PromptError, match=f"exceed the context of {CONTEXT}"):
            list(session.send(TOO_LONG))


def test_serve(folder, serve):
    server = serve(model=folder)
    assert send(server, "POST", "/v1/completions", {"prompt": FITS})[2]["choices"][0]["text"] == "Fine"
    assert send(server, "POST", "/v1/completions", {"prompt": TOO_LONG})[0] == 400
    assert send(server, "GET", "/v1/models")[2]["data"][0]["context_length"] == CONTEXT


def test_a_batch(folder):
    batch = Batch(load_model(folder))
    batch.add([5] * CONTEXT)
    with pytest.raises(PromptError):
        batch.add([5] * (CONTEXT + 1))


def test_bench_and_doctor(folder, capsys):
    config = read_config(folder)[0]
    assert models.fits(config, 1 << 40)[0][2] == CONTEXT
    sizes = ["-g", "2", "-n", "1"]
    assert main(["bench", "--model", str(folder), "-p", "200", *sizes]) == 0
    assert main(["bench", "--model", str(folder), "-p", "255", *sizes]) == 2
    assert f"context is {CONTEXT}" in capsys.readouterr().err
