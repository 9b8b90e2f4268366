"""``ring-mlx agent``: what it prints is what it runs, read from a running server."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys

import pytest

from ring_mlx.cli import main
from ring_mlx.cli.agent_command import printed
from ring_mlx.cli.agents import RECIPES, Endpoint

FAKE = """#!{python}
import json, os, sys
files = {{word: open(word).read() for word in [*sys.argv, *os.environ.values()] if word.endswith((".json", ".yaml"))}}
print(json.dumps([sys.argv[1:], dict(os.environ), files]))
sys.exit(7)
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Programs with the names of the tools that print how they were started."""
    for make in RECIPES.values():
        path = tmp_path / "bin" / make(Endpoint("u", "m", "k", 1, 1)).program
        path.parent.mkdir(exist_ok=True)
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("RING_MLX_API_KEY", "sesame")
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "the user's own")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def started(text):
    """Words, variables, and files without the names of their folders."""
    words, variables, files = json.loads(text)
    names = {path: f"ring-mlx-{os.path.basename(path).removeprefix('ring-mlx-')}" for path in files}
    ours = {k: names.get(v, v) for k, v in variables.items() if re.match("OPEN|ANTHROPIC|CLAUDE|QWEN|RING_MLX_API", k)}
    return [names.get(w, w) for w in words], ours, {names[path]: text.strip() for path, text in files.items()}


@pytest.mark.parametrize("tool", [*RECIPES])
def test_what_is_printed_does_what_run_does(tool, serve, tools, capfd):
    url = f"http://127.0.0.1:{serve(api_key='sesame').server_port}"
    before = sorted(tools.rglob("*"))
    assert main(["agent", tool, "--url", f"{url}/v1/", "--run", "more", "--url"]) == 7
    run = started(capfd.readouterr().out)
    assert sorted(tools.rglob("*")) == before  # temporary files are gone
    assert run[0][-2:] == ["more", "--url"]
    assert "sesame" in json.dumps(run)
    assert "the user's own" not in (
        run[1].get("ANTHROPIC_AUTH_TOKEN"),
        run[1].get("OPENAI_API_KEY", "") * (tool in ("qwen", "aider")),
    )
    assert "8192" in json.dumps(run)
    assert main(["agent", tool, "--url", url, "--model", "toy"]) == 0
    script = capfd.readouterr().out
    assert "sesame" not in script
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert said.returncode == 7
    assert started(said.stdout) == (run[0][:-2], *run[1:])


def test_an_odd_name_stays_one_word(tools, capfd):
    for make in RECIPES.values():
        name = "it's \\ $HOME `x`/{a}"
        served = Endpoint("http://h", name, "none", 9, 9)
        script = "\n".join(printed(make(served), served))
        said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
        assert said.returncode == 7, script
        words, variables, files = started(said.stdout)
        found = [*words, *variables.values(), *files.values()]
        assert any(name in text or json.dumps(name) in text for text in found), script
        assert said.stderr == ""


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--url", "http://127.0.0.1:9"], "no server of ring-mlx answers at http://127.0.0.1:9 (.*refused"),
        (["--url", "ftp://x"], "it is no address such as"),
        (["--url", "http://[::1"], "no server of ring-mlx answers"),
        (["--model", "other"], "has no model 'other'; give one of toy"),
        (["--api-key", "wrong"], "wants another key; give it in RING_MLX_API_KEY"),
        (["--run"], "there is no codex on the path; install it with 'npm install -g @openai/codex'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(more, match, serve, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    url = f"http://127.0.0.1:{serve(api_key='sesame').server_port}"
    given = [] if "--url" in more else ["--url", url]
    key = [] if "--api-key" in more else ["--api-key", "sesame"]
    assert main(["agent", "codex", *given, *key, *more]) == 2
    assert re.search(
        match.replace("(", r"\("), [line for line in capsys.readouterr().err.splitlines() if "note:" not in line][-1]
    )
