"""config.json as a checked, frozen record."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ring_mlx.errors import ConfigError, OptionError
from ring_mlx.model.config_values import (
    DECAY_KEY,
    check_decay_offset,
    check_integers,
    is_count,
    is_decay_offset,
    is_number,
    no_decay_offset,
    shown,
)
from ring_mlx.model.quantization import with_settings
from ring_mlx.model.rope_scaling import fill_partial_rotary, one_spelling, rope_scaling
from ring_mlx.system.regular_files import read_json

LINEAR_TYPES = ("bailing_moe_linear",)
SOFTMAX_TYPES = ("bailing_moe_v2", "bailing_moe")

# Keys that say nothing about the forward pass of a finished checkpoint.
HARMLESS = frozenset(
    [
        *("_name_or_path", "architectures", "auto_map", "problem_type", "tokenizer_class", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "id2label", "label2id"),
        *("attention_dropout", "embedding_dropout", "output_dropout", "finetuning_task", "initializer_range"),
        *("mtp_loss_scaling_factor", "num_nextn_predict_layers", "pretraining_tp", "router_aux_loss_coef"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache"),
        *("dtype", "torch_dtype", "router_dtype", "quantization", "quantization_config"),
        *("rope_parameters", "rotary_dim", "max_window_layers", "sliding_window", "seq_length"),
        *("add_cross_attention", "chunk_size_feed_forward", "moe_router_topk_scaling_factor"),
    ]
)

# Keys that change the forward pass, with the only values this model has.
ONLY = {
    "hidden_act": ("silu",),
    "linear_silu": (False,),
    "moe_router_enable_routed_scaling": (True,),
    "moe_router_enable_shared_expert": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "score_function": ("sigmoid",),
    "use_rmsnorm": (True,),
    "use_sliding_window": (False,),
}

POSITIVE = [
    *("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "rms_norm_eps", "rope_theta", "vocab_size", "head_dim"),
    *("layer_group_size", "group_norm_size"),
]
# Where there are experts.
POSITIVE_EXPERTS = ["num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"]
MOST_NAMED = 20

_warned: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class RingConfig:
    """What the forward pass needs; every field keeps its config.json name.

    Fields without a default must stand in the file. ``layer_group_size`` and ``group_norm_size`` are needed by
    ``bailing_moe_linear`` only; its softmax siblings have a group size of 1, which makes every layer softmax.
    ``group_norm_size`` is the number of groups, as in the checkpoints.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    partial_rotary_factor: float
    use_qk_norm: bool
    score_function: str
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    moe_intermediate_size: int
    moe_router_enable_expert_bias: bool
    first_k_dense_replace: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    layer_group_size: int
    group_norm_size: int
    head_dim: int
    moe_shared_expert_intermediate_size: int
    rope_scaling: Mapping[str, Any] | None = None
    decay_layer_offset: int | str = 0
    tie_word_embeddings: bool = False
    use_bias: bool = False
    use_qkv_bias: bool = False

    @property
    def context_tokens(self) -> int:
        """The most tokens of a prompt and its answer: ``max_position_embeddings``, or what YaRN lengthens it to."""
        most, scaling = self.max_position_embeddings, self.rope_scaling or {}
        return max(most, round(scaling.get("factor", 0) * scaling.get("original_max_position_embeddings", 0)))

    @property
    def rope_dims(self) -> int:
        """How many leading dimensions of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def is_linear(self, layer: int) -> bool:
        """Whether ``layer`` (0-based) is a lightning attention layer; the last of each group and the tail are not."""
        whole = self.num_hidden_layers // self.layer_group_size * self.layer_group_size
        return layer < whole and (layer + 1) % self.layer_group_size != 0

    @property
    def has_linear(self) -> bool:
        """Whether any layer is a lightning attention layer, and so has a decay."""
        return any(self.is_linear(i) for i in range(self.num_hidden_layers))

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` (0-based) has experts."""
        return self.num_experts > 0 and layer >= self.first_k_dense_replace

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RingConfig:
        """Check the content of a config.json and keep what the model needs; warns of unknown keys once a process.

        Raises ConfigError if a needed key is missing (named), a value is unsupported or of the wrong kind (named with
        the value), or values contradict each other.
        """
        _check_model_type(raw)
        check_integers(raw, [*(f.name for f in fields(cls)), "rotary_dim"])
        values = _filled_in(raw)
        missing = [f.name for f in fields(cls) if values.get(f.name) is None and f.default is MISSING]
        if missing:
            raise ConfigError(
                f"config.json lacks {', '.join(missing)}, which the model needs; take the file from the original "
                "checkpoint."
            )
        for key, allowed in ONLY.items():
            if raw.get(key) is not None and raw[key] not in allowed:
                raise ConfigError(
                    f"{key} {shown(raw[key])} is not supported, only {shown(allowed[0])}; "
                    "this is not a Ring-linear 2.0 checkpoint or sibling."
                )
        known = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}
        _check_kinds(known)
        config = cls(**known)
        _check_values(config)
        _warn_unknown(raw)
        return config


def read_config(
    folder: str | os.PathLike[str], decay_layer_offset: int | str | None = None
) -> tuple[RingConfig, dict[str, Any]]:
    """Read and check ``folder/config.json``; also returns the raw file, with eos ids and quantization.

    ``decay_layer_offset`` takes the place of the file's; None leaves it. Raises ConfigError as `RingConfig.from_dict`, or
    if the file is missing or not JSON; OptionError as `with_decay_offset`.
    """
    raw = with_decay_offset(with_settings(read_json(Path(folder) / "config.json")), decay_layer_offset)
    return RingConfig.from_dict(raw), raw


