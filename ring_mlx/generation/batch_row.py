"""One sequence of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from ring_mlx.generation.draft_sources import DraftSource
from ring_mlx.generation.drafts import Drafter
from ring_mlx.generation.speculation import Drafted, held
from ring_mlx.model.cache import HybridCache


@dataclass(eq=False, kw_only=True)
class Row(Drafted):
    """One sequence. ``cache`` is None once it is merged with those of others."""

    number: int
    cache: HybridCache | None
    unread: list[int]
    logits: mx.array | None
    drafts: DraftSource | None = None
    text: list[int] = field(default_factory=list)  # so far, for a drafter that is still to be made
    own: Drafter | None = None  # that of ``drafts``

    def pick(self) -> None:
        """Pick the next token, unless it is."""
        if self.picker.picked is None:
            assert self.logits is not None
            self.picker.picked = self.picker.pick(self.logits)

    def choose(self) -> mx.array:
        """Take the next token [1]."""
        self.pick()
        y = self.picker.ask().y
        self.give(None)
        self.picker.add(y)
        return y

    def begin_drafting(self) -> None:
        """Let the next tokens be drafted, from a token that is picked."""
        self.pick()
        self.logits = None
        if self.own is None and self.drafts is not None:
            self.own, self.text = self.drafts.drafter(self.text), []
            self.drafter = held(self.own, self.picker)

    def came(self, token: int) -> None:
        """Take a token that was not drafted."""
        if self.drafter is not None:
            self.drafter.add(token)
        elif self.drafts is not None:
            self.text.append(token)

    def leave(self) -> None:
        """Give the drafter back."""
        if self.own is not None and self.drafts is not None:
            self.drafts.take_back(self.own)
            self.own = self.drafter = None
