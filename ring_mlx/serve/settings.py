"""The settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ring_mlx.engine.events import Sampling, SessionOptions


@dataclass(frozen=True, kw_only=True)
class Settings(SessionOptions):
    """Of the model's side, besides `SessionOptions`.

    Args:
        name: What clients call the model.
        sampling: Used where a request gives no value; its own missing values are the checkpoint's.
        max_batch, max_reading: See `SessionOptions`.
        max_queue: Requests that wait beyond those; more are refused.
        prefill_step_tokens: Prompt tokens a step, between two tokens of the others.
    """

    name: str = field(kw_only=False)
    sampling: Sampling = field(default_factory=Sampling)
    max_batch: int = 8
    max_reading: int | None = None
    max_queue: int = 64
    prefill_step_tokens: int | None = 512

    is_shared: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = (*SessionOptions.positive, "max_queue")
