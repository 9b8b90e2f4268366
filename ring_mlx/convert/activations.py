"""The matrices of a layer quantized in turn for what a text puts into them, each seeing those before it as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import swiglu

from metal_kernels import launch
from ring_mlx.convert.encoding import check_finite
from ring_mlx.convert.fit import dequantize, quantize
from ring_mlx.convert.plan import Output
from ring_mlx.convert.second_order import Inputs, prepare, solve
from ring_mlx.model.moe import MLP, MoE

# Numbers of Hessians, and weights, that are solved for together; some ten arrays of each are held.
HESSIAN_NUMBERS, SOLVED_WEIGHTS = 1 << 23, 1 << 23
# An expert that fewer tokens reach is fitted without them.
LEAST_TOKENS = 16
# Tokens of the whole text that count for each expert beside its own, so that no direction seems to be without inputs.
PRIOR_TOKENS = 32
CHUNK_TOKENS = 4096


class LayerQuantizer:
    """Quantizes the matrices of a layer, and keeps what they became.

    Attributes:
        packed: What was quantized, by path.
        unreached: Experts' matrices that were fitted without inputs, as too few tokens reached them.

    Args:
        outputs: How each parameter is to be stored, by its path from the layer on.
        fit: As of `fit.quantize`.
    """

    def __init__(self, outputs: Mapping[str, Output], fit: str) -> None:
        self._outputs, self._fit = outputs, fit
        self.packed: dict[str, dict[str, mx.array]] = {}
        self.unreached = 0

    def layer(self, layer: nn.Module, states: Sequence[mx.array], lengths: Sequence[Sequence[int]]) -> None:
        """All of a layer, for the residual stream [B, T, hidden] of each batch, of which so many tokens of each row count."""

        def tokens(batch: int, x: mx.array) -> mx.array:
            found = mx.concatenate([x[row, :n] for row, n in enumerate(lengths[batch])])
            mx.eval(found)
            return found

        attention, mask, dtype = (
            layer.attention,
            None if layer.is_linear else "causal",
            layer.input_layernorm.weight.dtype,
        )
        names = ("query_key_value", "g_proj") if layer.is_linear else ("query_key_value",)
        with launch.use(None):  # kernels would not call the modules
            x = [tokens(i, layer.input_layernorm(s).astype(dtype)) for i, s in enumerate(states)]
            self.matrices({f"attention.{n}": attention[n] for n in names}, hessian(x))
            attention.dense = recorder = _Recorder(attention.dense)
            for s in states:
                mx.eval(attention(s, layer.input_layernorm, mask, None, 0))
            attention.dense = recorder.module
            self.matrices({"attention.dense": attention.dense}, hessian([tokens(*o) for o in enumerate(recorder.seen)]))
            after = []
            for i, s in enumerate(states):
                after.append(tokens(i, layer.post_attention_layernorm(s + attention.dense(recorder.seen[i]))))
            del recorder
            every = mx.concatenate(after)
            if not isinstance(layer.mlp, MoE):
                self.feed_forward("mlp", layer.mlp, every.astype(dtype))
                return
            chosen, weights = layer.mlp.gate(every)
            read = every.astype(dtype)
            if "shared_experts" in layer.mlp:
                self.feed_forward("mlp.shared_experts", layer.mlp.shared_experts, read)
            self.experts("mlp.switch_mlp", layer.mlp.switch_mlp, read, chosen, weights)

    def matrices(self, modules: Mapping[str, nn.Module], h: mx.array) -> None:
        """Matrices that have an input with this H [K, K] in common; their weights become what is stored."""
        inputs: dict[int, Inputs | None] = {}
        for path, module in modules.items():
            setting = self._outputs[path].setting
            if setting is None or self._outputs[path].copied:
                continue
            if setting.group_size not in inputs:
                inputs[setting.group_size] = prepare(h[None], setting.group_size)
            rows, cols = module.weight.shape
            step = max(1, SOLVED_WEIGHTS // cols)
            blocks = (module.weight[None, at : at + step] for at in range(0, rows, step))
            self._store(path, module, [self._solved(path, w, inputs[setting.group_size]) for w in blocks])

    def feed_forward(self, path: str, mlp: MLP, x: mx.array) -> None:
        """A dense block, for tokens x [n, hidden]."""
        self.matrices({f"{path}.{n}": mlp[n] for n in ("gate_proj", "up_proj")}, hessian([x]))
        inner = (_inner(mlp.gate_proj.weight, mlp.up_proj.weight, part) for part in _chunks(x))
        self.matrices({f"{path}.down_proj": mlp.down_proj}, hessian(inner))

    def experts(self, path: str, experts: nn.Module, x: mx.array, chosen: mx.array, weights: mx.array) -> None:
        """Stacks of experts, for tokens x [n, hidden], of which each goes to ``chosen`` [n, k] with ``weights`` [n, k].

        An expert's inputs count by the square of their weights, as the errors that they cause.
        """
        routed = _Routed(x, chosen, weights, experts.gate_proj.weight.shape[0])
        every = hessian([x]) / max(1, x.shape[0])

        def for_input(e: int) -> mx.array:
            tokens, share = routed.tokens(e)
            return hessian([tokens], [share]) + PRIOR_TOKENS * mx.square(share).mean() * every

        def for_inner(e: int) -> mx.array:
            tokens, share = routed.tokens(e)
            return hessian([_inner(experts.gate_proj.weight[e], experts.up_proj.weight[e], tokens)], [share])

        self._stacks({f"{path}.{n}": experts[n] for n in ("gate_proj", "up_proj")}, for_input, routed.counts)
        self._stacks({f"{path}.down_proj": experts.down_proj}, for_inner, routed.counts)

    def _stacks(self, modules: Mapping[str, nn.Module], h_of: Callable[[int], mx.array], counts: Sequence[int]) -> None:
        """Stacks [experts, R, K] whose experts have inputs in common, some experts at a time."""
        todo = {
            p: m for p, m in modules.items() if self._outputs[p].setting is not None and not self._outputs[p].copied
        }
        if not todo:
            return
        _, rows, cols = next(iter(todo.values())).weight.shape
        step = matrices_together(rows, cols)
        reached = [n >= LEAST_TOKENS for n in counts]
        parts: dict[str, list[dict[str, mx.array]]] = {path: [] for path in todo}
        for start, stop in _runs(reached, step):
            inputs: dict[int, Inputs | None] = {}
            if reached[start]:
                hs = []
                for e in range(start, stop):
                    hs.append(h_of(e))
                    mx.eval(hs[-1])
                groups = {s.group_size for p in todo if (s := self._outputs[p].setting)}
                inputs = {group: prepare(mx.stack(hs), group) for group in groups}
            else:
                self.unreached += (stop - start) * len(todo)
            for path, module in todo.items():
                setting = self._outputs[path].setting
                found = inputs.get(setting.group_size if setting else 0)
                parts[path].append(self._solved(path, module.weight[start:stop], found))
        for path, module in todo.items():
            self._store(path, module, parts[path])

    def _solved(self, path: str, w: mx.array, inputs: Inputs | None) -> dict[str, mx.array]:
        """Of w [E, R, K]; without usable inputs it is the fit."""
        output = self._outputs[path]
        assert output.setting is not None
        check_finite(output, [w])
        if inputs is None:
            found = quantize(w.reshape(-1, w.shape[-1]), output.setting, output.dtype, self._fit)
        else:
            found = solve(w, inputs, output.setting, output.dtype, self._fit)
        check_finite(output, [], found.values())
        mx.eval(found)
        return found

    def _store(self, path: str, module: nn.Module, parts: Sequence[dict[str, mx.array]]) -> None:
        setting, shape, dtype = self._outputs[path].setting, module.weight.shape, module.weight.dtype
        assert setting is not None
        floats = []
        for part in parts:
            floats.append(dequantize(part, setting).astype(dtype))
            mx.eval(floats[-1])
        module.weight = mx.concatenate(floats).reshape(shape)
        self.packed[path] = {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}
        mx.eval(module.weight, self.packed[path])


class _Recorder(nn.Module):
    """A module whose inputs are kept."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.seen: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.seen.append(x)
        return x


