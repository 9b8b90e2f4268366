"""What a benchmark measures, and the processes that share its model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from ring_mlx.errors import RingError

CONTEXTS = (512, 2048, 8192)


class BenchError(RingError, origin="bench"):
    """A benchmark that cannot be run or reported as asked."""


@dataclass(frozen=True)
class BenchConfig:
    """The numbers of a run.

    Args:
        contexts: Prompt tokens of each cell; None is as many of `CONTEXTS` as the model's context holds.
        generate: Decode steps timed after the first token.
        repeats: Measured repetitions; one more comes first and is thrown away.
        batch_sizes: Rows of equal length, each size a cell.
        prefill_step_size: Prompt tokens a step; 0 is what this machine chose, known once the model is there.
        vs: Also run mlx-lm, in alternation, ``vs_repeats`` times; it reads prompts of up to ``vs_max_prefill`` itself.
        floor: Measure the machine's rates and say how far from them each cell is.
        seed: Of prompts and random weights.
    """

    contexts: tuple[int, ...] | None = None
    generate: int = 128
    repeats: int = 5
    batch_sizes: tuple[int, ...] = (1,)
    prefill_step_size: int = 2048
    vs: bool = False
    vs_repeats: int = 3
    vs_max_prefill: int = 2048
    floor: bool = False
    seed: int = 0

    def fitted(self, context_tokens: int) -> BenchConfig:
        """The settings with contexts filled in; raises BenchError if a cell does not fit the model's context."""
        room = context_tokens - self.generate - 1
        contexts = self.contexts or tuple(c for c in CONTEXTS if c <= room) or (CONTEXTS[0],)
        if max(contexts) > room:
            raise BenchError(
                f"-p {max(contexts)} with -g {self.generate} needs {max(contexts) + self.generate + 1} tokens, but this "
                f"model's context is {context_tokens}; give less."
            )
        return replace(self, contexts=contexts)


@dataclass(frozen=True)
class Ranks:
    """The processes that share the model; a single process needs none of it.

    Args:
        mode: How they share it, which is settled when the model is made; empty where one is alone.
        greatest: The greatest of a number over all; returns once all have come as far.
        agree: Tokens of the first, on all; None where one is alone.
        together: Work that fails on all if it fails on one.
    """

    count: int = 1
    mode: Callable[[], str] = str
    greatest: Callable[[int], int] = int
    agree: Callable[[Any], Any] | None = None
    together: Callable[[], AbstractContextManager[Any]] = nullcontext

    def words(self) -> str:
        """For a model's name; nothing for a single process."""
        return f", {self.mode()} over {self.count} processes" if self.count > 1 else ""


ALONE = Ranks()
