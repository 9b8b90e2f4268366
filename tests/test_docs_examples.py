"""Every example of README.md and docs/*.md is run as it is written, or says what it would need.

A comment before a block marks it: ``<!-- needs: gpu hosts -->`` is not run, for the reasons in `NEEDS`;
``<!-- shows: formula -->`` is no program. All others run page by page in one folder, offline: `ring-mlx` in this process,
other commands in a shell. A tiny model stands in for each real one.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomlkit
from markdown_it import MarkdownIt

from ring_mlx import mlx_lm_plugin
from ring_mlx.cli import build_parser, main
from ring_mlx.cli.serve_command import make_server
from tests.parrot import make_parrot
from tui.config import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {
    "checkout": "a copy of the whole repository",
    "gpu": "a GPU, or half an hour without one",
    "hosts": "several machines, or several processes",
    "network": "a download or an upload",
    "package": "a package that is installed only for it",
    "server": "a port, and a program that ends when it is told",
    "terminal": "a person at a terminal",
    "time": "more than a few seconds",
}
SHOWS = ("files", "formula", "output")
MARK = re.compile(r"<!-- (needs|shows): ([a-z ]+) -->\s*")
PORT = "8080"
# What the pages say they have: a folder of a model, made by their own `convert` on another page, and files to read.
MODELS = ("ring-mini-q4", "ring-mini-q8")
FILES = {
    "book.txt": "The butler did it, with a rope.\n\n" * 20,
    "question.txt": "Who did it?",
    **{f"my-data/{name}.jsonl": '{"text": "one two three four"}\n' * 4 for name in ("train", "valid", "test")},
}


@dataclass(frozen=True)
class Block:
    """Code of a page: what it is, what its mark says, and where it is."""

    page: str
    line: int
    kind: str
    code: str
    mark: str
    words: tuple[str, ...]


def blocks_of(page: Path) -> Iterator[Block]:
    """All code of a page, indented or fenced."""
    before = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            found = MARK.fullmatch(before.content) if before is not None and before.type == "html_block" else None
            mark, words = found.groups() if found else ("", "")
            kind = token.info.strip() or ("shell" if token.type == "code_block" else "")
            yield Block(page.name, token.map[0] + 1, kind, token.content, mark, tuple(words.split()))
        before = token


BLOCKS = {page.name: list(blocks_of(page)) for page in PAGES}


def lines_of(code: str) -> list[str]:
    """Commands of a shell block, each on one line."""
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def run_line(line: str, room: Room) -> None:
    """One command: ours in this process, others in a shell."""
    line = line.replace(PORT, room.port)
    words = shlex.split(line, comments=True)
    module = {("python", "-m", "ring_mlx"): [], ("python", "-m", "ring_mlx.mlx_lm_plugin"): ["mlx-lm"]}
    ours = ["ring-mlx", *module[tuple(words[:3])], *words[3:]] if tuple(words[:3]) in module else words
    if ours[0] != "ring-mlx":
        done = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return
    stdin = ""
    if "<" in ours:
        ours, (name,) = ours[: ours.index("<")], ours[ours.index("<") + 1 :]
        stdin = Path(name).read_text()
    if ours[1] == "serve":
        room.serve(ours[1:])
        return
    room.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    code = main(ours[1:])
    # The doctor says by 1 that it found a problem of this machine.
    assert code == 0 or (code == 1 and ours[1] == "doctor"), f"exit code {code}"


def run_shell(code: str, room: Room) -> None:
    for line in lines_of(code):
        run_line(line, room)


def run_python(code: str, room: Room) -> None:
    exec(compile(code.replace(PORT, room.port), "example", "exec"), room.names)  # noqa: S102


def run_toml(code: str, room: Room) -> None:
    """Settings of the chat."""
    assert parse(tomlkit.parse(code).unwrap())[1] == []


RUNNERS = {"shell": run_shell, "sh": run_shell, "python": run_python, "toml": run_toml}


class Room:
    """Where the examples of a page run: their Python names, and the server that the page starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.names = monkeypatch, {"__name__": "example"}
        self.port, self._servers = PORT, []

    def serve(self, words: list[str]) -> None:
        """What `ring-mlx serve` starts, on a free port."""
        server = make_server(build_parser().parse_args([*words, "--port", "0"]), None)
        self._servers.append(server)
        server.start()
        assert not server.models.is_single or server.engine.wait_until_loaded(60)
        self.port = str(server.server_port)

    def close(self) -> None:
        for server in self._servers:
            assert server.close()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A model that thinks, answers and ends, whatever it is asked; its sizes suit every format."""
    return make_parrot(
        tmp_path_factory.mktemp("model") / "stand-in",
        ["Hm.", "</think>", "The", " answer", " is", " 62."],
        num_hidden_layers=4, layer_group_size=4, num_attention_heads=8, num_key_value_heads=2, group_norm_size=4, intermediate_size=128, num_experts=8,
        moe_intermediate_size=64, moe_shared_expert_intermediate_size=64, first_k_dense_replace=1,
    )  # fmt: skip


@pytest.fixture
def room(stand_in, tmp_path, monkeypatch, request):
    """A folder with what the pages say is there, in which the hub gives the stand-in for every name."""
    code = "".join(block.code for block in BLOCKS.get(request.getfixturevalue("page"), ()))
    for name in MODELS:
        if f"--mlx-path {name}" not in code:
            shutil.copytree(stand_in, tmp_path / name)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("RING_MLX_CACHE", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))
    monkeypatch.setattr("ring_mlx.checkpoint.hub._download", lambda *_: stand_in)
    monkeypatch.setattr("ring_mlx.convert.remote.is_repo", lambda name: False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    made = Room(monkeypatch)
    yield made
    made.close()
    mlx_lm_plugin.unregister()


def check(block: Block) -> None:
    """Fail where a block is neither marked nor of a kind that runs, or its mark is not known."""
    known = {"needs": NEEDS, "shows": SHOWS, "": ()}[block.mark]
    assert set(block.words) <= set(known), f"{block.page}:{block.line}: of {block.words} only {list(known)} are known"
    assert block.mark or block.kind in RUNNERS, f"{block.page}:{block.line}: {block.kind!r} is neither run nor marked"


def run(blocks: list[Block], room: Room) -> None:
    """Run all that is not marked."""
    for block in blocks:
        if block.mark:
            continue
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                RUNNERS[block.kind](block.code, room)
        except (Exception, SystemExit) as e:  # noqa: BLE001
            where = f"{block.page}:{block.line}: {type(e).__name__}: {e}"
            pytest.fail(f"{where}\n{block.code}\n{said.getvalue()[-2000:]}")


def test_marks_are_known_and_code_is_of_a_kind_that_runs():
    for blocks in BLOCKS.values():
        for block in blocks:
            check(block)
    assert sum(not block.mark for blocks in BLOCKS.values() for block in blocks) >= 15


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if any(not b.mark for b in blocks)])
def test_the_examples_of_a_page_run(page, room):
    run(BLOCKS[page], room)


PAGE = """
    true

Text.

<!-- needs: gpu network -->

    false

<!-- a remark -->
```yaml
a: 1
```

<!-- needs: luck -->
```sh
false
```
"""


@pytest.mark.parametrize("page", ["own.md"])
def test_what_fails_or_is_not_marked_rightly_is_found(page, room, tmp_path, monkeypatch):
    (tmp_path / page).write_text(PAGE)
    runs, marked, unmarked, unknown = blocks_of(tmp_path / page)
    assert (runs.mark, marked.mark, marked.words, unmarked.mark) == ("", "needs", ("gpu", "network"), "")
    check(runs)
    check(marked)
    run([runs, marked], room)
    for block in (unmarked, unknown):
        with pytest.raises(AssertionError, match=r"own\.md:"):
            check(block)
    for kind, code in (
        ("shell", "false"),
        ("shell", "ring-mlx eval --suite nowhere"),
        ("shell", "ring-mlx nothing"),
        ("shell", "python -m ring_mlx generate \\\n  --model nowhere"),
        ("python", "1 / 0"),
        ("toml", "[keys]\nnonsense = 'f5'"),
    ):
        with pytest.raises(pytest.fail.Exception, match=r"own\.md:1: "):
            run([Block(page, 1, kind, code, "", ())], room)
