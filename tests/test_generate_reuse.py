"""``generate`` and ``cache-prompt`` read what no snapshot on disk holds, and no more."""

from __future__ import annotations

import json

import pytest

from ring_mlx import Sampling, Session, Statistics
from ring_mlx.cli import main
from ring_mlx.cli.exit_codes import INTERRUPTED
from ring_mlx.engine.reading import PromptReader

TALE = ("A long tale of whales. " * 30).strip()


@pytest.fixture
def run(capsys, chat_folder, tmp_path):
    """The run as JSON; snapshots are kept in a folder of the test."""

    def generate(*words):
        given = ("--model", chat_folder, "--cache-dir", tmp_path / "store", "-m", "4", "--temp", "0", *words)
        main(["generate", "--json", *map(str, given)])
        return json.loads(capsys.readouterr().out)

    return generate


def test_a_long_prompt_is_read_once(run):
    first, again = (run("--prompt", TALE) for _ in range(2))
    assert (first["cached_tokens"], again["text"]) == (0, first["text"])
    assert again["prompt_tokens"] + again["cached_tokens"] == first["prompt_tokens"] > 100
    assert again["prompt_tokens"] < 8, "only the start of the answer"
    other = run("--prompt", "Hi.", "--system-prompt", TALE)
    same = run("--prompt", "What else?", "--system-prompt", TALE)
    assert (other["cached_tokens"] < 10, same["cached_tokens"] > 100) == (True, True)


def test_an_answer_is_whole_before_it_is_saved(chat_folder, tmp_path, capsys, monkeypatch):
    """Saving takes a while, and Ctrl-C may end it."""

    def interrupt(reader):
        raise KeyboardInterrupt

    monkeypatch.setattr(PromptReader, "try_to_save", interrupt)
    words = ("--model", chat_folder, "--cache-dir", tmp_path, "--prompt", TALE, "-m", "4", "--json")
    assert main(["generate", *map(str, words)]) == INTERRUPTED
    said = capsys.readouterr()
    assert json.loads(said.out)["generation_tokens"] == 4
    assert "raise --max-tokens" in said.err


def test_without_a_store_all_is_read_and_nothing_written(run, tmp_path):
    found = [run("--prompt", TALE, "--no-store") for _ in range(2)]
    assert [f["cached_tokens"] for f in found] == [0, 0]
    assert found[0]["text"] == found[1]["text"]
    assert not (tmp_path / "store").exists()


def test_a_session_goes_on_from_what_generate_has_read_and_back(run, chat_folder, tmp_path):
    first = run("--prompt", TALE)
    with Session(chat_folder, store=tmp_path / "store") as session:
        asked = {"sampling": Sampling(temp=0), "max_tokens": 4}
        events = list(session.send([{"role": "user", "content": TALE}], **asked))
        list(session.send([{"role": "user", "content": f"Another. {TALE}"}], **asked))
    (s,) = (e for e in events if isinstance(e, Statistics))
    assert s.read_tokens < 8
    assert s.reused_tokens == first["prompt_tokens"] - s.read_tokens > 100
    assert run("--prompt", f"Another. {TALE}")["cached_tokens"] > 100


def test_a_saved_prompt_is_a_snapshot_in_a_file(run, chat_folder, tmp_path, capsys):
    """With the store it reads no less of the file, and what follows it is what the whole prompt gives."""
    file = str(tmp_path / "tale.safetensors")
    words = ["cache-prompt", "--model", str(chat_folder), "--cache-dir", str(tmp_path / "store")]
    assert main([*words, "--prompt", TALE, "--prompt-cache-file", file]) == 0
    capsys.readouterr()
    found = run("--prompt-cache-file", file, "--prompt", " And then?")
    whole = run("--prompt", f"{TALE} And then?", "--no-store")
    assert found["text"] == whole["text"]
    assert found["cached_tokens"] + found["prompt_tokens"] == whole["prompt_tokens"]
    assert found["cached_tokens"] > 100


def test_a_disk_that_cannot_be_written_costs_a_line(chat_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["generate", "--model", str(chat_folder), "--cache-dir", str(tmp_path / "file"), "-m", "2", "--json"]
    main([*words, "--prompt", TALE])
    out, err = capsys.readouterr()
    assert json.loads(out)["prompt_tokens"] > 100
    assert "[cache]" in err
    assert "Nothing is saved." in err
