"""Files and functions of ours that a decoded token and a chat question go through: ``python -m benchmarks.path_of_a_token``.

Python's own trace of warm runs. The token is of a tiny random model with every kind of layer, its kernels on: they give zeros
and count as proven, and what a step is compiled from runs as Python, so that it is counted too. The question is asked in the
chat with the packaged model, traced from the key that sends it to its first piece of text. Comprehensions are not counted:
since Python 3.12 they are no functions of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import mlx.core as mx

from metal_kernels import launch, proofs
from metal_kernels.machine import Store
from ring_mlx.bench.random_weights import random_model_of
from ring_mlx.bench.shapes import MINI
from ring_mlx.generation.decoding import generate_step

ROOT = Path(__file__).parents[1]
PACKAGES = ("ring_mlx", "metal_kernels", "tui")
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}
SIZES = {"num_hidden_layers": 5, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64}
SIZES |= {"num_experts": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256}
WARM_TOKENS = 3
FIRST_PIECE_S = 120.0


class Trace:
    """What is called while it is open, in this thread and in those started since it was made."""

    def __init__(self) -> None:
        self.is_open = False
        self.functions: dict[str, set[str]] = {}

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """A profile function, as of ``sys.setprofile``."""
        code = frame.f_code
        if not self.is_open or event != "call" or code.co_name in COMPREHENSIONS:
            return
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
            found = self.functions.setdefault(str(path.relative_to(ROOT)), set())
            found.add(f"{code.co_name}:{code.co_firstlineno}")

    @property
    def counts(self) -> dict[str, int]:
        """How many files and functions."""
        return {"files": len(self.functions), "functions": sum(map(len, self.functions.values()))}


@contextmanager
def profiled() -> Iterator[Trace]:
    """Trace this thread and those that are started within."""
    path = Trace()
    threading.setprofile(path.note)
    sys.setprofile(path.note)
    try:
        yield path
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def of_a_token() -> Trace:
    """What one token goes through that follows others."""

    def kernel(**_: Any) -> Any:
        return lambda *, output_shapes, output_dtypes, **_: [
            mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)
        ]

    where = launch.Backend("metal", kernel, proofs.Ledger(Store(None, {})))
    model = random_model_of(MINI | SIZES, "mini", 4, 32, False, mx.bfloat16, 0)
    mx.disable_compile()
    try:
        with launch.use(where), mock.patch.object(proofs, "_judged", return_value=(0.0, "")), profiled() as path:
            tokens = generate_step([1, 2, 3], model, model.make_cache(), max_tokens=WARM_TOKENS + 2)
            for _ in range(WARM_TOKENS):
                next(tokens)
            path.is_open = True
            next(tokens)
            path.is_open = False
    finally:
        mx.enable_compile()
    return path


def of_a_question() -> Trace:
    """What a question in the chat goes through, up to the first piece of its answer."""
    with profiled() as path:
        asyncio.run(_ask(path))
    return path


async def _ask(path: Trace) -> None:
    """Ask twice; the second question is traced."""
    from tui.answering import Engine
    from tui.app import RingChat
    from tui.messages import Ended, Loaded, Piece

    loop, engine = asyncio.get_running_loop(), Engine()
    seen = {kind: asyncio.Event() for kind in (Loaded, Piece, Ended)}

    def told(post: Any, message: Any) -> Any:
        if isinstance(message, Piece):
            path.is_open = False
        if type(message) in seen:
            loop.call_soon_threadsafe(seen[type(message)].set)
        return post(message)

    start = engine.start
    engine.start = lambda post: start(lambda message: told(post, message))  # type: ignore[method-assign]
    async with RingChat(engine).run_test() as pilot:
        chat = pilot.app.chat  # type: ignore[attr-defined]
        await asyncio.wait_for(seen[Loaded].wait(), FIRST_PIECE_S)
        for is_traced in (False, True):
            await pilot.pause()
            seen[Ended].clear()
            chat.entry.prompt.replace_text("What is 2 + 3?")
            await pilot.pause()
            path.is_open = is_traced
            await pilot.press("enter")
            await asyncio.wait_for(seen[Ended].wait(), FIRST_PIECE_S)
    engine.close()


PATHS = {"a decoded token": of_a_token, "a chat question to its first text": of_a_question}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="counts and names as JSON")
    args = parser.parse_args()
    found = {name: trace() for name, trace in PATHS.items()}
    if args.json:
        lists = {
            n: p.counts | {"path": {f: sorted(v) for f, v in sorted(p.functions.items())}} for n, p in found.items()
        }
        print(json.dumps(lists, indent=1))
        return
    for name, path in found.items():
        print(f"\n{name}: {path.counts['files']} files, {path.counts['functions']} functions")
        for file, functions in sorted(path.functions.items()):
            print(f"  {file}: {', '.join(f.partition(':')[0] for f in sorted(functions))}")


if __name__ == "__main__":
    main()
