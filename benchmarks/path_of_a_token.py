"""Files and functions of ours that a decoded token and a chat question go through: ``python -m benchmarks.path_of_a_token``.

Python's own trace of warm runs. The token is of a tiny random model with every kind of layer, its kernels on: they give zeros
and count as proven, and what a step is compiled from runs as Python, so that it is counted too. The question is asked in the
chat with the packaged model, traced from the key that sends it to its first piece of text. Comprehensions are not counted:
since Python 3.12 they are no functions of their own.

The question is counted twice. The wide count has every file that runs meanwhile. The narrow one leaves out what is called
within the model's forward, which the token's count has, and within the stores on disk (of chats and of snapshots), which keep
what is said and do not make it. At commit 9c61e28, where a goal of 20 files was set against 33, it gives 33, and the wide one
53 (50 if the first snapshots are not on the disk yet).
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
FORWARD = "ring_mlx/model/model.py"
STORES = ("tui/store/", "ring_mlx/engine/stored/", "ring_mlx/engine/snapshots/store.py")
Functions = dict[str, set[str]]


class Trace:
    """What is called while it is open, in this thread and in those started since it was made.

    ``functions`` has all of it by file, ``narrow`` not what the model's forward and the stores on disk call.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.functions: Functions = {}
        self.narrow: Functions = {}
        self._within = threading.local()  # the outermost call of a forward or a store

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """A profile function, as of ``sys.setprofile``."""
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        outermost = getattr(self._within, "frame", None)
        if event == "return" and outermost is frame:
            self._within.frame = None
        if not self.is_open or event != "call" or not path.is_relative_to(ROOT):
            return
        file, name = str(path.relative_to(ROOT)), code.co_name
        if outermost is None and (file.startswith(STORES) or (file == FORWARD and name == "__call__")):
            self._within.frame = outermost = frame
        if name in COMPREHENSIONS or file.partition("/")[0] not in PACKAGES:
            return
        for functions in (self.functions,) if outermost is not None else (self.functions, self.narrow):
            functions.setdefault(file, set()).add(f"{name}:{code.co_firstlineno}")

    @property
    def counts(self) -> dict[str, int]:
        """How many files and functions."""
        return counted(self.functions)


def counted(functions: Functions) -> dict[str, int]:
    """How many files and functions."""
    return {"files": len(functions), "functions": sum(map(len, functions.values()))}


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


QUESTION = "a chat question to its first text"
PATHS = {"a decoded token": of_a_token, QUESTION: of_a_question}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="counts and names as JSON")
    args = parser.parse_args()
    found = {name: trace() for name, trace in PATHS.items()}
    if args.json:
        lists = {
            n: p.counts
            | {"narrow": counted(p.narrow)}
            | {"path": {f: sorted(v) for f, v in sorted(p.functions.items())}}
            for n, p in found.items()
        }
        print(json.dumps(lists, indent=1))
        return
    for name, path in found.items():
        few = counted(path.narrow)
        narrow = f"; narrow (+) {few['files']} and {few['functions']}" if name == QUESTION else ""
        print(f"\n{name}: {path.counts['files']} files, {path.counts['functions']} functions{narrow}")
        for file, functions in sorted(path.functions.items()):
            mark = "+" if narrow and file in path.narrow else " "
            print(f" {mark}{file}: {', '.join(f.partition(':')[0] for f in sorted(functions))}")


if __name__ == "__main__":
    main()
