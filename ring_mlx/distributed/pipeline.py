"""Pipeline parallelism: each rank holds some layer groups, whole.

Every rank makes the same calls: the first embeds, each hands the residual stream on, and all get the last one's, so
that each can go through norm and head. What a call sends and gathers is started before it returns, so calls meet in
the same order everywhere. A rank waits on the host for what it receives: a GPU that waits is ended by its watchdog.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ring_mlx.distributed.failure import DistributedError
from ring_mlx.distributed.tensor import adopt
from ring_mlx.model.config import RingConfig
from ring_mlx.model.model import LanguageModel, Model

# Rows of the embedding on ranks that need none: enough for the check of kernels.
FEW_TOKENS = 16


def stages(config: RingConfig, size: int) -> list[tuple[int, int]]:
    """First and one past the last layer of each rank: whole layer groups; the tail counts as one.

    Raises DistributedError if there are fewer groups than ranks.
    """
    length, layers = config.layer_group_size, config.num_hidden_layers
    starts = [*range(0, layers, length), layers]
    count = len(starts) - 1
    if count < size:
        raise DistributedError(
            f"{count} layer group{'s' * (count > 1)} cannot be shared out whole among the {size} ranks of a "
            f"pipeline; use {f'at most {count} ranks' if count > 1 else '--distributed tensor'}."
        )
    # The later ranks take what is left over: the first holds the embedding too.
    return [(starts[count * rank // size], starts[count * (rank + 1) // size]) for rank in range(size)]


def check(model: Model, size: int) -> RingConfig:
    """The configuration of the rank with the most layers; raises as `stages`."""
    return replace(model.config, num_hidden_layers=max(end - first for first, end in stages(model.config, size)))


def cut(model: Model, group: mx.distributed.Group) -> None:
    """Leave this rank's layers, and the embedding where it is needed; nothing is computed."""
    model.model.layers = model.layers[slice(*stages(model.config, group.size())[group.rank()])]
    if group.rank() and not model.config.tie_word_embeddings:
        model.model.word_embeddings = nn.Embedding(FEW_TOKENS, model.config.hidden_size)


class Stage(LanguageModel):
    """A cut model that exchanges the residual stream with its neighbours."""

    def before_norm(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        hidden_states: list[mx.array] | None = None,
        exact: bool = False,
        last_only: bool = False,
    ) -> mx.array:
        """Same contract as of `LanguageModel`, but for hidden states, which no rank has all of."""
        if hidden_states is not None:
            raise DistributedError(
                "a pipeline cannot give all hidden states; load with mode 'tensor' or on one machine."
            )
        group, dtype = self._group, mx.float32 if exact else self.norm.weight.dtype
        rank, is_last = group.rank(), group.rank() == group.size() - 1
        if rank == 0:
            x = self.embedded(tokens, exact)
        else:
            x = mx.distributed.recv((*tokens.shape, self.norm.weight.shape[0]), dtype, rank - 1, group=group)
            mx.eval(x)
        x = self._through(x, cache, None, last_only and is_last)
        if not is_last:
            x = mx.distributed.send(x, rank + 1, group=group)
        x = mx.distributed.all_gather(x[:, -1:] if last_only else x, group=group)[-x.shape[0] :]
        mx.async_eval(x)
        return x


def connect(model: LanguageModel, group: mx.distributed.Group) -> LanguageModel:
    """A cut model as a stage among the others."""
    stage: LanguageModel = adopt(Stage, model, group)
    return stage
