"""Question suites with one right answer each, read from files."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_mlx.errors import OptionError
from ring_mlx.system.files import MOST_TEXT_BYTES, bytes_of

SUITES = Path(__file__).parents[1] / "suites"


@dataclass(frozen=True)
class Question:
    """Messages that end with the user's, the answer that counts as right, and the task that it is reported under."""

    task: str
    messages: tuple[dict[str, str], ...]
    answer: str


def is_packaged(name: str) -> bool:
    return os.path.isfile(SUITES / f"{name}.jsonl.gz")


def suite_path(name: str) -> Path:
    """The file of a packaged suite by name, such as "demo", or another path; raises OptionError if there is neither."""
    if is_packaged(name):
        return SUITES / f"{name}.jsonl.gz"
    if not os.path.isfile(name):
        known = ", ".join(sorted(p.name.removesuffix(".jsonl.gz") for p in SUITES.glob("*.jsonl.gz")))
        raise OptionError(f"no suite {name!r}; give {known} or a gzipped JSON-lines file.")
    return Path(name)


def read_suite(path: Path) -> list[Question]:
    """Read gzipped JSON lines with task, messages and answer; raises OptionError if they are none."""
    try:
        with gzip.open(io.BytesIO(bytes_of(path, MOST_TEXT_BYTES))) as f:
            text = f.read(MOST_TEXT_BYTES + 1)
        if len(text) > MOST_TEXT_BYTES:
            raise ValueError(f"it unpacks to more than {MOST_TEXT_BYTES // 1_000_000} MB")
        found = [_question(json.loads(line.decode())) for line in text.splitlines()]
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, zlib.error) as e:
        raise OptionError(f"suite {path} cannot be read ({e}); give a gzipped JSON-lines suite.") from None
    if not found:
        raise OptionError(f"suite {path} has no question; give another.")
    return found


def _question(row: Any) -> Question:
    task, messages, answer = row["task"], row["messages"], row["answer"]
    if not isinstance(task, str) or not isinstance(answer, str) or not isinstance(messages, list):
        raise TypeError("task and answer must be texts, messages an array")
    for m in messages:
        if not isinstance(m, dict) or not all(isinstance(m.get(name), str) for name in ("role", "content")):
            raise TypeError("a message must have a role and a content, both texts")
    return Question(task, tuple(messages), answer)


def extract_answer(text: str) -> str:
    """The final answer in a reply: what follows the last colon and space, else the last word.

    The thought, closing punctuation, quotes and backticks are not part of it.
    """
    visible = text.rsplit("</think>", 1)[-1].strip()
    tail = visible.rsplit(": ", 1)[-1] if ": " in visible else visible.rsplit(None, 1)[-1] if visible else ""
    return tail.rstrip(".!?").strip('"`')
