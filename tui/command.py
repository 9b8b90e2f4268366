"""``ring-mlx chat``."""

from typing import Any


def add(commands: Any) -> None:
    """Add the subcommand."""
    commands.add_parser("chat", help="chat in the terminal")
