"""One thread that owns the model: takes conversations, posts messages; knows no widget.

The model's package is imported on that thread, so that the screen is there before MLX is. The thread never ends, it
comes to rest: what MLX keeps for a thread is freed when the thread ends, which needs the interpreter, and a process
that is exiting meanwhile aborts.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.message import Message

from ring_mlx import RingError
from tui.batch import Batch
from tui.messages import Ended, Failed, Loaded, Reading

if TYPE_CHECKING:
    from ring_mlx import GenerationEvent

Conversation = Sequence[dict[str, str]]
Post = Callable[[Message], object]
Answer = Callable[..., "Iterator[GenerationEvent]"]


@dataclass(frozen=True)
class Settings:
    """What the user chose on the command line; ``model`` None is the packaged toy."""

    model: str | None = None
    revision: str | None = None
    max_tokens: int = 2048
    temp: float = 0.6
    top_p: float = 1.0
    system_prompt: str | None = None
    thinking_budget: int | None = None


class StoppedError(Exception):
    """The user stopped the answer while its prompt was being read."""


@dataclass
class _Question:
    number: int
    conversation: Conversation
    stopped: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Loads the model and answers questions, one after the other, on a thread of its own.

    Args:
        settings: Model and sampling.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._post: Post = lambda message: None
        self._questions: queue.Queue[_Question | None] = queue.Queue()
        self._latest: _Question | None = None
        self._at_rest = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, post: Post) -> None:
        """Start the thread, which loads the model first; ``post`` must take messages from any thread."""
        self._post = post
        self._thread.start()

    def ask(self, number: int, conversation: Conversation) -> None:
        """Answer a conversation that ends with the user's message; may be called before the model is loaded."""
        self._latest = _Question(number, list(conversation))
        self._questions.put(self._latest)

    def stop(self) -> None:
        """End the latest question's answer after the token or prompt step at hand."""
        if self._latest is not None:
            self._latest.stopped.set()

    def close(self, timeout_s: float = 5.0) -> bool:
        """End the answer and free the model; returns whether the thread is at rest, so that the process may exit."""
        self.stop()
        self._questions.put(None)
        return not self._thread.is_alive() or self._at_rest.wait(timeout_s)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as e:  # noqa: BLE001 whatever happens here is shown, not raised across the screen
            self._post(Failed(_in_one_line(e)))
        self._at_rest.set()
        threading.Event().wait()

    def _serve(self) -> None:
        answer = self._load()
        while (question := self._questions.get()) is not None:
            try:
                self._post(Ended(question.number, self._write(question, answer)))
            except StoppedError:
                self._post(Ended(question.number, "stopped"))
            except Exception as e:  # noqa: BLE001 as above; the next question may fare better
                self._post(Failed(_in_one_line(e), question.number))

    def _load(self) -> Answer:
        from ring_mlx import demo_model_path, load, make_sampler, render_chat, stream_generate

        s = self._settings
        model, tokenizer = load(s.model or demo_model_path(), revision=s.revision)
        sampler = make_sampler(temp=s.temp, top_p=s.top_p)

        def answer(messages: list[dict[str, str]], progress: Callable[[int, int], None]) -> Iterator[GenerationEvent]:
            prompt = render_chat(tokenizer, messages)
            options: dict[str, Any] = {"max_tokens": s.max_tokens, "thinking_budget": s.thinking_budget}
            return stream_generate(model, tokenizer, prompt, sampler=sampler, progress=progress, **options)

        name = Path(s.model).name if s.model else "toy (no --model given)"
        self._post(Loaded(name, model.config.max_position_embeddings))
        return answer

    def _write(self, question: _Question, answer: Answer) -> str:
        def progress(done: int, total: int) -> None:
            if question.stopped.is_set():
                raise StoppedError
            self._post(Reading(question.number, done, total))

        system = self._settings.system_prompt
        messages = [*([{"role": "system", "content": system}] if system else []), *question.conversation]
        batch = Batch(question.number)
        for event in answer(messages, progress):
            batch.add(event)
            stopped = question.stopped.is_set()
            if event.finish_reason or stopped or batch.is_due():
                self._post(batch.take())
            if event.finish_reason or stopped:
                return event.finish_reason or "stopped"
        return "stop"


def _in_one_line(e: Exception) -> str:
    if isinstance(e, RingError):
        return str(e)
    return f"[engine] {type(e).__name__}: {' '.join(str(e).split())[:200]}; please report this."
