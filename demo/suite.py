"""``python -m demo.suite FILE``: writes the held-out suite that ``ring-mlx eval --suite demo`` asks; knows no model."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

from demo.data import as_dicts, eval_suite

HERE = Path(__file__).parent
QUESTIONS_PER_TASK, SEED = 40, 20261124


def write_suite(path: Path, questions_per_task: int = QUESTIONS_PER_TASK, seed: int = SEED) -> int:
    """Write gzipped JSON lines of task, messages and answer, the same text each time; returns how many lines."""
    tokenizer = Tokenizer.from_file(str(HERE.parent / "ring_mlx" / "demo_model" / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    lines = []
    for drawn in eval_suite(questions_per_task, seed, count):
        messages = [{k: m[k] for k in ("role", "content")} for m in as_dicts(drawn)[:-1]]
        lines.append(json.dumps({"task": drawn.task, "messages": messages, "answer": drawn.answer}))
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
    return len(lines)


if __name__ == "__main__":
    print(write_suite(Path(sys.argv[1])))