class _Routed:
    """Tokens x [n, hidden] by the experts that they go to."""

    def __init__(self, x: mx.array, chosen: mx.array, weights: mx.array, count: int) -> None:
        to = np.array(chosen).reshape(-1)
        order = np.argsort(to, kind="stable")
        self._x, self._starts = x, np.searchsorted(to[order], np.arange(count + 1))
        self._token = (order // chosen.shape[-1]).astype(np.int32)
        self._share = np.array(weights.astype(mx.float32)).reshape(-1)[order]
        self.counts = np.diff(self._starts).tolist()

    def tokens(self, e: int) -> tuple[mx.array, mx.array]:
        """Those of an expert [m, hidden], and their weights [m]."""
        at = slice(self._starts[e], self._starts[e + 1])
        return self._x[mx.array(self._token[at])], mx.array(self._share[at])


def matrices_together(rows: int, cols: int) -> int:
    """How many of a stack are solved for together."""
    return max(1, min(HESSIAN_NUMBERS // cols**2, SOLVED_WEIGHTS // (rows * cols)))


def hessian(x: Iterable[mx.array], weights: Sequence[mx.array] | None = None) -> mx.array:
    """``sum_n c_n^2 x_n x_n^T`` [K, K] float32 of batches [n, K] with weights c [n], 1 without."""
    total = None
    for i, batch in enumerate(x):
        shares = None if weights is None else weights[i]
        for at in range(0, batch.shape[0], CHUNK_TOKENS):
            rows = batch[at : at + CHUNK_TOKENS].astype(mx.float32)
            if shares is not None:
                rows = rows * shares[at : at + CHUNK_TOKENS, None]
            total = rows.T @ rows if total is None else total + rows.T @ rows
            mx.eval(total)
    assert total is not None
    return total


def _chunks(x: mx.array) -> Iterator[mx.array]:
    for at in range(0, x.shape[0], CHUNK_TOKENS):
        yield x[at : at + CHUNK_TOKENS]


def _inner(gate: mx.array, up: mx.array, x: mx.array) -> mx.array:
    """What the down projection gets."""
    return swiglu(x @ gate.T, x @ up.T)


def _runs(flags: Sequence[bool], most: int) -> Iterator[tuple[int, int]]:
    """Runs of equal flags, at most so long."""
    start = 0
    for i in range(1, len(flags) + 1):
        if i == len(flags) or flags[i] != flags[start] or i - start == most:
            yield start, i
            start = i
