"""The typed messages between screens and the engine.

``number`` is the question's, so that late messages of an abandoned answer can be recognized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from textual.message import Message

from ring_mlx import Statistics, Thinking

Messages = Sequence[dict[str, Any]]
Post = Callable[[Message], object]


@dataclass(frozen=True)
class Figures(Statistics):
    """Speeds and memory of an answer so far; ``cache_bytes`` is that of snapshots, 0 if it is not known."""

    thinking_s: float = 0.0
    cache_bytes: int = 0

    @property
    def context_tokens(self) -> int:
        """Tokens of the context in use."""
        return self.prompt_tokens + self.generated_tokens


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen and when it ends.

    ``thinking_budget`` None leaves the answer its room, XTC's are off; ``max_tokens`` -1 is what the context holds; of others
    None is what the model says.
    """

    temp: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int = -1
    thinking_budget: int | None = None
    seed: int | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None


@dataclass(frozen=True)
class Question:
    """What is to be answered: messages as chat templates take them; ``continues`` goes on with the last one."""

    number: int
    messages: Messages
    sampling: Sampling = field(default_factory=Sampling)
    continues: bool = False


@dataclass(frozen=True)
class ModelChoice:
    """A model by folder or owner/name; ``path`` None is the packaged toy.

    ``adapter_path`` is a folder of mlx_lm.lora's, and ``decay_layer_offset`` comes before what config.json says; both are
    for this model only.
    ``expert_cache_bytes`` is the memory that routed experts are read into on demand; None keeps them all in memory.
    ``thinking`` says how answers start and what room a thought leaves, ``prefill_step_tokens`` how many of a prompt are
    read at once, ``speculate`` how many tokens of an answer. None of these four is what the engine has.
    ``draft_model`` is a smaller one that drafts, for this model only.
    """

    path: str | None = None
    revision: str | None = None
    adapter_path: str | None = None
    expert_cache_bytes: int | None = None
    thinking: Thinking | None = None
    prefill_step_tokens: int | None = None
    decay_layer_offset: int | str | None = None
    speculate: int | str | None = None
    draft_model: str | None = None


@dataclass
class Loading(Message):
    """A model is being loaded; ``done`` of ``total`` parts, 0 of 0 if that is not known."""

    name: str
    done: int = 0
    total: int = 0


@dataclass
class Loaded(Message):
    """A model is ready.

    Args:
        name: What to call it.
        context: The most tokens it can hold.
        quantization: In words.
        memory_limit_bytes: What the machine should give it, 0 where that is not known.
        sampling: What holds where the settings say nothing.
        choice: What was loaded, if the engine says so.
    """

    name: str
    context: int
    quantization: str = ""
    memory_limit_bytes: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    choice: ModelChoice | None = None


@dataclass
class Reading(Message):
    """``done`` tokens of the prompt are read, ``reused`` ones included; ``eta_s`` is None until it is known."""

    number: int
    done: int
    total: int
    reused: int = 0
    eta_s: float | None = None


@dataclass
class Piece(Message):
    """New text of the thought and of the answer; the figures are those so far.

    ``revised`` is the whole thought if earlier pieces were wrong: drop the texts before this one.
    """

    number: int
    thinking_text: str
    answer_text: str
    figures: Figures
    revised: str | None = None


@dataclass
class Ended(Message):
    """The answer is over: "stop", "length" or "stopped" by the user; figures where they are final."""

    number: int
    reason: str
    figures: Figures | None = None


@dataclass
class Entitled(Message):
    """What the model calls a chat; not looked at yet."""

    chat_id: str
    text: str


@dataclass
class Failed(Message):
    """A question could not be answered, or with ``number`` None a model could not be loaded; one line."""

    text: str
    number: int | None = None


class Answering(Protocol):
    """The interface of an engine for screens; calls return at once where nothing else is said."""

    def start(self, post: Post) -> None:
        """Load the model; answers and failures go to ``post``, which must take them from any thread."""

    def ask(self, question: Question) -> None:
        """Answer a question; may be called before the model is loaded."""

    def stop(self) -> None:
        """End the running answer."""

    def switch(self, choice: ModelChoice) -> None:
        """Load another model in place of this one; `Loaded` or `Failed` says how it went."""

    def count_tokens(self, text: str) -> int | None:
        """The tokens of a text, or None while no model is loaded; does not return at once, so not for the screen's thread."""

    def refusal(self, messages: Messages) -> str:
        """Why messages take too much context or memory, or nothing; does not return at once either."""

    def close(self, timeout_s: float = 5.0) -> bool:
        """Free the model; returns whether the process may exit in the ordinary way."""


def sampling_as_dict(s: Sampling) -> dict[str, Any]:
    """For an answer's record."""
    return {name: value for name, value in vars(s).items() if value is not None}
