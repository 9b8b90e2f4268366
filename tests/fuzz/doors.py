"""What an example calls in a fork: the commands, and the library's own functions; takes and gives JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from tokenizers import Tokenizer

from tests.fuzz import folders

IMPORTED = (
    "transformers",
    "mlx_lm.tokenizer_utils",
    "mlx_lm.utils",
    "mlx_lm.sample_utils",
    "mlx_lm.tool_parsers.json_tools",
    "multiprocessing.synchronize",
    "ring_mlx.bench.run",
    "ring_mlx.cli.prompt_cache",
    "ring_mlx.convert",
    "ring_mlx.convert.conversion",
    "ring_mlx.convert.report",
    "ring_mlx.distributed.heartbeat",
    "ring_mlx.doctor.decay_check",
    "ring_mlx.doctor.finding",
    "ring_mlx.doctor.models",
    "ring_mlx.evaluation.divergence",
    "ring_mlx.evaluation.perplexity",
    "ring_mlx.generation.stream",
    "ring_mlx.checkpoint.loading",
    "ring_mlx.serve.server",
    "ring_mlx.engine.session",
    "ring_mlx.engine.loaded",
    "tests.fuzz.store_doors",
    "tui.command",
    "tui.plain",
)


def warm() -> None:
    """Import what the doors need, so that a fork does not."""
    from ring_mlx.cli import build_parser

    for name in IMPORTED:
        import_module(name)
    build_parser()
    # transformers imports the tokenizer's module when it is first asked for it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    assert AutoTokenizer
    assert PreTrainedTokenizerFast


def cli(argv: Sequence[str]) -> int:
    """The command line."""
    from ring_mlx.cli import main

    return main(list(argv))


def serve(folder: str) -> None:
    """Start the server, let it load, and end it."""
    from ring_mlx.serve.engine import Settings
    from ring_mlx.serve.server import Server

    server = Server(Settings(model=Path(folder), name="fuzzed", store=False, read_ahead=False), port=0)
    server.start()
    try:
        while not server.engine.wait_until_loaded(0.1):
            if server.engine.failure is not None:
                break
        if server.engine.failure is not None:
            raise server.engine.failure
    finally:
        server.close()


def session(folder: str, message: str = "hi") -> None:
    """One answer of a session."""
    from ring_mlx import Session

    with Session(folder, store=False, read_ahead=False) as session:
        for _ in session.send([{"role": "user", "content": message}], max_tokens=3):
            pass


def encode(pattern: str) -> None:
    """Split texts by the pattern that make an engine go back."""
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(folders.toy_json(folders.TOKENIZER) | {"pre_tokenizer": step}))
    except ValueError:
        return
    except Exception:  # noqa: BLE001 the library's own, of a pattern that it does not know
        return
    for text in ("a" * 2000, "ab" * 1000 + "c", " " * 2000, "a" * 1000 + " " * 1000 + "\n"):
        tokenizer.encode(text)


def trace() -> None:
    """A planted fault: an error that no one foresaw."""
    raise ZeroDivisionError("planted")


def spin() -> None:
    """A planted fault: no end."""
    while True:
        pass


def wait() -> None:
    """A planted fault: waits for what never comes."""
    time.sleep(3600)


def hog(mb: int) -> None:
    """A planted fault: memory."""
    held = bytearray(mb << 20)
    for at in range(0, len(held), 4096):
        held[at] = 1


def die(number: int) -> None:
    """A planted fault: a signal."""
    os.kill(os.getpid(), number)


def chatter() -> None:
    """A planted fault: more than one line."""
    from ring_mlx.errors import ConfigError

    print("thread '<unnamed>' complains", file=sys.stderr)
    raise ConfigError("nothing; do nothing.")
