"""Each hostile folder is answered or refused in one line, through every door."""

from __future__ import annotations

import pytest

from tests.fuzz import folders
from tests.fuzz.hostile import HOSTILE, SHARDS
from tests.fuzz.server import attempt

CLI, SERVE, SESSION = (f"tests.fuzz.doors:{name}" for name in ("cli", "serve", "session"))
# What each door reads in its own way.
DOORS = {
    "convert": (CLI, ["convert", "--model", "{model}", "--mlx-path", "{out}", "-q", "--q-fit", "rtn"]),
    "dry-run": (CLI, ["convert", "--model", "{model}", "--mlx-path", "{out}", "--dry-run"]),
    "eval": (CLI, ["eval", "--model", "{model}", "--perplexity", "{text}"]),
    "bench": (CLI, ["bench", "--model", "{model}", "-p", "8", "-g", "2", "-n", "1"]),
    "cache-prompt": (CLI, ["cache-prompt", "--model", "{model}", "--prompt", "hi", "--prompt-cache-file", "{out}"]),
    "doctor": (CLI, ["doctor", "--check-decay", "{model}", "--text", "{text}", "--tokens", "32"]),
    "chat": (CLI, ["chat", "--plain", "--model", "{model}", "--max-tokens", "3"]),
    "serve": (SERVE, "{model}"),
    "session": (SESSION, "{model}"),
    "mlx-lm": (CLI, ["mlx-lm", "generate", "--model", "{model}", "--prompt", "hi", "--max-tokens", "3"]),
}
THROUGH_DOORS = [
    "config_layers_1e9",
    "config_eos_mixed",
    "config_quantization_list",
    "config_quantization_module_null",
    "config_foreign_str",
    "config_raw_nested",
    "config_raw_digits",
    "config_yarn_beta_str",
    "generation_eos_str",
    "tokenizer_redos",
    "tokenizer_replacement_grows",
    "template_loop",
    "header_layer_digits",
    "header_many",
    "index_outside",
    "index_long",
    "header_tensor_gone",
    "shards_twice",
    "file_fifo_config.json",
    "file_fifo_model.safetensors",
    "file_device_tokenizer.json",
]
# A conversion only copies these, and takes its time; the dry run opens them as well.
COPIED = ("generation", "template", "tokenizer", "file_device", "config_eos")
# Each third folder through a door by turns: all doors call the same loader, and `test_generate` has all folders.
PAIRS = [
    pytest.param(door, name, marks=[pytest.mark.slow] if (d + n) % 3 else [])
    for d, door in enumerate(DOORS)
    for n, name in enumerate(THROUGH_DOORS)
    if door != "convert" or not name.startswith(COPIED)
]


def test_there_are_many():
    assert len(HOSTILE) > 200


@pytest.mark.parametrize("name", HOSTILE)
def test_generate(forks, name):
    with folders.folder() as model:
        HOSTILE[name](model)
        attempt(forks, CLI, ["generate", "--model", str(model), "--prompt", "hi", "--max-tokens", "3"])
        assert not list(model.parent.rglob("PWNED"))


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("command", ["generate", "mlx-lm", "convert", "dry-run"])
def test_two_tensors_for_a_parameter_or_none_in_the_file(forks, name, command):
    """The last one of two would be taken without a word; what was never written would be zeros."""
    with folders.folder() as model:
        HOSTILE[f"shards_{name}"](model)
        given = dict(DOORS, generate=(CLI, ["generate", "--model", "{model}", "--prompt", "hi"]))[command][1]
        outcome = attempt(forks, CLI, [a.format(model=model, out=model.parent / "out") for a in given])
        assert outcome.code == 2
        assert (
            "never written" if name == "sparse" else "model-00002.safetensors" if name == "twice" else "another tensor"
        ) in outcome.err


@pytest.mark.parametrize("name", ["index_outside", "index_absolute", "index_password", "index_zero"])
def test_the_index_leads_nowhere_else(forks, name):
    with folders.folder() as model:
        HOSTILE[name](model)
        outcome = attempt(forks, CLI, ["generate", "--model", str(model), "--prompt", "hi", "--max-tokens", "3"])
        assert outcome.code == 2
        assert "no file of its folder" in outcome.err


@pytest.mark.parametrize(("door", "name"), PAIRS)
def test_every_door(forks, door, name):
    function, given = DOORS[door]
    with folders.folder() as model:
        HOSTILE[name](model)
        text = model.parent / "text.txt"
        text.write_text("some words " * 20)
        places = {"model": model, "text": text, "out": model.parent / "out"}
        args = [a.format(**places) for a in given] if isinstance(given, list) else given.format(**places)
        attempt(forks, function, args, stdin="hi\n")


@pytest.mark.parametrize("name", ["header_norm_integers", "header_packed_as_float"])
def test_through_mlx_lm(forks, name):
    with folders.folder() as model:
        HOSTILE[name](model)
        outcome = attempt(forks, CLI, ["mlx-lm", "generate", "--model", str(model), "--prompt", "hi", "-m", "2"])
        assert outcome.code == 2
