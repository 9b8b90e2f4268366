"""mlx-lm's own commands and server on our model."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import types
import urllib.request
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import utils
from mlx_lm.perplexity import load_data

from ring_mlx import demo_model_path, load, load_model, mlx_lm_plugin
from ring_mlx.cli import main
from ring_mlx.errors import OptionError
from ring_mlx.evaluation.perplexity import token_nats
from ring_mlx.model.layer import DecoderLayer
from tests import foreign
from tests.compare import assert_close
from tests.conftest import TOKENIZER_FILES
from tests.serving import wait_until
from tests.test_distributed import free_ports
from tests.through_mlx_lm import build, said_alone, until_stop
from tests.tiny import config, save_hf, tokens

pytestmark = pytest.mark.usefixtures("registered")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(capsys):
    """Runs a command of mlx-lm through ours; returns exit code, standard output and standard error."""

    def call(*args):
        code = main(["mlx-lm", *map(str, args)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with train, valid and test files."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": f"The sum of {i} and {i + 1} is {2 * i + 1}. " * (1 + i % 2)}) for i in range(8)]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def datasets(texts, monkeypatch):
    """The `datasets` package, as far as mlx-lm calls it to load a file by name."""

    def load_dataset(path, split, **_):
        assert split.startswith("train")
        return [json.loads(line) for line in (texts.parent / path / "train.jsonl").read_text().splitlines()]

    module = types.ModuleType("datasets")
    module.__spec__ = ModuleSpec("datasets", None)
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A float32 checkpoint whose rows divide into groups of 64, with the demo tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    save_hf(folder, foreign.shape(vocab_size=1024, eos_token_id=1))
    for name in TOKENIZER_FILES:
        shutil.copy(demo_model_path() / name, folder)
    return folder


def test_generate(command):
    code, out, _ = command("generate", "--model", demo_model_path(), "--prompt", "What is 2 + 3?", "-m", 60)
    assert code == 0
    text = out.split("=" * 10 + "\n")[1]
    model, tokenizer = load(demo_model_path())
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 3?"}], add_generation_prompt=True)
    assert text.strip() == until_stop(tokenizer, said_alone(model, ids, 60)).strip()


def test_cache_prompt_and_generate_from_it(command, tmp_path):
    file = tmp_path / "prompt.safetensors"
    model = ("--model", demo_model_path())
    assert command("cache_prompt", *model, "--prompt", "Be brief. ", "--prompt-cache-file", file)[0] == 0
    code, out, _ = command("generate", "--prompt-cache-file", file, "--prompt", "What is 2 + 3?", "-m", 10)
    assert code == 0
    whole, tokenizer = load(demo_model_path())
    start, end = (
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, **options)
        for text, options in (
            ("Be brief. ", {"add_generation_prompt": False, "continue_final_message": True}),
            ("<query>", {"add_generation_prompt": True}),
        )
    )
    rest = end[end.index("<query>") :].replace("<query>", "What is 2 + 3?")
    ids = [i for part in (start, rest) for i in tokenizer.encode(part, add_special_tokens=False)]
    right = until_stop(tokenizer, said_alone(whole, ids, 10))
    assert out.split("=" * 10 + "\n")[1].strip() == right.strip()


def test_perplexity(command, texts, datasets):
    options = ("--sequence-length", 16, "--num-samples", 4, "--batch-size", 2, "--data-path", texts.name)
    code, out, _ = command("perplexity", "--model", demo_model_path(), *options)
    assert code == 0
    found = float(out.partition("Perplexity: ")[2].split()[0])
    model, tokenizer = load(demo_model_path())
    np.random.seed(123)  # the command's own
    data = load_data(tokenizer, texts.name, 4, 16)
    assert data.shape == (4, 16)
    expected = math.exp(np.mean([token_nats(model, row, 1) for row in data.tolist()]))
    assert found == pytest.approx(expected, rel=1e-3)


def test_lora_with_checkpointing_then_generate_and_fuse(command, texts, chat_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DecoderLayer, "__call__", DecoderLayer.__call__)  # --grad-checkpoint replaces it for good
    monkeypatch.setattr(mx, "compile", lambda f, **_: f)  # MLX calls a C++ compiler on the CPU
    adapter = ("--adapter-path", tmp_path / "adapters")
    options = ("--data", texts, "--batch-size", 2, "--num-layers", 5, "--max-seq-length", 32, *adapter)
    learn = ("--train", "--iters", 2, "--learning-rate", "1e-2", "--val-batches", 1, "--steps-per-report", 1)
    code, out, _ = command("lora", "--model", chat_folder, *options, *learn, "--grad-checkpoint", "--test")
    assert code == 0
    assert "Test loss" in out
    changed = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    assert {"query_key_value", "g_proj", "dense", "gate_proj", "up_proj"} <= {n.split(".")[-2] for n in changed}
    learnt = [mx.abs(x).max().item() > 0 for n, x in changed.items() if n.endswith("lora_b")]
    assert all(learnt)
    code, adapted, _ = command("generate", "--model", chat_folder, *adapter, "--prompt", "one", "-m", 8)
    assert code == 0
    assert command("fuse", "--model", chat_folder, *adapter, "--save-path", tmp_path / "fused")[0] == 0
    code, fused, _ = command("generate", "--model", tmp_path / "fused", "--prompt", "one", "-m", 8)
    assert code == 0
    assert adapted.split("=" * 10)[1] == fused.split("=" * 10)[1]
    main(["generate", "--model", str(chat_folder), *map(str, adapter), "--prompt=one", "-m8", "--temp=0"])
    assert capsys.readouterr().out.split("=" * 10)[1].strip() == adapted.split("=" * 10)[1].strip()


def test_lora_lowers_the_loss_of_the_quantized_demo_model(command, texts, tmp_path):
    options = ("--data", texts, "--batch-size", 2, "--num-layers", 2, "--max-seq-length", 32)
    learn = ("--train", "--iters", 4, "--learning-rate", "1e-3", "--val-batches", 4, "--steps-per-eval", 4)
    code, out, _ = command(
        "lora", "--model", demo_model_path(), *options, *learn, "--adapter-path", tmp_path / "adapters"
    )
    assert code == 0
    first, last = (float(x) for x in re.findall(r"val ([0-9.]+)", re.sub(r"\x1b\[[0-9;]*m", "", out)))
    assert last < first / 2


def test_dwq(command, wide, texts, datasets, tmp_path):
    options = ("--mlx-path", tmp_path / "q", "--bits", 3, "--num-samples", 4, "--batch-size", 2)
    code, out, err = command(
        "dwq", "--model", wide, *options, "--max-seq-length", 33, "--data-path", texts.name, "--learning-rate", "1e-4"
    )
    assert code == 0
    losses = [float(line.rpartition("=")[2]) for line in (out + err).splitlines() if line.startswith("Validation")]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    ids = tokens(20, vocab=1024)
    assert_close(build(tmp_path / "q")(ids), load_model(tmp_path / "q", dtype=mx.float32)(ids), 1e-4)


def test_convert(command, wide, tmp_path):
    assert command("convert", "--hf-path", wide, "--mlx-path", tmp_path / "q", "-q", "--q-bits", 4)[0] == 0
    names = mx.load(str(tmp_path / "q" / "model.safetensors"))
    router = "model.layers.1.mlp.gate.gate_proj"
    assert f"{router}.scales" not in names
    assert names[f"{router}.weight"].dtype == mx.float32
    ids = tokens(20, vocab=1024)
    assert_close(build(tmp_path / "q")(ids), load_model(tmp_path / "q", dtype=mx.float32)(ids), 1e-4)


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def lm_eval(monkeypatch):
    """The lm_eval package, as far as mlx_lm.evaluate touches it; its answers to three kinds of request are kept."""
    answers = {}

    def simple_evaluate(model, tasks, **_):
        answers["pairs"] = model.loglikelihood(
            [Request("2 + 3 =", " 5"), Request("2 + 3 =", " 6 and"), Request("a", "b")]
        )
        answers["whole"] = model.loglikelihood_rolling([Request("one two three"), Request("five")])
        options = {"until": ["\n\n"], "max_gen_toks": 6}
        answers["texts"] = model.generate_until([Request("What is 2 + 3?", options), Request("Why?", options)])
        answers["model"] = model
        return {"results": {task: {"acc": 1.0} for task in tasks}}

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api.model", "lm_eval.api.registry")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.api.model"].LM = type("LM", (), {})
    modules["lm_eval.api.registry"].register_model = lambda *_: lambda cls: cls
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0" if name == "lm_eval" else "1")
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    yield answers
    sys.modules.pop("mlx_lm.evaluate", None)


def test_evaluate(command, lm_eval, tmp_path):
    code, out, _ = command(
        "evaluate", "--model", demo_model_path(), "--tasks", "sums", "--output-dir", tmp_path, "--batch-size", 2
    )
    assert code == 0
    assert '"acc": 1.0' in out
    model, tokenizer = load(demo_model_path())

    def logprobs(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        found = nn.log_softmax(model(mx.array([ids])).astype(mx.float32))[0]
        return [found[i, t].item() for i, t in enumerate(ids[1:])]

    for (context, answer), (score, _) in zip(
        (("2 + 3 =", " 5"), ("2 + 3 =", " 6 and"), ("a", "b")), lm_eval["pairs"], strict=True
    ):
        start = len(tokenizer.encode(context, add_special_tokens=False)) - 1
        assert score == pytest.approx(sum(logprobs(context + answer)[start:]), rel=1e-3)
    for text, score in zip(("one two three", "five"), lm_eval["whole"], strict=True):
        assert score == pytest.approx(sum(logprobs(text)), rel=1e-3)
    for text, found in zip(("What is 2 + 3?", "Why?"), lm_eval["texts"], strict=True):
        said = said_alone(model, tokenizer.encode(text, add_special_tokens=False), 6)
        right = until_stop(tokenizer, said).split("\n\n")[0]
        assert found == right.rpartition(tokenizer.think_end)[2]


def answers(port):
    """Whether a server says there that it is well."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a running ``python -m ring_mlx.mlx_lm_plugin server`` on the demo model."""
    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ring_mlx.mlx_lm_plugin",
                "server",
                "--model",
                demo_model_path(),
                "--port",
                str(port),
            ],
            stdout=out,
            stderr=out,
        )
    try:
        wait_until(lambda: process.poll() is not None or answers(port), seconds=120)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(address, route, **body):
    request = urllib.request.Request(address + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def test_server_answers_several_at_once_as_one_by_one(server):
    model, tokenizer = load(demo_model_path())
    prompts = ["What is 2 + 3?", "one " * 40, "Why is it that"]
    found = [None] * len(prompts)

    def complete(i):
        found[i] = ask(server, "/v1/completions", prompt=prompts[i], max_tokens=10 + 4 * i, temperature=0)

    threads = [threading.Thread(target=complete, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, text in enumerate(prompts):
        right = until_stop(tokenizer, said_alone(model, tokenizer.encode(text), 10 + 4 * i))
        assert found[i]["choices"][0]["text"] == right.lstrip(" "), "the server strips spaces from the front only"


def test_server_keeps_what_it_has_read(server):
    messages = [{"role": "user", "content": "What is 27 + 35?"}]
    first = ask(server, "/v1/chat/completions", messages=messages, max_tokens=200, temperature=0)
    again = ask(server, "/v1/chat/completions", messages=messages, max_tokens=200, temperature=0)
    answer = first["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert answer["message"]["reasoning"]
    assert "<" not in answer["message"]["content"]
    assert again["choices"][0]["message"] == answer["message"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


# The door.


def test_a_command_that_mlx_lm_lacks(capsys):
    with pytest.raises(OptionError, match=r"no command 'sing'; give one of .*'lora'"):
        mlx_lm_plugin.run("sing", [])
    assert main(["mlx-lm", "sing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sys.argv[0] != "mlx_lm sing"


def test_every_command_is_in_the_documentation():
    with pytest.raises(OptionError) as e:
        mlx_lm_plugin.run("sing", [])
    text = (ROOT / "docs" / "mlx_lm.md").read_text(encoding="utf-8")
    commands = re.findall(r"'(\w+)'", str(e.value).partition("give one of")[2])
    assert len(commands) >= 17
    assert [c for c in commands if f"`{c}`" not in text] == []


def unlike_experts(arrays):
    name = next(n for n in arrays if ".experts.3.up_proj" in n)
    arrays[name] = arrays[name][:-1]


def no_router(arrays):
    del arrays[next(n for n in arrays if n.endswith("mlp.gate.weight"))]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("generate", ["--prompt", "hi"]),
        ("cache_prompt", ["--prompt", "hi", "--prompt-cache-file", "{out}"]),
        ("perplexity", []),
        ("convert", ["--mlx-path", "{out}"]),
        ("fuse", ["--save-path", "{out}"]),
        ("chat", []),
        ("benchmark", []),
        ("server", ["--port", "0"]),
    ],
)
@pytest.mark.parametrize(("damage", "seen"), [(unlike_experts, "differ in shape"), (no_router, "gate_proj.weight")])
def test_a_damaged_checkpoint_is_one_line(command, tmp_path, name, args, damage, seen):
    save_hf(tmp_path / "model", config())
    shard = next((tmp_path / "model").glob("*.safetensors"))
    arrays = mx.load(str(shard))
    damage(arrays)
    mx.save_safetensors(str(shard), arrays)
    for file in TOKENIZER_FILES:
        shutil.copy(demo_model_path() / file, tmp_path / "model")
    given = "--hf-path" if name == "convert" else "--model"
    out = [a.format(out=tmp_path / "out.safetensors") for a in args]
    code, _, err = command(name, given, tmp_path / "model", *out)
    assert code == 2
    assert err.startswith("ring-mlx: [weights]")
    assert seen in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "given",
    [
        ["fuse", "--model", demo_model_path(), "--adapter-path", "nowhere"],
        ["generate", "--model", demo_model_path(), "--prompt-cache-file", "nowhere.safetensors", "--prompt", "hi"],
        ["generate", "--model", demo_model_path(), "--prompt", "hi", "--chat-template-config", "{"],
        ["lora", "--model", demo_model_path(), "--train", "--data", "nowhere/at/all", "--num-layers", "1"],
        ["lora", "--config", "nowhere.yaml"],
    ],
)
def test_other_bad_input_is_one_line(command, given):
    code, _, err = command(*given)
    assert code == 2
    lacks_datasets = given[0] == "lora" and "--data" in given and find_spec("datasets") is None
    origin = "install] the package datasets" if lacks_datasets else f"option] mlx-lm {given[0]} failed"
    assert err.splitlines()[-1].startswith(f"ring-mlx: [{origin}")
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["generate", "chat", "server"])
@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (["--model", "/nowhere/x"], "[hub] no such folder '/nowhere/x'"),
        (["--model", "nobody/none"], "[hub] the disk is full while downloading nobody/none"),
        (["--model", demo_model_path(), "--adapter-path", "/nowhere"], "/nowhere"),
        (["--model", demo_model_path(), "--draft-model", "nobody/none"], "[hub] the disk is full"),
        (["--model", demo_model_path(), "--draft-model", demo_model_path()], "raft"),
    ],
)
def test_what_is_not_there_is_one_line(command, monkeypatch, name, given, seen):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if name == "chat" and "--draft-model" in given:
        pytest.skip("mlx-lm's chat takes no draft")
    monkeypatch.setattr(utils, "snapshot_download", full)
    code, _, err = command(name, *given, *{"generate": ["--prompt", "hi"], "server": ["--port", "0"]}.get(name, []))
    assert code == 2
    assert err.startswith("ring-mlx: [")
    assert seen in err or (name == "generate" and "Speculative" in err)
    assert err.count("\n") == 1


def test_a_template_without_end_is_ended(command, tmp_path):
    shutil.copytree(demo_model_path(), tmp_path / "model")
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(loop)
    code, _, err = command("generate", "--model", tmp_path / "model", "--prompt", "hi")
    assert code == 2
    assert "the chat template refused the messages (it takes too long" in err


def test_messages_are_rendered_as_transformers_does():
    ours = utils.load_tokenizer(demo_model_path())
    plain = ours._tokenizer
    said = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"add_generation_prompt": True, "enable_thinking": False},
    ):
        told = {"enable_thinking": ours.has_thinking} | options
        assert ours.apply_chat_template(said, **options) == plain.apply_chat_template(said, return_dict=False, **told)
    assert ours.apply_chat_template(said, tokenize=False) == plain.apply_chat_template(
        said, tokenize=False, enable_thinking=ours.has_thinking
    )


def test_help_is_that_of_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["mlx-lm", "generate", "--help"])
    assert "--prompt-cache-file" in capsys.readouterr().out


def test_a_bad_config_is_one_line(tmp_path, capsys):
    save_hf(tmp_path, config())
    (tmp_path / "config.json").write_text(json.dumps(config(rope_theta=...)))
    assert main(["mlx-lm", "generate", "--model", str(tmp_path)]) == 2
    assert "[config] config.json lacks rope_theta" in capsys.readouterr().err
