"""Several answers to one request: to each of its prompts, ``n`` of each, or the best of more."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Event as Flag
from typing import Any

from ring_mlx.engine.events import End, Event, PrefillProgress, Statistics
from ring_mlx.errors import RingError
from ring_mlx.serve.answer import Answer, Call, Piece
from ring_mlx.serve.engine import Engine
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.protocol import ApiRequest
from ring_mlx.serve.replies import Reply, usage_of

SEEDS = (1 << 64) - 1


@dataclass(frozen=True)
class Of:
    """An event of one of several answers."""

    number: int
    event: Event


class _Numbered(queue.SimpleQueue[Any]):
    """Puts the events of one answer into the queue of all."""

    def __init__(self, number: int, all_events: queue.SimpleQueue[tuple[int, Event | RingError]]) -> None:
        self._number, self._all = number, all_events

    def put(self, item: Event | RingError, block: bool = True, timeout: float | None = None) -> None:
        self._all.put((self._number, item))


def asked(request: ApiRequest, prepare: Callable[[ApiRequest], object]) -> list[ApiRequest]:
    """A prepared request of each answer that a client asks for, this one the first; those to one prompt follow each other.

    The first answer to a prompt has the seed of the request, the next ones the seeds after it.
    """
    found: list[ApiRequest] = []
    for prompt in (request.prompt, *request.prompts):
        lead = _another(request, prompt=prompt, prepared=None) if found else request
        prepare(lead)
        found.append(lead)
        for n in range(1, request.best_of or request.n):
            seed = request.sampling.seed
            sampling = lead.sampling if seed is None else replace(lead.sampling, seed=(seed + n) & SEEDS)
            other = _another(lead, sampling=sampling)
            if other.form is not None:
                prepare(other)  # what holds an answer to its form is that answer's own
            found.append(other)
    for n, one in enumerate(found):
        one.index = n
    return found


def _another(request: ApiRequest, **changed: Any) -> ApiRequest:
    return replace(request, stopped=Flag(), events=queue.SimpleQueue(), prompts=(), **changed)


class Choices(Answer):
    """Several answers as one, of which ``at_once`` are in work.

    The further answers to a prompt wait until it has been read, so that they need not read it.
    """

    last_line = Reply.last_line

    def __init__(self, requests: list[ApiRequest], model: str, at_once: int) -> None:
        super().__init__(requests[0], model)
        self._replies = [Reply(request, model) for request in requests]
        for reply in self._replies[1:]:
            reply.belongs_to(self._replies[0])
        self._events = queue.SimpleQueue[tuple[int, Event | RingError]]()
        for request in requests:
            request.events = _Numbered(request.index, self._events)
        self._each = requests[0].best_of or requests[0].n
        self._at_once, self._waiting = at_once, deque(sorted(requests, key=lambda r: r.index % self._each))
        self._entered: list[ApiRequest] = []
        self._read: set[int] = set()
        self._ends: dict[int, End] = {}
        self._engine: Engine | None = None

    # What the server does with it

    def enter(self, engine: Engine) -> None:
        self._engine = engine
        first = self._waiting.popleft()
        engine.enter(first)
        self._entered.append(first)
        self._go_on()

    def leave(self, engine: Engine) -> None:
        for request in self._entered:
            engine.drop(request)

    def _go_on(self) -> None:
        """Let more of the answers be worked on."""
        while self._waiting and len(self._entered) - len(self._ends) < self._at_once:
            request = self._waiting[0]
            lead = request.index - request.index % self._each
            if request.index != lead and lead not in self._read:
                return
            assert self._engine is not None
            self._engine.submit(self._waiting.popleft())
            self._entered.append(request)

    def next_event(self, timeout: float) -> Any:
        if len(self._ends) == len(self._replies):
            return self._end()
        number, event = self._events.get(timeout=timeout)
        if isinstance(event, RingError):
            return event
        if isinstance(event, End):
            if event.reason == "stopped":
                return event
            self._ends[number] = event
        if not isinstance(event, PrefillProgress):
            self._read.add(number)
        self._go_on()
        return event if isinstance(event, PrefillProgress) else Of(number, event)

    def _end(self) -> End:
        leads = [reply.statistics for reply in self._replies[:: self._each]]
        every = [reply.statistics for reply in self._replies]
        self.statistics = Statistics(
            prompt_tokens=sum(s.prompt_tokens for s in leads),
            reused_tokens=sum(s.reused_tokens for s in leads),
            generated_tokens=sum(s.generated_tokens for s in every),
            thinking_tokens=sum(s.thinking_tokens for s in every),
            drafted_tokens=sum(s.drafted_tokens for s in every),
            accepted_tokens=sum(s.accepted_tokens for s in every),
        )
        return End("stop")

    # What the client gets

    @property
    def every_call(self) -> list[Call]:
        return [call for reply in self._replies for call in reply.calls]

    def take(self, event: Any) -> None:
        if isinstance(event, Of) and not isinstance(event.event, End):
            self._replies[event.number].take(event.event)

    def add(self, event: Any) -> Iterator[Piece]:
        reply = self._replies[event.number]
        return reply.ended(event.event) if isinstance(event.event, End) else reply.add(event.event)

    def first(self) -> Iterator[Piece]:
        for reply in self._replies:
            yield from reply.first()

    def last(self, event: End) -> Iterator[Piece]:
        if self.request.include_usage:
            yield self._replies[0].usage_piece(self.statistics)

    def whole(self, event: End) -> dict[str, Any]:
        answers = [reply.whole(self._ends[n]) for n, reply in enumerate(self._replies)]
        choices = []
        for at in range(0, len(answers), self._each):
            group: Sequence[int] = range(at, at + self._each)
            if self.request.best_of:
                group = sorted(group, key=lambda n: self._replies[n].mean_logprob, reverse=True)[: self.request.n]
            choices += [answers[n]["choices"][0] for n in group]
        choices = [choice | {"index": n} for n, choice in enumerate(choices)]
        return {**answers[0], "choices": choices, "usage": usage_of(self.statistics)}

    def failed(self, error: ApiError) -> Iterator[Piece]:
        return self._replies[0].failed(error)

    def reason(self, event: End) -> str:
        return self._replies[0].reason(self._ends[0])

    def why_empty(self, event: End) -> str:
        """The first such line."""
        return next(filter(None, (r.why_empty(self._ends[n]) for n, r in enumerate(self._replies))), "")
