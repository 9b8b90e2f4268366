"""Our model as a module of ``mlx_lm.models``: the names and methods that its loader looks for.

It uses mlx-lm's own caches, single and batched, so whatever saves, copies, merges or filters them there works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

import ring_mlx.model.model
from metal_kernels import launch
from ring_mlx.checkpoint import weights
from ring_mlx.model.config import RingConfig
from ring_mlx.model.quantization import loadable_settings, with_settings
from ring_mlx.tuning.autotune import later, settle
from ring_mlx.tuning.kernel_check import check_kernels

# What mlx-lm's commands put into a config on their way to the model.
ADDED_BY_MLX_LM = ("quantize_activations",)


class ModelArgs(RingConfig):
    """The checked configuration under the name that mlx-lm looks for."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RingConfig:
        """Same contract as `RingConfig.from_dict`; a WeightsError if weights are packed otherwise than MLX's."""
        if isinstance(raw, dict):
            raw |= with_settings(raw)  # mlx-lm looks there next
        loadable_settings(raw)
        return super().from_dict({k: v for k, v in raw.items() if k not in ADDED_BY_MLX_LM})


class Model(ring_mlx.model.model.Model):
    """`ring_mlx.model.model.Model` with what mlx-lm's loader, converter and quantizers ask of a model."""

    def __init__(self, args: RingConfig) -> None:
        super().__init__(args)
        self.args = args
        self._is_checked = False

    def __call__(self, tokens: mx.array, cache: Sequence[Any] | None = None, **options: Any) -> mx.array:
        """Same contract as `ring_mlx.model.model.Model`.

        The first call that would run kernels tests them first, as our own loader does.
        """
        if cache is not None:
            _drop_spent_padding(cache)
        if not self._is_checked and not self.training and launch.backend() is not None:
            self._is_checked = True
            check_kernels(self)
            with later():  # mlx-lm's own call waits
                settle(self)
        return super().__call__(tokens, cache, **options)

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> Any:
        """Same contract as `mlx.nn.Module.load_weights`; if ``strict``, `weights.check` comes first."""
        if strict and isinstance(file_or_weights, list):
            weights.check(self, dict(file_or_weights), "the checkpoint")
        return super().load_weights(file_or_weights, strict=strict)

    def sanitize(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Arrays of either form of checkpoint under the model's parameter names, as `weights.canonical`.

        Experts are stacked. Router and expert bias become float32, and on MLX's CPU backend, which emulates half
        precision, everything.
        """
        entries = weights.canonical(cast(Any, arrays), self.config)
        widened = weights.FLOAT32 if mx.default_device() == mx.gpu else ("",)
        found = dict(weights.stacked(entries, self.config.num_experts, lambda array: array))
        for name, array in found.items():
            if mx.issubdtype(array.dtype, mx.floating) and name.endswith(widened):
                found[name] = array.astype(mx.float32)
        return found

    @property
    def quant_predicate(self) -> Callable[[str, Any], bool]:
        """Which modules ``mlx_lm.convert`` and ``mlx_lm.dwq`` quantize: all but the router, as `ring_mlx.convert`."""
        return lambda path, _: not f"{path}.weight".endswith(weights.FLOAT32)

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Which parameters ``mlx_lm.convert`` may cast: all but the router and its bias."""
        return lambda name: not name.endswith(weights.FLOAT32)


def _drop_spent_padding(cache: Sequence[Any]) -> None:
    """Remove left padding that has been read, or never was any.

    mlx-lm keeps a padding of zeros from merged empty caches, and with it no token takes the compiled step. Its one read
    here waits for the device, once for each prompt that joins.
    """
    linear = [c for c in cache if isinstance(c, ArraysCache) and c[0] is not None]
    if linear and linear[0].left_padding is not None and linear[0].left_padding.max().item() <= 0:
        for c in linear:
            c.left_padding = None
