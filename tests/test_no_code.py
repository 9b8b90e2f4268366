"""Code in a checkpoint is never run, whatever it is called and whatever a person at a terminal answers."""

from __future__ import annotations

import ast
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mlx_lm import utils
from transformers import PreTrainedTokenizerFast

from ring_mlx.checkpoint.tokenizer import ROLE_END, load_tokenizer
from ring_mlx.cli import main
from ring_mlx.cli.exit_codes import CUT_OFF
from ring_mlx.errors import ConfigError, TokenizerError
from tests.evil import DOORS, WAYS, make_evil
from tests.test_distributed import free_ports

ROOT = Path(__file__).parent.parent


def at_a_terminal(command, folder):
    """Runs a command at a terminal where somebody says ``y`` to all questions; returns what it printed and its exit code."""
    master, slave = pty.openpty()
    env = os.environ | {"TERM": "dumb", "RING_MLX_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    env |= {"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "HOME": str(folder)}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=env, start_new_session=True
    )
    os.close(slave)
    os.write(master, b"y\n/quit\n")  # to the chat
    said = bytearray()

    def listen():
        while True:
            try:
                part = os.read(master, 1 << 16)
            except OSError:  # how Linux says that nobody holds the other end any more
                return
            if not part:
                return
            said.extend(part)
            if b"[y/N]" in part:
                os.write(master, b"y\n")

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        code = process.wait(120)
    finally:
        process.kill()
        process.wait()
        thread.join(10)
        os.close(master)
    return said.decode(errors="replace"), code


@pytest.fixture(scope="module")
def evil(chat_folder, tmp_path_factory):
    return make_evil(chat_folder, tmp_path_factory.mktemp("evil") / "model", "unknown class")


@pytest.fixture(scope="module")
def went_through(evil):
    """What each door did with an evil folder, where a terminal answers ``y`` to whatever is asked."""
    said, _ = at_a_terminal([sys.executable, "-P", "-c", CALL, str(evil), *DOORS], evil.parent)
    lines = [json.loads(line.partition("DOOR ")[2]) for line in said.splitlines() if line.startswith("DOOR ")]
    return {line["name"]: line for line in lines}, said


CALL = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.evil import main; main()"


@pytest.mark.parametrize("door", DOORS)
def test_no_door_runs_it_though_somebody_says_yes(went_through, door):
    found, said = went_through
    assert door in found, said
    assert not found[door]["ran"]
    assert "Do you wish to run" not in said
    codes = {"mlx-lm perplexity": 2, "generate": CUT_OFF, "chat": CUT_OFF}  # these two ask for one token
    assert found[door]["code"] == codes.get(door, 0), said


@pytest.mark.parametrize("python", [["-m", "ring_mlx"], ["-m", "ring_mlx", "launch", "-n", "2"]], ids=["-m", "launch"])
def test_a_module_in_the_present_folder_is_not_imported(evil, python):
    """``json.py`` in the folder of a checkpoint, in which a command is started."""
    port = ["--starting-port", str(free_ports(2)[0])] if "launch" in python else []
    command = [sys.executable, *python, *port, "generate", "--model", ".", "-m", "1"]
    if "launch" in python:
        command.insert(1, "-P")
    said, code = at_a_terminal(command, evil)
    assert not (evil.parent / "marker").exists()
    assert code == CUT_OFF, said


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_asking_for_it_works(chat_folder, tmp_path, monkeypatch, way, recwarn):
    folder = make_evil(chat_folder, tmp_path / "model", way)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    tokenizer = load_tokenizer(folder)
    assert type(tokenizer._tokenizer) is PreTrainedTokenizerFast
    assert tokenizer.encode("hello") == load_tokenizer(chat_folder).encode("hello")
    named = [str(w.message) for w in recwarn if "names code of its own" in str(w.message)]
    assert bool(named) == ("auto_map" in WAYS[way][1])
    assert all("evil.Tok" in text for text in named)
    assert not (tmp_path / "marker").exists()


