"""The argument parser of all commands: groups of options, their help, and errors in one line."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ring_mlx.cli.exit_codes import BAD_INPUT
from ring_mlx.options import group_of
from ring_mlx.system.terminal_text import harmless

_DEFAULT = re.compile(r"\((?!default)([^()]*)\)$")


class HelpFormatter(argparse.HelpFormatter):
    """Help with a short usage, short names of values, and each default as "(default: ...)"."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{"max_help_position": 32, **settings})

    def add_usage(self, usage: Any, actions: Iterable[Any], groups: Iterable[Any], prefix: str | None = None) -> None:
        """Name only required arguments; the options are listed below."""
        options = argparse.Action([], "options", metavar="[options]")
        needed = [a for a in actions if a.required or not a.option_strings]
        super().add_usage(usage, [options, *needed], [], prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(sorted(action.option_strings, key=len))} {value}".rstrip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return super()._get_default_metavar_for_optional(action).rpartition("_")[2]

    def _get_help_string(self, action: argparse.Action) -> str:
        # The texts end in the default in brackets: "tokens after the first (128)".
        text = action.help or ""
        return text if action.nargs == 0 else _DEFAULT.sub(r"(default: \1)", text)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # a flag stays in one piece

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else "\n".join(indent + line for line in self._split_lines(text, width))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, with exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage, and exit."""
        self.exit(BAD_INPUT, harmless(f"{self.prog}: [option] {message}; see {self.prog} --help.\n"))


def add_command(commands: Any, name: str, about: str, *examples: str) -> argparse.ArgumentParser:
    """A parser for one more command: its name, what it does in a sentence, and examples that can be typed."""
    shown = "".join(f"\n  {line}" for line in examples)
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, epilog=f"example{'s' * (len(examples) > 1)}:{shown}"
    )
    return parser


def in_groups(parser: argparse.ArgumentParser, commands: Any, groups: Mapping[str, str]) -> None:
    """List commands in the help under several titles; argparse would list all under one."""
    parser._positionals._group_actions.remove(commands)
    for listed in commands._choices_actions:
        group_of(parser, groups[listed.dest])._group_actions.append(listed)
