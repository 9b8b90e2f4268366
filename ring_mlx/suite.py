"""Suites of questions with one right answer, as files; knows text, not models."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

from ring_mlx.errors import OptionError

SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Question:
    """Messages that end with the user's, and the answer that counts as right.

    ``task`` groups questions in the report.
    """

    task: str
    messages: tuple[dict[str, str], ...]
    answer: str


def is_packaged(name: str) -> bool:
    """Whether a suite of this name comes with the package."""
    return (SUITES / f"{name}.jsonl.gz").is_file()


def suite_path(name: str) -> Path:
    """The file of a packaged suite by name, such as "demo", or the path of another.

    Raises:
        OptionError: If there is neither.
    """
    if is_packaged(name):
        return SUITES / f"{name}.jsonl.gz"
    if not Path(name).is_file():
        known = ", ".join(sorted(p.name.removesuffix(".jsonl.gz") for p in SUITES.glob("*.jsonl.gz")))
        raise OptionError(f"no suite {name!r}; give {known} or a gzipped JSON-lines file.")
    return Path(name)


def read_suite(path: Path) -> list[Question]:
    """Read a suite: gzipped JSON lines with task, messages and answer.

    Raises:
        OptionError: If the file is missing or not a suite.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as f:
            raw = [json.loads(line) for line in f]
        return [Question(r["task"], tuple(r["messages"]), r["answer"]) for r in raw]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
        raise OptionError(f"suite {path} cannot be read ({e}); give a gzipped JSON-lines suite.") from None


def extract_answer(text: str) -> str:
    """The final answer in a reply: what follows the last colon and space, else the last word.

    The thought, closing punctuation, quotes and backticks are not part of it.
    """
    visible = text.rsplit("</think>", 1)[-1].strip()
    tail = visible.rsplit(": ", 1)[-1] if ": " in visible else visible.rsplit(None, 1)[-1] if visible else ""
    return tail.rstrip(".!?").strip('"`')
