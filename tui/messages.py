"""What the screen asks of an engine, and what the engine tells it as typed messages; knows no widget and no model.

``number`` is the question's, so that what is left over from an abandoned answer can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from textual.message import Message


@dataclass(frozen=True)
class Figures:
    """Speed and size of an answer so far; memory is the peak in GB (1e9 bytes)."""

    prompt_tps: float
    generation_tps: float
    time_to_first_token_s: float
    context_tokens: int
    peak_memory: float


@dataclass
class Loaded(Message):
    """The model is ready; ``context`` is the most tokens it can hold."""

    name: str
    context: int


@dataclass
class Reading(Message):
    """So many tokens of the prompt have been read."""

    number: int
    done: int
    total: int


@dataclass
class Piece(Message):
    """New text of the thought and of the answer; the thought's size and the figures are those so far."""

    number: int
    thinking_text: str
    answer_text: str
    thinking_tokens: int
    thinking_s: float
    figures: Figures


@dataclass
class Ended(Message):
    """The answer is over: "stop", "length" or "stopped" by the user."""

    number: int
    reason: str


@dataclass
class Failed(Message):
    """A question could not be answered, or with ``number`` None the model could not be loaded; one line."""

    text: str
    number: int | None = None


class Answering(Protocol):
    """What the screen asks of an engine."""

    def start(self, post: Callable[[Message], object]) -> None:
        """Load the model; answers and failures go to ``post``."""

    def ask(self, number: int, conversation: Sequence[dict[str, str]]) -> None:
        """Answer a conversation."""

    def stop(self) -> None:
        """End the running answer."""