def with_decay_offset(raw: dict[str, Any], offset: int | str | None) -> dict[str, Any]:
    """The content of a config.json with another ``decay_layer_offset``; None changes nothing.

    Raises OptionError if it is not in DECAY_OFFSETS, or the model has no decay.
    """
    if offset is None:
        return raw
    check_decay_offset(offset)
    if raw.get("model_type") in SOFTMAX_TYPES:
        raise OptionError(
            f"{DECAY_KEY} {shown(offset)} is for models with linear layers, and {raw['model_type']!r} has none; leave it "
            "out."
        )
    return raw | {DECAY_KEY: offset}


def _check_model_type(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type")
    if model_type is None:
        raise ConfigError("config.json lacks model_type, which the model needs; is this a checkpoint's config.json?")
    if model_type not in LINEAR_TYPES + SOFTMAX_TYPES:
        raise ConfigError(
            f"model_type {shown(model_type)} is not supported, only {', '.join(LINEAR_TYPES + SOFTMAX_TYPES)}; "
            "use mlx-lm for other models."
        )
    if model_type == "bailing_moe" and "n_group" not in raw:
        raise ConfigError(
            "model_type 'bailing_moe' without n_group is Ling 1.x, which is not supported; use a 2.0 checkpoint "
            "or mlx-lm."
        )


def _filled_in(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The raw values, with those that the format defines through others."""
    values = dict(raw)
    one_spelling(values)
    if values["model_type"] in SOFTMAX_TYPES:
        values["layer_group_size"] = values["group_norm_size"] = 1
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if values.get("head_dim") is None and is_count(heads) and is_count(hidden):
        values["head_dim"] = hidden // heads
    if values.get("moe_shared_expert_intermediate_size") is None:
        values["moe_shared_expert_intermediate_size"] = values.get("moe_intermediate_size")
    fill_partial_rotary(values)
    for key in ("num_experts", "num_shared_experts"):
        if key in values and values[key] is None:
            values[key] = 0
    values["rope_scaling"] = rope_scaling(values)
    return values


def _check_kinds(known: Mapping[str, Any]) -> None:
    offset = known.get(DECAY_KEY, 0)
    if not is_decay_offset(offset):
        raise ConfigError(f"{no_decay_offset(offset)}; correct config.json.")
    for f in fields(RingConfig):
        if f.name not in known or f.name in ("rope_scaling", DECAY_KEY):
            continue
        value, kind = known[f.name], str(f.type)
        if not (is_number(value) if kind == "float" else type(value).__name__ == kind):
            raise ConfigError(f"{f.name} {shown(value)} is not of type {kind}; correct config.json.")


def _check_values(c: RingConfig) -> None:
    positive = [*POSITIVE, *(POSITIVE_EXPERTS if c.num_experts else ())]
    if c.num_experts and c.num_shared_experts:
        positive.append("moe_shared_expert_intermediate_size")
    for name in positive:
        if getattr(c, name) <= 0:
            raise ConfigError(f"{name} {getattr(c, name)} is not positive; correct config.json.")
    for name in ("num_experts", "num_shared_experts", "first_k_dense_replace"):
        if getattr(c, name) < 0:
            raise ConfigError(f"{name} {getattr(c, name)} is negative; correct config.json.")
    if not 0 < c.partial_rotary_factor <= 1 or c.rope_dims % 2 or not c.rope_dims:
        raise ConfigError(
            f"partial_rotary_factor {c.partial_rotary_factor} of head_dim {c.head_dim} does not give an even number "
            "of rotated dimensions; correct config.json."
        )
    if c.rope_scaling and c.rope_scaling["type"] == "yarn" and c.rope_theta <= 1:
        raise ConfigError(f"rope_theta {c.rope_theta} is not above 1, which yarn needs; correct config.json.")
    _divides(c, "num_key_value_heads", "num_attention_heads", c.num_attention_heads)
    if c.has_linear:
        _divides(c, "group_norm_size", "num_attention_heads x head_dim", c.num_attention_heads * c.head_dim)
    if c.num_experts:
        _divides(c, "n_group", "num_experts", c.num_experts)
        available = c.num_experts // c.n_group * min(c.topk_group, c.n_group)
        if c.topk_group > c.n_group or c.num_experts_per_tok > available:
            raise ConfigError(
                f"num_experts_per_tok {c.num_experts_per_tok} cannot be chosen from topk_group {c.topk_group} of "
                f"n_group {c.n_group} groups over num_experts {c.num_experts}; correct config.json."
            )


def _divides(c: RingConfig, name: str, whole: str, size: int) -> None:
    if size % getattr(c, name):
        raise ConfigError(f"{name} {getattr(c, name)} does not divide {whole} {size}; correct config.json.")


def without_unknown(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json without the keys of which `RingConfig.from_dict` warns."""
    used = {f.name for f in fields(RingConfig)}
    return {k: v for k, v in raw.items() if k in used or k in HARMLESS or k in ONLY}


def _warn_unknown(raw: Mapping[str, Any]) -> None:
    unknown = sorted(raw.keys() - without_unknown(raw).keys() - _warned)
    if unknown:
        _warned.update(unknown)
        some = ", ".join(k if len(k) < 100 else f"{k[:100]}..." for k in unknown[:MOST_NAMED])
        more = f" and {len(unknown) - MOST_NAMED:,} more" if len(unknown) > MOST_NAMED else ""
        warnings.warn(f"[config] unknown keys in config.json are ignored: {some}{more}.", stacklevel=4)
