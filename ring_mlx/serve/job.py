"""A request and its events, passed between the request's thread and the model's."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field

from ring_mlx.engine.branches import Prompt, Renderer
from ring_mlx.engine.events import AnswerText, PrefillProgress, Revised, ThinkingText, ToolCall
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.protocol import Asked


@dataclass(frozen=True)
class TokenLogprob:
    """One token of the answer, how likely it was, and where in the text it begins; the likeliest alternatives first."""

    token: bytes
    logprob: float
    offset: int = 0
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What an answer cost.

    Args:
        prompt_tokens: Of the whole prompt.
        cached_tokens: Of these, known from snapshots.
        completion_tokens: Generated; thought, tags and stop token included.
        reasoning_tokens: Of these, the thought with its tags.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True)
class Finished:
    """The end of an answer: ``stop``, ``length`` (also where all was thought) or ``tool_calls``."""

    reason: str
    usage: Usage


Said = ThinkingText | AnswerText | ToolCall | Revised | TokenLogprob | PrefillProgress | Finished | ApiError


@dataclass(eq=False)
class Job:
    """One request on its way.

    Args:
        asked: What the client wants.
        prompt: Its text and ids.
        renderer: Of a chat, else None.
        limit: Tokens that it may generate.
        cancelled: Set where nobody wants the answer any more.
        events: The answer; `Finished` or an `ApiError` is the last.
        arrived: When it came (``time.perf_counter``).
    """

    asked: Asked
    prompt: Prompt
    renderer: Renderer | None
    limit: int
    cancelled: threading.Event = field(default_factory=threading.Event)
    events: queue.SimpleQueue[Said] = field(default_factory=queue.SimpleQueue)
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def most_tokens(self) -> int:
        """Prompt and answer at their longest."""
        return len(self.prompt.ids) + self.limit
