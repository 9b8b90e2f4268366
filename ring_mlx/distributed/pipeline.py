"""One rank's group of layers in a pipeline.

Every rank makes the same calls: the first embeds, each hands the residual stream on, and all get the last one's, so
that each can go through norm and head. What a call sends and gathers is started before it returns, so calls meet in
the same order everywhere. A rank waits on the host for what it receives: a GPU that waits is ended by its watchdog.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ring_mlx.distributed.failure import DistributedError
from ring_mlx.distributed.ranks import Ranks
from ring_mlx.model.config import RingConfig
from ring_mlx.model.model import LanguageModel


class Line(Ranks):
    """The ranks one behind the other.

    Args:
        group: The ranks, in the order of the layers.
    """

    def __init__(self, group: mx.distributed.Group) -> None:
        super().__init__(group)
        self.is_first, self.is_last = self.rank == 0, self.rank == self.size - 1

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """What the rank before has sent; noise within `alone`."""
        if self._group is None:
            return mx.random.normal(shape, key=mx.random.key(shape[1])).astype(dtype)
        x = mx.distributed.recv(shape, dtype, self.rank - 1, group=self._group)
        mx.eval(x)
        return x

    def send(self, x: mx.array) -> mx.array:
        """Hand x to the next rank; x again, to be evaluated."""
        return x if self._group is None else mx.distributed.send(x, self.rank + 1, group=self._group)

    def of_last(self, x: mx.array) -> mx.array:
        """The last rank's x, which has the same shape [B, ...] everywhere."""
        return x if self._group is None else mx.distributed.all_gather(x, group=self._group)[-x.shape[0] :]


class Stage(LanguageModel):
    """Whole layer groups of a model; the embedding only where it is needed.

    Args:
        config: Of the whole model.
        layers: The first and one past the last.
        line: The ranks.
    """

    def __init__(self, config: RingConfig, layers: tuple[int, int], line: Line) -> None:
        super().__init__(config)
        self.layers = self.layers[slice(*layers)]
        self._line, self._hidden_size = line, config.hidden_size
        if not (line.is_first or config.tie_word_embeddings):
            del self.word_embeddings

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        hidden_states: list[mx.array] | None = None,
        exact: bool = False,
        last_only: bool = False,
    ) -> mx.array:
        """Same contract as `LanguageModel`, but for the residual stream between layers, which no rank has whole.

        Raises:
            DistributedError: If hidden states are asked for.
        """
        if hidden_states is not None:
            raise DistributedError(
                "a pipeline cannot give all hidden states; load with mode 'tensor' or on one machine."
            )
        line, dtype = self._line, mx.float32 if exact else self.norm.weight.dtype
        if line.is_first:
            x = self.word_embeddings(tokens).astype(dtype)
        else:
            x = line.receive((*tokens.shape, self._hidden_size), dtype)
        x = self._through(x, cache, None, last_only and line.is_last)
        if not line.is_last:
            x = line.send(x)
        x = line.of_last(x[:, -1:] if last_only else x)
        mx.async_eval(x)
        return self.norm(x)
