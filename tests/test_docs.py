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


PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("[a-z]*/**/README.md"))]
FOLDERS = ("ring_mlx", "metal_kernels", "tui", "tests", "benchmarks", "demo", "docs", ".github")


def is_there(path):
    """Whether a path with or without wildcards leads to something in the repository."""
    return any(ROOT.glob(path.rstrip("/")))


def absent(text):
    """Paths, modules and attributes of this repository that a text names in code and that are not there."""
    text = text.replace("\\_", "_")
    for path in re.findall(rf"(?<![\w./-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*[\w/*])", text):
        if not is_there(path):
            yield path
    for name in re.findall(r"`(\w+\.py)`", text):
        if not is_there(f"**/{name}"):
            yield name
    for name in re.findall(r"(?<![\w./-])((?:ring_mlx|metal_kernels|tui|benchmarks)(?:\.\w+)+)", text):
        module = name.replace(".", "/")
        outer, _, attribute = module.rpartition("/")
        homes = [f"{p}{end}" for p in (outer, outer.rpartition("/")[0]) if p for end in (".py", "/__init__.py")]
        defined = re.compile(rf"\b{attribute}\b")
        if not (is_there(f"{module}.py") or is_there(f"{module}/__init__.py")) and not any(
            defined.search((ROOT / home).read_text(encoding="utf-8")) for home in homes if is_there(home)
        ):
            yield name


def slugs(text):
    """The anchors of a page's headings, as GitHub makes them."""
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def broken(page):
    """Links of a page to files and headings that are not there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in slugs(file.read_text(encoding="utf-8"))):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_names_and_links_is_there(page):
    assert not list(absent(page.read_text(encoding="utf-8")))
    assert not list(broken(page))


def test_what_is_not_there_is_found(tmp_path):
    text = "`ring_mlx/gone.py` tests/gone/ `gone.py` ring_mlx.gone `ring_mlx.cli.main` ring_mlx.errors.GoneError"
    assert list(absent(text)) == [
        "ring_mlx/gone.py",
        "tests/gone/",
        "gone.py",
        "ring_mlx.gone",
        "ring_mlx.errors.GoneError",
    ]
    (tmp_path / "a.md").write_text("# A b: c\n[x](#a-b-c) [y](#d) [z](b.md) [w](https://a.b)")
    assert list(broken(tmp_path / "a.md")) == ["#d", "b.md"]
