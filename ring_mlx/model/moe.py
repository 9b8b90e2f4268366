"""Feed-forward blocks: dense SwiGLU and the mixture of experts."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.core import array
from mlx_lm.models.activations import swiglu
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from metal_kernels import Experts as ExpertWeights
from metal_kernels import add_norm, add_qmv, launch, moe_kernel, norm_qmv, norm_router, route, routed_moe
from ring_mlx.model.config import RingConfig
from ring_mlx.model.kernel_weights import KernelExperts, KernelMatrices


class MLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``."""

    def __init__(self, config: RingConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.use_bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.use_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.use_bias)
        self._into, self._out_of = KernelMatrices(), KernelMatrices()

    def __call__(self, x: array) -> array:
        """[..., hidden] to [..., hidden]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    def after_norm(self, x: array, norm: nn.RMSNorm, dtype: mx.Dtype) -> array | None:
        """``x + self(norm(x))`` of a few tokens in three or four dispatches, or None where MLX's products shall do it."""
        into = None if launch.backend() is None else self._into(self.gate_proj, self.up_proj)
        read = norm_qmv(x, norm.weight, norm.eps, into, dtype)
        if read is None:
            return None
        inner = swiglu(*read)
        added = add_qmv(inner, self._out_of(self.down_proj), x)
        return x + self.down_proj(inner).astype(x.dtype) if added is None else added


class Router(nn.Module):
    """Scores experts with a float32 product, whatever the weight is stored in."""

    def __init__(self, config: RingConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        if config.moe_router_enable_expert_bias:
            self.expert_bias = mx.zeros((config.num_experts,), mx.float32)
        self._options = (
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            config.routed_scaling_factor,
            config.norm_topk_prob,
        )
        self._layers = KernelMatrices()

    def __call__(self, x: array) -> tuple[array, array]:
        """Indices [..., top_k] int32 and weights [..., top_k] float32 for x [..., hidden]; see `naive_route`."""
        return self.choose(self._logits(x.astype(mx.float32)))

    def choose(self, logits: array) -> tuple[array, array]:
        """The same for logits [..., num_experts] float32."""
        return route(logits, self.get("expert_bias"), *self._options)

    def choose_within(self, x: array, logits: array, experts: ExpertWeights, residual: array | None) -> array | None:
        """The output of one token's experts, which their own kernel chooses; None where the choice is made apart."""
        found = routed_moe(x, logits, self.get("expert_bias"), *self._options, experts, residual)
        return None if found is None else found[0]

    def score(self, x: array, r: array | None, norm: nn.RMSNorm, dtype: mx.Dtype) -> tuple[array, array, array]:
        """``x + r``, its norm, in ``dtype`` at least, and logits [..., num_experts] float32; r may be None."""
        matrix = None if launch.backend() is None else self._layers(self.gate_proj)
        found = None if matrix is None else norm_router(x, r, norm.weight, matrix.first, norm.eps, dtype)
        if found is not None:
            return found
        x, normed = add_norm(x, r, norm.weight, norm.eps)
        return x, normed, self._logits(normed.astype(mx.float32))

    def _logits(self, x: array) -> array:
        if isinstance(self.gate_proj, nn.Linear):
            return x @ self.gate_proj.weight.astype(mx.float32).T
        return self.gate_proj(x)


class ExpertLinear(SwitchLinear):
    """mlx-lm's stacked experts, also in half precision on MLX's CPU backend, which multiplies float32 only."""

    def __call__(self, x: array, indices: array, sorted_indices: bool = False) -> array:
        """x [..., 1, in] through the experts of ``indices`` [...], to [..., 1, out]."""
        if x.dtype == mx.float32 or mx.default_device() != mx.cpu:
            return super().__call__(x, indices, sorted_indices)
        weight = self.weight.astype(mx.float32).swapaxes(-1, -2)
        y = mx.gather_mm(x.astype(mx.float32), weight, rhs_indices=indices, sorted_indices=sorted_indices)
        if "bias" in self:
            y = y + self.bias[indices][..., None, :]
        return y.astype(x.dtype)


class Experts(SwitchGLU):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))`` of the chosen experts, sorted by expert for many tokens."""

    def __init__(self, config: RingConfig) -> None:
        hidden, inner, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
        super().__init__(hidden, inner, count, bias=config.use_bias)
        self.gate_proj = ExpertLinear(hidden, inner, count, bias=config.use_bias)
        self.up_proj = ExpertLinear(hidden, inner, count, bias=config.use_bias)
        self.down_proj = ExpertLinear(inner, hidden, count, bias=config.use_bias)


class MoE(nn.Module):
    """Routed experts, weighted and summed in float32, plus the shared expert unscaled.

    ::

        y = sum_i w_i expert_i(x) + shared_experts(x)
    """

    def __init__(self, config: RingConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.switch_mlp = Experts(config)
        self._packed = KernelExperts()
        if config.num_shared_experts:
            self.shared_experts = MLP(config, config.moe_shared_expert_intermediate_size * config.num_shared_experts)

    def __call__(
        self, x: array, dtype: mx.Dtype | None = None, residual: array | None = None, logits: array | None = None
    ) -> array:
        """Mix the experts for x [..., hidden], as exact as there is: the router reads it in float32.

        Args:
            dtype: What the experts compute in, that of x by default.
            residual: [..., hidden] to add to; None adds nothing.
            logits: From `Router.score`; None lets the router score x.

        Returns:
            [..., hidden] in the dtype of ``residual``, rounded once; float32 without one.
        """
        experts = None if launch.backend() is None else self.weights()
        if experts is not None and logits is not None and x.size == x.shape[-1]:
            found = self.gate.choose_within(x if dtype is None else x.astype(dtype), logits, experts, residual)
            if found is not None:
                return found
        chosen, weights = self.gate(x) if logits is None else self.gate.choose(logits)
        x = x if dtype is None else x.astype(dtype)
        kernel = None if experts is None else moe_kernel(experts, x)
        y = None if experts is None or kernel is None else kernel(x, chosen, weights, experts, residual)
        return self._by_products(x, chosen, weights, residual) if y is None else y

    def _by_products(self, x: array, chosen: array, weights: array, residual: array | None) -> array:
        """The same in MLX's products."""
        y = (self.switch_mlp(x, chosen).astype(mx.float32) * weights[..., None]).sum(axis=-2)
        if "shared_experts" in self:
            y = y + self.shared_experts(x).astype(mx.float32)
        return y if residual is None else (residual.astype(mx.float32) + y).astype(residual.dtype)

    def weights(self) -> ExpertWeights | None:
        """The weights in the form of the kernels, or None if there is none."""
        return self._packed(*self._modules())

    def bundle(self) -> None:
        """Put all experts' arrays into one buffer; see `bundle_experts`."""
        self._packed.bundle(*self._modules())

    def _modules(self) -> list[nn.Module]:
        parts = (self.switch_mlp, self.get("shared_experts"))
        return [m for mlp in parts if mlp is not None for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def bundle_experts(mlp: nn.Module) -> None:
    """Where kernels run, let them bind one array for all experts of a layer in place of up to twelve.

    Each array bound costs the host as much as a tenth of a launch (0.6 us, with an H200), at every token. The layer's arrays, which
    must be in memory, become parts of one buffer. Those that are read on demand stay.
    """
    if launch.backend() is not None and type(mlp) is MoE:
        mlp.bundle()
