"""The command as a person types it: output, statistics, and bad input in one line with exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import pytest

from ring_mlx import load, stream_generate
from ring_mlx.cli import main
from ring_mlx.cli.exit_codes import CUT_OFF
from tests.tiny import config, save_hf, write


def run(*args, stdin=None, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "ring_mlx", *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def cli(capsys):
    """Runs the command in this process; returns exit code, standard output and standard error."""

    def call(*args):
        try:
            code = main([str(a) for a in args])
        except SystemExit as e:
            code = e.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def generate(cli, folder, *args):
    return cli("generate", "--model", folder, "--max-tokens", 12, "--temp", 0, *args)


def test_output_reads_like_mlx_lms(cli, chat_folder):
    code, out, err = generate(cli, chat_folder, "--prompt", "hello", "--thinking-start", "closed")
    assert code == CUT_OFF
    assert (
        err
        == "ring-mlx: [generate] the answer was cut off after 12 tokens; raise --max-tokens, or leave it out to have all.\n"
    )
    assert re.fullmatch(
        r"={10}\n.*\n={10}\nPrompt: \d+ tokens, \d+\.\d{3} tokens-per-sec\n"
        r"Generation: \d+ tokens, \d+\.\d{3} tokens-per-sec\nPeak memory: \d+\.\d{3} GB\n",
        out,
        re.DOTALL,
    )


def test_quiet_prints_the_text_only(cli, chat_folder, chat):
    _, out, _ = generate(cli, chat_folder, "--prompt", "hello", "--verbose", "False", "--ignore-chat-template")
    model, tokenizer = chat
    text = "".join(e.text for e in stream_generate(model, tokenizer, "hello", max_tokens=12))
    assert out == text + "\n"


def test_json(cli, chat_folder):
    code, out, _ = generate(cli, chat_folder, "--prompt", "hello", "--json")
    result = json.loads(out)
    assert (code, result["finish_reason"]) in ((0, "stop"), (CUT_OFF, "length"))
    assert result["generation_tokens"] <= 12
    assert {"text", "thinking", "answer", "prompt_tps", "time_to_first_token_s", "peak_memory_gb"} <= set(result)


def test_standard_input_is_the_prompt(chat_folder):
    words = ("generate", "--model", chat_folder, "--no-store", "--json", "-m", 5, "--temp", 0)
    piped = run(*words, "--prompt", "-", stdin="caf\u00e9 one\n")
    given = run(*words, "--prompt", "caf\u00e9 one\\n")
    assert piped.returncode == CUT_OFF, piped.stderr
    assert json.loads(piped.stdout)["text"] == json.loads(given.stdout)["text"]
    assert json.loads(piped.stdout)["prompt_tokens"] == json.loads(given.stdout)["prompt_tokens"]


def test_options_reach_the_template(cli, chat_folder):
    counts = []
    for extra in (
        (),
        ("--system-prompt", "Be brief."),
        ("--chat-template-config", '{"enable_thinking": false}'),
        ("--prefill-response", "Well,"),
    ):
        _, out, _ = generate(cli, chat_folder, "--prompt", "hello", "--json", *extra)
        counts.append(json.loads(out)["prompt_tokens"])
    assert len(set(counts)) == 4


def test_a_seed_repeats(cli, chat_folder):
    texts = [generate(cli, chat_folder, "--temp", "1.0", "--seed", s, "--json", "-m", 30)[1] for s in (3, 3, 4)]
    texts = [json.loads(t)["text"] for t in texts]
    assert texts[0] == texts[1] != texts[2]


def test_extra_eos_token_stops(cli, chat_folder):
    _, out, _ = generate(cli, chat_folder, "--json", "--ignore-chat-template")
    model, tokenizer = load(chat_folder)
    first = next(iter(stream_generate(model, tokenizer, "hello", max_tokens=1))).token
    _, out, _ = generate(cli, chat_folder, "--json", "--ignore-chat-template", "--extra-eos-token", str(first))
    assert json.loads(out)["finish_reason"] == "stop"
    assert json.loads(out)["text"] == ""


def test_the_toy_says_that_it_is_one(cli):
    code, _, err = cli("generate", "--prompt", "What is 2 + 3?")
    assert code == 0
    assert err.count("\n") == 1
    assert "toy" in err
    assert "--model inclusionAI/Ring-mini-linear-2.0" in err


def test_a_cached_prompt_continues(cli, chat_folder, tmp_path):
    path = tmp_path / "p.cache"
    code, _, err = cli("cache-prompt", "--model", chat_folder, "--prompt", "A long tale.", "--prompt-cache-file", path)
    assert code == 0
    assert re.search(r"Read \d+ tokens", err)
    _, out, _ = generate(cli, chat_folder, "--prompt-cache-file", path, "--prompt", " What now?", "--json")
    cached = json.loads(out)
    _, out, _ = generate(cli, chat_folder, "--prompt", "A long tale. What now?", "--json")
    whole = json.loads(out)
    assert cached["cached_tokens"] > 0
    assert cached["text"] == whole["text"]
    assert cached["cached_tokens"] + cached["prompt_tokens"] == whole["prompt_tokens"]
    code, _, err = generate(cli, chat_folder, "--prompt-cache-file", path, "--system-prompt", "Be a pirate.")
    assert code == 2
    assert "--system-prompt comes before" in err


def test_ctrl_c_keeps_what_was_written(chat_folder):
    command = [sys.executable, "-m", "ring_mlx", "generate", "--model", str(chat_folder), "-m", "1900"]
    command += ["--logit-bias", json.dumps({str(i): -1e9 for i in range(3)})]
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert process.stdout.read(30).startswith("==========\n")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert re.search(r"Generation: \d+ tokens", out)


# Bad input: one line, exit code 2, no traceback


def assert_one_line(result, match):
    code, out, err = result
    assert code == 2
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if "toy" not in line]
    assert len(lines) == 1, err
    assert re.search(match, lines[0]), lines[0]


@pytest.fixture
def damaged(chat_folder, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(chat_folder, tmp_path / "copy")


def test_no_such_folder(cli):
    assert_one_line(generate(cli, "./nowhere"), r"\[hub\].*nowhere")


def test_an_empty_folder(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line(generate(cli, tmp_path / "empty"), "empty has no config.json and no tokenizer")


def test_broken_json(cli, damaged):
    for name, origin in (
        ("config.json", "config"),
        ("tokenizer.json", "tokenizer"),
        ("tokenizer_config.json", "tokenizer"),
    ):
        before = (damaged / name).read_text()
        (damaged / name).write_text("{")
        assert_one_line(generate(cli, damaged), rf"\[{origin}\].*copy")
        (damaged / name).write_text(before)


def test_a_broken_generation_config(cli, damaged):
    (damaged / "generation_config.json").write_text("{")
    assert_one_line(generate(cli, damaged), r"generation_config.json")


def test_a_missing_shard(cli, damaged):
    tensors = mx.load(str(damaged / "model.safetensors"))
    write(damaged, json.loads((damaged / "config.json").read_text()), tensors, shards=2)
    (damaged / "model.safetensors").unlink()
    (damaged / "model-00002-of-00002.safetensors").unlink()
    assert_one_line(generate(cli, damaged), r"\[weights\].*lacks model-00002-of-00002")


def test_a_truncated_file(cli, damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_one_line(generate(cli, damaged), r"\[weights\].*truncated or damaged")


def test_a_wrong_shape(cli, damaged):
    tensors = mx.load(str(damaged / "model.safetensors"))
    tensors["model.norm.weight"] = mx.ones((7,))
    write(damaged, json.loads((damaged / "config.json").read_text()), tensors)
    assert_one_line(generate(cli, damaged), r"\[weights\].*model.norm.weight \(7,\) instead of \(48,\)")


def test_an_unsupported_value(cli, damaged):
    (damaged / "config.json").write_text(json.dumps(config(vocab_size=1024, linear_silu=True)))
    assert_one_line(generate(cli, damaged), r"\[config\] linear_silu true")


def test_a_missing_key(cli, damaged):
    (damaged / "config.json").write_text(json.dumps(config(vocab_size=1024, layer_group_size=...)))
    assert_one_line(generate(cli, damaged), r"\[config\] config.json lacks layer_group_size")


def test_no_tokenizer(cli, tmp_path):
    save_hf(tmp_path, config())
    assert_one_line(generate(cli, tmp_path), r"\[tokenizer\] no tokenizer")


def test_no_chat_template(cli, damaged):
    (damaged / "chat_template.jinja").unlink()
    assert_one_line(
        generate(cli, damaged, "--prompt", "hello"), r"\[tokenizer\] .* no chat template; use --ignore-chat"
    )
    for more in ((), ("--thinking-budget", "3")):
        assert generate(cli, damaged, "--prompt", "hello", "--ignore-chat-template", *more)[0] == CUT_OFF
    for flag, value in (("--system-prompt", "S"), ("--prefill-response", ""), ("--chat-template-config", "{}")):
        refused = generate(cli, damaged, "--prompt", "hello", "--ignore-chat-template", flag, value)
        assert_one_line(refused, rf"\[option\] {flag} needs the chat template")


def test_a_template_that_refuses(cli, damaged):
    (damaged / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    assert_one_line(generate(cli, damaged), r"\[tokenizer\] the chat template refused.*no such role")


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--prompt", ""], r"\[prompt\] the prompt is empty"),
        (["--prompt", "  "], r"\[prompt\] the prompt is empty"),
        (["--prompt", "word " * 2100], r"\[prompt\] \d+ tokens exceed the context of 2048"),
        (["--max-tokens", "-2"], r"--max-tokens.*-2 is not a whole number from 1 up or -1"),
        (["--max-tokens", "many"], r"--max-tokens.*many"),
        (["--no-such-flag"], r"--no-such-flag"),
        (["--temp", "-1"], r"--temp.*-1 is not a number from 0 to 100"),
        (["--top-p", "1.5"], r"--top-p.*1.5 is not a number from 0 to 1"),
        (["--top-k", "5000"], r"top_k 5000 is not below the vocabulary"),
        (["--xtc-threshold", "0.9"], r"--xtc-threshold"),
        (["--kv-bits", "3"], r"kv bits 3"),
        (["--kv-bits", "8"], r"kv group size 64 .*head_dim 16"),
        (["--prefill-step-size", "0"], r"--prefill-step-size"),
        (["--thinking-budget", "-2"], r"--thinking-budget"),
        (["--chat-template-config", "{"], r"is not JSON"),
        (["--logit-bias", '{"99999": 1}'], r"'99999' is not a token id"),
        (["--logit-bias", '{"5": "x"}'], r"logit-bias"),
        (["--extra-eos-token", "nosuchtoken"], r"'nosuchtoken' is not in the vocabulary"),
        (["--prompt-cache-file", "/nowhere/x"], r"\[cache\] no file"),
        (["--revision", "main"], r"\[hub\].*revision"),
        (["--thinking", "loud"], r"--thinking"),
    ],
    ids=lambda v: " ".join(v)[:30] if isinstance(v, list) else None,
)
def test_bad_options(cli, chat_folder, args, match):
    assert_one_line(generate(cli, chat_folder, *args), match)


def test_unknown_command(cli):
    assert_one_line(cli("fly"), "fly")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_config(cli, damaged):
    (damaged / "config.json").chmod(0)
    assert_one_line(generate(cli, damaged), "cannot be read")


def test_a_closed_pipe_is_no_error(chat_folder):
    command = f"{sys.executable} -m ring_mlx generate --model {chat_folder} -m 300 | head -c 5"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "--model", "{nobody}"],
        ["chat", "--plain", "--model", "{nobody}"],
        ["serve", "--model", "{nobody}"],
        ["convert", "--model", "{nobody}", "--mlx-path", "out"],
        ["convert", "--verify", "--mlx-path", "{nobody}"],
        ["eval", "--model", "{nobody}"],
        ["cache", "list", "--cache-dir", "{nobody}"],
        ["cache", "prune", "--all", "--cache-dir", "{nobody}"],
    ],
    ids=" ".join,
)
def test_the_home_of_nobody_is_a_name_like_others(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = main([a.format(nobody="~nobody-of-that-name/x") for a in args])
    assert code == (0 if args[0] == "cache" else 2)
    assert code == 0 or re.fullmatch(r"(ring-mlx: )?\[\w+\] [^\n]*\n", capsys.readouterr().err)
