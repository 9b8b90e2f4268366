"""What help shows: what to try first, options in groups, their defaults, an example that works, and nothing hidden."""

from __future__ import annotations

import argparse
import re
import shlex
import sys

import pytest

from ring_mlx.cli import build_parser, main
from ring_mlx.cli.table import commands_for
from tests.test_docs import COMMANDS, ROOT

# What an option has in brackets where that is no value of its own.
IN_WORDS = {"--python": (sys.executable, "this one")}


def examples(text):
    """Lines of help that are commands, as words."""
    found = [shlex.split(line.partition("<")[0]) for line in text.splitlines() if line.startswith("  ring-mlx ")]
    return [words[1:] for words in found]


def test_alone_it_says_what_to_try_first(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    commands = examples(out)
    assert [words[0] for words in commands] == ["chat", "generate", "doctor", "chat"]
    for words in commands:
        build_parser().parse_args(words)
    assert "ring-mlx --help" in out


def test_help_names_every_command_once_with_a_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    names = re.findall(r"^  ([a-z][a-z-]+) ", shown, re.MULTILINE)
    assert sorted(names) == sorted({path[0] for path in COMMANDS})
    for command in commands_for(None):
        assert re.fullmatch(r"[A-Z].*\.", command.about)
        assert command.about in " ".join(shown.split())
        assert f"\n{command.group}:\n" in shown


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_an_example_can_be_typed(path):
    found = examples(COMMANDS[path].format_help())
    assert found
    for words in found:
        assert tuple(words[: len(path)]) == path
        build_parser().parse_args(words)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_nothing_is_hidden_or_without_words(path):
    for action in COMMANDS[path]._actions:
        assert action.help not in (None, "", argparse.SUPPRESS), action.option_strings


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("columns", ["50", "80"])
def test_flags_and_names_stay_in_one_piece(path, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert not re.search(r"\w-\n", COMMANDS[path].format_help())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_many_options_are_in_groups(path):
    groups = {g.title: g._group_actions for g in COMMANDS[path]._action_groups}
    assert all(actions for title, actions in groups.items() if title not in ("options", "positional arguments"))
    if len(COMMANDS[path]._actions) > 10:
        assert [a.option_strings for a in groups["options"]] == [["-h", "--help"]]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_default_is_shown(path):
    shown = " ".join(COMMANDS[path].format_help().split())
    for action in COMMANDS[path]._actions:
        if action.nargs == 0 or action.default in (None, (), [], argparse.SUPPRESS):
            continue
        default, words = IN_WORDS.get(action.option_strings[0], (action.default, ""))
        found = re.search(r"\(([^()]*)\)$", action.help)
        assert found, f"{action.option_strings} does not show {default!r}"
        assert found[1] == words or (action.type or str)(found[1]) == default
        assert f"(default: {found[1]})" in shown


def test_the_readme_names_the_commands_that_have_the_toy_as_default():
    toys = {p[0] for p, c in COMMANDS.items() for a in c._actions if "packaged toy" in (a.help or "")}
    found = re.search(r"Without `--model`,\s((?:`[a-z-]+`,?\s(?:and\s)?)+)", (ROOT / "README.md").read_text("utf-8"))
    assert found
    assert set(re.findall(r"`([a-z-]+)`", found[1])) == toys


def test_an_empty_model_of_other_commands_is_told(capsys):
    assert main(["convert"]) == 2
    assert "--hf-path (or --model) is missing" in capsys.readouterr().err
