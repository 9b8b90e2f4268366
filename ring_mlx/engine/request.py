"""One request on its way from any thread to the model's, and its answer back."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ring_mlx.engine.events import End, Event, Sampling
from ring_mlx.errors import RingError, SessionError
from ring_mlx.generation.forms import Form
from ring_mlx.system.install import explained

if TYPE_CHECKING:
    from ring_mlx.engine.branches import Prepared


@dataclass(eq=False)
class Request:
    """One thing to answer, and the queue that its answer goes to.

    Args:
        prompt: Text, messages, or where it is prepared ids.
        sampling, thinking_budget, tools, template_options, continue_last: As for `Session.send`.
        max_tokens: As there; None is what the options say.
        stop: Texts that end the answer and are not part of it.
        stop_ids: Tokens that do so, besides the model's own.
        min_tokens: Before so many tokens neither these nor the model's own can come.
        ignore_eos: The model's own never come.
        one_call: The first tool call ends the answer.
        top_logprobs: How many alternatives to tell for each token; None tells no log-probabilities.
        prompt_logprobs: Tell them of the prompt's tokens too. No snapshot has these, so all of it is read.
        form: What the answer must be after its thought, or None.
        is_text: The answer is the text as it comes, tags included: thoughts and tool calls are not looked for.
        prepared: The rendered prompt, where the sender's thread has made it.
        predicted: Tokens of a text that may be much of the answer, from which drafts come too.
        aside: Answered with a cache of its own while nothing else is wanted, and ended by any other request.
        stopped: Set to end the answer after the token or prompt step at hand.
        is_dropped: Nobody waits for the answer any more, not even for its `End`.
        events: The answer; an `End` or a RingError is the last.
        is_over: Whether that has been put.
        client: Who asks; of several that wait, clients have their turns.
        arrived: When the request came (``time.perf_counter``).
        admitted, first_token: When work on it began, and when its first token came; None before.
    """

    prompt: Any
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    thinking_budget: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template_options: Mapping[str, Any] | None = None
    continue_last: bool = False
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    one_call: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    form: Form | None = None
    is_text: bool = False
    prepared: Prepared | None = None
    predicted: Sequence[int] = ()
    aside: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)
    is_dropped: bool = False
    events: queue.SimpleQueue[Event | RingError] = field(default_factory=queue.SimpleQueue)
    is_over: bool = False
    client: str = ""
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None

    def end(self, last: End | RingError) -> None:
        """Put the last event, if somebody waits for it."""
        self.is_over = True
        if not self.is_dropped:
            self.events.put(last)

    def drop(self) -> None:
        """End the answer without a word."""
        self.is_dropped = True
        self.stopped.set()


def as_ring_error(e: Exception) -> RingError:
    """The error that users see for an exception; an unexpected one becomes the cause of a SessionError."""
    if isinstance(e, RingError):
        return e
    if isinstance(e, ImportError):
        return explained(e)
    error = SessionError(f"{type(e).__name__}: {str(e)[:200]}; shorten the prompt if memory is short, or report this.")
    error.__cause__ = e
    return error
