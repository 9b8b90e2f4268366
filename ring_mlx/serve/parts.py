"""What the model's thread works with: model, snapshots, readers and the batch; makes them, uses none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ring_mlx.checkpoint.loading import load
from ring_mlx.checkpoint.tokenizer import use_template
from ring_mlx.engine.reading import Reader
from ring_mlx.engine.snapshots import SnapshotTree, Store
from ring_mlx.engine.snapshots.store import open_store
from ring_mlx.generation.batch import Batch
from ring_mlx.system import memory

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ring_mlx.model.model import Model
    from ring_mlx.serve.settings import Settings


class Parts:
    """Makes what `Work` needs. Whoever wants to know of all that the model is asked to do makes others.

    Args:
        model, tokenizer: From `ring_mlx.load`.
        settings: The server's.

    Raises:
        TokenizerError: If the settings have a chat template that cannot be used.
    """

    def __init__(self, model: Model, tokenizer: TokenizerWrapper, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        if settings.chat_template is not None:
            use_template(tokenizer, settings.chat_template, settings.template_options)

    @classmethod
    def load(cls, settings: Settings) -> Parts:
        """Load the model that the settings name.

        Raises:
            RingError: As `ring_mlx.load`.
        """
        return cls(*load(settings.model, **settings.loading), settings)

    def budget_bytes(self) -> int:
        """Most bytes of snapshots in memory."""
        given = self.settings.memory_budget_bytes
        return memory.snapshot_budget_bytes() if given is None else given

    def tree(self) -> SnapshotTree:
        """Snapshots in memory."""
        return SnapshotTree(self.budget_bytes(), self.settings.max_snapshots)

    def store(self) -> Store | None:
        """Snapshots on disk, in the folder that chats with this model use too."""
        return open_store(self.settings, self.model)

    def reader(self, tree: SnapshotTree, store: Store | None) -> Reader:
        """A cache of its own for one prompt after the other."""
        return Reader(self.model, tree, store, step_tokens=self.settings.prefill_step_tokens)

    def batch(self) -> Batch:
        """An empty batch."""
        return Batch(self.model, self.settings.prefill_step_tokens)
