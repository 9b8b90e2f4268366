"""Every flag of every subcommand is documented, and every command in the documentation can be parsed."""

from __future__ import annotations

import argparse
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from ring_mlx.cli import build_parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SHARED = "options.md"


def leaves(parser, path=()):
    """Subcommands without further ones below them, by their words."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield path, parser
    for action in below:
        for name, child in action.choices.items():
            yield from leaves(child, (*path, name))


COMMANDS = dict(leaves(build_parser()))
# In how many commands a flag occurs: only one that several share may be described on the shared page.
SHARERS = Counter(o for path, p in COMMANDS.items() for o in {o for a in p._actions for o in a.option_strings})


def page(path):
    return DOCS / f"{path[0].replace('-', '_')}.md"


def mentions(text, option):
    return re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text) is not None


def undocumented(path, parser, own, shared):
    """Flags of which no spelling is mentioned."""
    for action in parser._actions:
        names = [o for o in action.option_strings if o not in ("-h", "--help")]
        if names and not any(mentions(own, o) or (SHARERS[o] > 1 and mentions(shared, o)) for o in names):
            yield names[-1]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_flag_is_documented(path):
    assert page(path).is_file(), f"no {page(path).name} for ring-mlx {' '.join(path)}"
    own = page(path).read_text(encoding="utf-8") + (ROOT / "README.md").read_text(encoding="utf-8")
    missing = list(undocumented(path, COMMANDS[path], own, (DOCS / SHARED).read_text(encoding="utf-8")))
    assert not missing, f"{page(path).name} and README.md do not mention {', '.join(missing)}"


def test_an_undocumented_flag_is_found():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kept", "-k")
    parser.add_argument("--kept-not")
    parser.add_argument("--model")
    assert list(undocumented((), parser, "`--kept-nothing` and `-k`", "`--model`")) == ["--kept-not"]


def commands_in(text):
    """Lines of code that call ring-mlx, as words, without comments and what a shell does with the output."""
    for line in text.splitlines():
        found = re.match(r"(?:    |\$ )?(?:python -m ring_mlx|ring-mlx) (?=[a-z])(.*)", line)
        if found and "COMMAND" not in line:
            words = shlex.split(found[1], comments=True)
            yield words[: next((i for i, w in enumerate(words) if w in "<>|&"), len(words))]


EXAMPLES = [
    pytest.param(words, id=f"{file.name}: {' '.join(words)[:60]}")
    for file in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
    for words in commands_in(file.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("words", EXAMPLES)
def test_every_example_is_a_command(words, capsys):
    try:
        build_parser().parse_args(words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)


def test_examples_are_found():
    assert len(EXAMPLES) > 15
    assert list(commands_in("    ring-mlx eval --json  # all\n    ring-mlx chat < a\ntext")) == [
        ["eval", "--json"],
        ["chat"],
    ]
