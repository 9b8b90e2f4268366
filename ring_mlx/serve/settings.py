"""The settings of a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ring_mlx.defaults import MAX_TOKENS
from ring_mlx.errors import OptionError
from ring_mlx.session_events import Sampling
from ring_mlx.thinking import Thinking


@dataclass(frozen=True)
class Settings:
    """Of the model's side.

    Args:
        model: Folder of a checkpoint, or ``owner/name`` on the hub.
        name: What clients call the model.
        revision, exact, decay_layer_offset, expert_cache_bytes, expert_policy, adapter_path: As for `ring_mlx.load`.
        sampling: Where a request says nothing else; what it leaves open is what the checkpoint says.
        max_tokens: Likewise.
        max_batch: Requests that are read or generate at once.
        max_reading: Of those, the most whose prompts are read, in turns; None is all.
        max_queue: Requests that wait beyond those; more are refused.
        prefill_step_tokens: Prompt tokens a step, between two tokens of the others.
        memory_budget_bytes: Most bytes of snapshots in memory, by default a quarter of what is left, at most 4 GiB.
        max_snapshots: At most so many of them there; None is any number.
        store: Folder for snapshots on disk; True is the system's, False none.
        store_budget_bytes: Most bytes there for this model.
        read_ahead: While nobody waits, read the start of the next turn.
        thinking: How answers start, and the room that a thought leaves.
        chat_template: In place of the checkpoint's.
        template_options: For the template, where a request says nothing else.
    """

    model: str | os.PathLike[str]
    name: str
    revision: str | None = None
    exact: bool = False
    decay_layer_offset: int | str | None = None
    expert_cache_bytes: int | None = None
    expert_policy: str | None = None
    adapter_path: str | os.PathLike[str] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = MAX_TOKENS
    max_batch: int = 8
    max_reading: int | None = None
    max_queue: int = 64
    prefill_step_tokens: int = 512
    memory_budget_bytes: int | None = None
    max_snapshots: int | None = None
    store: str | os.PathLike[str] | bool = True
    store_budget_bytes: int = 8 << 30
    read_ahead: bool = True
    thinking: Thinking = field(default_factory=Thinking)
    chat_template: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_reading", "max_queue", "prefill_step_tokens", "max_snapshots"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise OptionError(f"{name} {getattr(self, name)} is not positive; give 1 or more.")
