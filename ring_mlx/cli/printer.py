"""Shows what `ring-mlx generate` makes, and its statistics."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ring_mlx.experts import ExpertStatistics
from ring_mlx.generation.pace import Pace
from ring_mlx.generation.stream import GenerationEvent
from ring_mlx.generation.thinking import Opening, end_note
from ring_mlx.system.terminal_text import for_output

RULE = "=" * 10
RAISE = "raise --max-tokens, or leave it out to have all"


@dataclass
class Printer:
    """Writes events to standard output as they come, and the statistics at the end.

    Args:
        thinking: "show" the thought as it is, "hide" it, or "fold" it to one line.
        quiet: Collect only, for `as_json`.
        verbose: Frame the text and print statistics, in the words of mlx_lm.generate.
        experts: Counts of a model that reads its experts on demand.
        pace: Counts of drafted tokens, where there are any.
    """

    thinking: str
    quiet: bool = False
    verbose: bool = True
    experts: ExpertStatistics | None = None
    pace: Pace | None = None
    write: Callable[[str], Any] = lambda text: sys.stdout.write(for_output(text))
    text: str = ""
    thought: str = ""
    answer: str = ""
    thinking_tokens: int = 0
    last: GenerationEvent | None = None
    _thought_started: float = 0.0
    _opening: Opening = field(default_factory=Opening)
    _answering: bool = False
    _interrupted: bool = False

    def __post_init__(self) -> None:
        if self.verbose and not self.quiet:
            self.write(f"{RULE}\n")

    def show(self, event: GenerationEvent) -> None:
        if self.last is None:
            self._thought_started = time.perf_counter()
        self.last = event
        self.text += event.text
        self.thinking_tokens = event.thinking_tokens
        if event.revised is None:
            self.thought += event.thinking_text
            self.answer += event.answer_text
        else:
            self.thought, self.answer = event.revised
        if not self.quiet:
            self._out(event.text if self.thinking == "show" else self._answer_part(event))

    @property
    def is_cut_off(self) -> bool:
        """Whether the model would have gone on."""
        return self.last is not None and self.last.finish_reason == "length"

    def end_note(self, context: int) -> str:
        """What is to be said of how the answer ended, in a context of so many tokens."""
        e = self.last
        if e is None:
            return ""
        is_full = e.cached_tokens + e.prompt_tokens + e.generation_tokens > context
        remedy = f"the context of {context:,} tokens is full: shorten the prompt" if is_full else RAISE
        return end_note(str(e.finish_reason), e.generation_tokens, self.thinking_tokens, self.answer, remedy)

    def finish(self, interrupted: bool = False) -> None:
        """Print what belongs after the text."""
        self._interrupted = interrupted
        if self.quiet:
            return
        if self.thinking == "fold" and self.thinking_tokens and not self._answering:
            self._out(self._folded())
        self._out("\n")
        if not self.verbose:
            return
        self._out(f"{RULE}\n")
        if self.last is None:
            self._out("No text generated for this prompt\n")
            return
        e = self.last
        reused = f" ({e.cached_tokens} more from the cache)" if e.cached_tokens else ""
        self._out(
            f"Prompt: {e.prompt_tokens} tokens, {e.prompt_tps:.3f} tokens-per-sec{reused}\n"
            f"Generation: {e.generation_tokens} tokens, {e.generation_tps:.3f} tokens-per-sec\n"
            f"Peak memory: {e.peak_memory:.3f} GB\n"
        )
        if self.experts is not None:
            self._out(self.experts.line() + "\n")
        if self.pace is not None and self.pace.drafted:
            self._out(self.pace.line() + "\n")

    def as_json(self, model: str) -> dict[str, Any]:
        e = self.last
        out: dict[str, Any] = {
            "model": model,
            "text": self.text,
            "thinking": self.thought.strip("\r\n"),
            "answer": Opening().feed(self.answer).rstrip("\n"),
            "thinking_tokens": self.thinking_tokens,
            "finish_reason": "interrupted" if self._interrupted else e.finish_reason if e else None,
        }
        if e is not None:
            out |= {
                "prompt_tokens": e.prompt_tokens,
                "cached_tokens": e.cached_tokens,
                "generation_tokens": e.generation_tokens,
                "prompt_tps": e.prompt_tps,
                "generation_tps": e.generation_tps,
                "time_to_first_token_s": e.time_to_first_token_s,
                "peak_memory_gb": e.peak_memory,
            }
        if self.experts is not None:
            out["experts"] = self.experts.as_dict()
        if self.pace is not None:
            out["speculation"] = self.pace.as_dict()
        return out

    def _answer_part(self, event: GenerationEvent) -> str:
        text = event.answer_text
        if self._answering and event.revised is not None:  # what was printed as the answer was the thought
            return "\n" + self._folded("above") + Opening().feed(text)
        if self._answering:
            return text
        text = self._opening.feed(text)
        if not text:
            return ""
        self._answering = True
        return self._folded() + text if self.thinking == "fold" and self.thinking_tokens else text

    def _folded(self, where: str = "") -> str:
        seconds = time.perf_counter() - self._thought_started
        return f"[thought {seconds:.1f} s, {self.thinking_tokens} tokens{where and ', '}{where}]\n"

    def _out(self, text: str) -> None:
        self.write(text)
        sys.stdout.flush()
