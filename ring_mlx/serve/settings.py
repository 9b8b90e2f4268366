"""The settings of a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ring_mlx.engine.events import ModelOptions, Sampling
from ring_mlx.errors import OptionError
from ring_mlx.generation.defaults import MAX_TOKENS


@dataclass(frozen=True)
class Settings(ModelOptions):
    """Of the model's side, besides `ModelOptions`.

    Args:
        name: What clients call the model.
        sampling: Where a request says nothing else; what it leaves open is what the checkpoint says.
        max_tokens: Likewise.
        max_batch: Requests that are read or generate at once.
        max_reading: Of those, the most whose prompts are read, in turns; None is all.
        max_queue: Requests that wait beyond those; more are refused.
        prefill_step_tokens: Prompt tokens a step, between two tokens of the others.
        max_snapshots: At most so many snapshots in memory; None is any number.
        chat_template: In place of the checkpoint's.
        template_options: For the template, where a request says nothing else.
    """

    name: str
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = MAX_TOKENS
    max_batch: int = 8
    max_reading: int | None = None
    max_queue: int = 64
    prefill_step_tokens: int = 512
    max_snapshots: int | None = None
    chat_template: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_reading", "max_queue", "prefill_step_tokens", "max_snapshots"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise OptionError(f"{name} {getattr(self, name)} is not positive; give 1 or more.")
