"""Every option of mlx_lm's own parsers works here under its name, or is refused by name."""

from __future__ import annotations

import argparse
import json
from importlib import import_module

import pytest

from ring_mlx.cli import build_parser, main
from ring_mlx.cli.refused import REFUSED, THEIR_NAMES, Refusal
from tests.test_docs import leaves

VALUES = {
    int: "16",
    float: "0.25",
    json.loads: '{"a": true}',
    "--chat-template-config": '{"a": true}',
    "--verbose": "F",
    "--prompt-cache-bytes": "1.5G",
    "--allowed-origins": "https://a.example.com,https://b.example.com",
}
COMMANDS = ("generate", "chat", "convert", "serve", "cache-prompt")
REFUSALS = [(command, flag) for command, table in REFUSED.items() for flags in table for flag in flags]


class Found(Exception):
    """Carries the parser that a command of mlx_lm has made."""


@pytest.fixture
def theirs(monkeypatch):
    """Gives the parser of a command of mlx_lm, wherever that makes it."""

    def found(parser, *_, **__):
        raise Found(parser)

    def parser(command):
        module = import_module(f"mlx_lm.{THEIR_NAMES.get(command, command)}")
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", found)
        with pytest.raises(Found) as caught:
            module.main()
        monkeypatch.undo()
        return options_of(caught.value.args[0])

    return parser


def options_of(parser):
    return {flag: a for a in parser._actions for flag in a.option_strings if a.dest != "help"}


def ours(command):
    return options_of(dict(leaves(build_parser()))[(command,)])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_mlx_lm_is_known(command, theirs):
    mine, found = ours(command), theirs(command)
    assert len(found) > 5
    assert not set(found) - set(mine)
    for flag, action in found.items():
        if isinstance(mine[flag], Refusal):
            continue
        assert (mine[flag].nargs == 0) == (action.nargs == 0), flag
        assert mine[flag].nargs in (action.nargs, "?"), flag
        assert set(action.choices or ()) <= set(mine[flag].choices or action.choices or ()), flag


@pytest.mark.parametrize("command", COMMANDS)
def test_every_value_that_mlx_lm_takes_is_taken(command, theirs):
    parser = dict(leaves(build_parser()))[(command,)]
    for action in parser._actions:
        action.required = False
    for flag, action in theirs(command).items():
        if isinstance(ours(command)[flag], Refusal):
            continue
        values = action.choices or [VALUES.get(flag) or VALUES.get(action.type, "text")]
        for value in values if action.nargs != 0 else [None]:
            found = parser.parse_args([flag] if value is None else [flag, value])
            assert found != parser.parse_args([]) or value == ours(command)[flag].default, (flag, value)


@pytest.mark.parametrize("command", REFUSED)
def test_nothing_is_refused_that_mlx_lm_no_longer_has(command, theirs):
    assert {flag for c, flag in REFUSALS if c == command} <= set(theirs(command))


@pytest.mark.parametrize("value", [(), ("1",), ("-1",), ("a", "b")], ids=str)
@pytest.mark.parametrize(("command", "flag"), REFUSALS)
def test_what_is_refused_says_why_in_a_line(command, flag, value, capsys):
    assert main([command, flag, *value]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith(f"ring-mlx: [option] {flag} is not supported: ")
    assert err.endswith(".\n")


def test_a_value_after_an_equals_sign_is_refused_as_well(capsys):
    assert main(["generate", "--num-draft-tokens=3"]) == 2
    assert "--num-draft-tokens is not supported" in capsys.readouterr().err
