"""One sequence of a batch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import mlx.core as mx

from ring_mlx.generation.decoding import Picker
from ring_mlx.generation.draft_sources import DraftSource
from ring_mlx.generation.drafts import Counts
from ring_mlx.generation.speculation import Speculation
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.model import Model


@dataclass(eq=False)
class Row:
    """One sequence. ``cache`` is None once it is merged with those of others."""

    number: int
    cache: HybridCache | None
    unread: list[int]
    picker: Picker
    left: int | None
    logits: mx.array | None
    drafts: DraftSource | None
    text: list[int]  # so far, where there are drafts
    counts: Counts = field(default_factory=Counts)
    speculation: Speculation | None = None

    def pick(self) -> None:
        """Pick the next token, unless it is."""
        if self.picker.picked is None:
            assert self.logits is not None
            self.picker.picked = self.picker.pick(self.logits)

    def choose(self) -> mx.array:
        """Take the next token [1]."""
        self.pick()
        self.picker.ask()
        y = self.picker.give().y
        self.picker.add(y)
        return y

    def settle(self) -> None:
        """Let the cache have what was given, neither more nor less."""
        if self.speculation is not None:
            self.speculation.close()
            self.speculation = None

    def speculate(self, model: Model) -> int:
        """The next token of a lone row, of which several may be read at once."""
        if self.speculation is None:
            assert self.drafts is not None
            self.pick()
            self.logits = None
            drafter, most = self.drafts.drafter(self.text), sys.maxsize if self.left is None else self.left
            self.speculation = Speculation(model, self.cache, drafter, self.drafts.pace, self.picker, most, self.counts)
        token, _ = next(self.speculation)
        self.text.append(token)
        self.left = None if self.left is None else self.left - 1
        return token