def test_a_tokenizer_that_is_code_only_is_one_line(evil, tmp_path, capsys):
    shutil.copytree(evil, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert main(["generate", "--model", str(tmp_path / "model")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "tokenizer_config.json" in line
    assert "code of its own (evil.Tok), which is never done" in line
    assert "use a checkpoint that has" in line


@pytest.mark.parametrize("key", ["tool_parser_type", "chat_template_type"])
@pytest.mark.parametrize("value", ["evil", "..evil", "/tmp/evil", "json_tools.os", {"a": 1}, 7])
def test_what_mlx_lm_imports_by_name_is_its_own(chat_folder, tmp_path, key, value):
    shutil.copytree(chat_folder, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {key: value}))
    with pytest.raises(TokenizerError, match=f"{key} .* is none that mlx-lm has"):
        load_tokenizer(tmp_path / "model")
    file.write_text(json.dumps(settings | {"tool_parser_type": "json_tools"}))
    assert load_tokenizer(tmp_path / "model").tool_parser is not None


def test_a_model_file_is_refused_though_a_script_trusts_it(chat_folder, tmp_path, registered):
    folder = make_evil(chat_folder, tmp_path / "model", model_file="evil.py")
    for call in (utils.load, utils.load_model):
        with pytest.raises(ConfigError, match=r"asks to run 'evil\.py'"):
            call(folder, trust_remote_code=True)
    assert not (tmp_path / "marker").exists()


def test_other_models_of_a_command_run_nothing_either(chat_folder, tmp_path):
    """In a process of its own, since what `run` closes stays closed."""
    folder = make_evil(chat_folder, tmp_path / "model", "unknown class", model_type="llama", model_file="evil.py")
    (folder / "tokenizer.json").unlink()
    (folder / "options.yaml").write_text(f"model: {folder}\ntrain: true\ntrust_remote_code: true\ndata: {folder}\n")
    script = """
import sys
from ring_mlx import mlx_lm_plugin
from ring_mlx.cli import main
folder = sys.argv[1]
print(main(["mlx-lm", "lora", "--config", folder + "/options.yaml"]))
print(main(["mlx-lm", "benchmark", "--model", folder, "-p", "4", "-g", "1", "-n", "1"]))
from transformers import AutoTokenizer, AutoConfig, AutoProcessor
for trust in (None, True):
    for auto in (AutoTokenizer, AutoConfig, AutoProcessor):
        try:
            auto.from_pretrained(folder, trust_remote_code=trust)
        except Exception as e:
            print("refused" if "code" in str(e) else repr(e))
"""
    file = tmp_path / "script.py"
    file.write_text(script)
    said, _ = at_a_terminal([sys.executable, "-P", str(file), str(folder)], tmp_path)
    assert not (tmp_path / "marker").exists()
    assert said.splitlines().count("2") == 2, said
    assert said.count("refused") >= 3, said
    assert "Do you wish to run" not in said


def test_trust_is_refused_in_every_spelling(capsys):
    for flag in ("--trust-remote-code", "--trust-remote", "--tr", "--trust-remote-code=1"):
        assert main(["mlx-lm", "generate", "--model", "/nowhere", flag]) == 2
        assert "code in a checkpoint is never run" in capsys.readouterr().err


def test_the_plug_in_gives_our_tokenizer_whatever_a_script_passes(evil, registered, monkeypatch, recwarn):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    theirs = utils.load_tokenizer(evil, {"trust_remote_code": True, "tokenizer_type": None})
    assert theirs.get_vocab()[ROLE_END] in theirs.eos_token_ids
    assert type(theirs._tokenizer) is PreTrainedTokenizerFast
    assert not (evil.parent / "marker").exists()


def test_one_place_makes_tokenizers():
    """Whatever could import a checkpoint's code is called in ring_mlx/checkpoint/tokenizer.py and the plug-in only."""
    makers = {"AutoTokenizer", "AutoConfig", "AutoProcessor", "AutoModel", "pipeline", "load_wrapper", "pickle"}
    found = set()
    for part in ("ring_mlx", "tui", "metal_kernels", "benchmarks", "demo"):
        for file in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("transformers", "mlx_lm")):
                    module, names = node.module or "", [a.name for a in node.names]
                    loads = "load" in names and module in ("mlx_lm", "mlx_lm.utils", "mlx_lm.tokenizer_utils")
                    if loads or {*names} & (makers | {"load_tokenizer", "sharded_load"}):
                        found.add(str(file.relative_to(ROOT)))
                if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "load_tokenizer"):
                    found.add(str(file.relative_to(ROOT)))
                if isinstance(node, ast.Import) and {a.name for a in node.names} & {"pickle", "transformers"}:
                    found.add(str(file.relative_to(ROOT)))
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    found.add(str(file.relative_to(ROOT)))
    assert found == {"ring_mlx/checkpoint/tokenizer.py", "ring_mlx/mlx_lm_plugin/replacements.py"}
