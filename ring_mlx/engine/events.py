"""The requests and events of a session, as plain values without MLX.

An answer is a stream of events::

    Loading*  PrefillProgress*  (ThinkingText | AnswerText | ToolCall | Revised)*  Statistics?  End
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ring_mlx.errors import OptionError
from ring_mlx.generation.draft_sources import check_speculation
from ring_mlx.generation.sampling_ranges import REST
from ring_mlx.generation.thinking import Thinking
from ring_mlx.model.kv_quantization import KVQuantization

Reason = Literal["stop", "length", "stopped", "error"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the samplers and processors of mlx-lm under its names.

    Args:
        temp, top_p, min_p, top_k, repetition_penalty: None is what the checkpoint says, or else its family, as
            `ring_mlx.generation.defaults` has it.
        seed: Repeats an answer; without it one is drawn, and `Statistics` names it.
    """

    temp: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_k: int | None = None
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """A model, and how its requests are answered.

    Args:
        model: Folder of a checkpoint, or ``owner/name`` on the hub.
        revision: Branch, tag or commit of a hub repository.
        exact, decay_layer_offset, expert_cache_bytes, expert_policy, adapter_path: As for `ring_mlx.load`.
        kv_quantization: For keys and values of softmax layers, or None.
        memory_budget_bytes: Most bytes of snapshots in memory, but for the one that the present conversation goes on
            from; by default a quarter of what the machine has left, and 0 keeps none.
        max_snapshots: At most so many of them; None is any number.
        store: Folder for snapshots on disk; True is the system's folder for caches (or ``RING_MLX_CACHE``), False
            none.
        store_budget_bytes: Most bytes there for this model.
        store_kv_bits: Keep keys and values there in 8 or 4 bits; None keeps them as they are.
        prefill_step_tokens: Prompt tokens a step, and so how long `Session.stop` may take; by default 2,048 on a GPU,
            128 on a CPU.
        snapshot_every_tokens: A snapshot at each multiple of this within a long prompt.
        read_ahead: While no request waits, read the start of the next prompt: the answer without its thought.
        thinking: How answers start, and the tokens kept for them.
        speculate: Read several tokens at once: "auto" where that is faster, drafts of so many tokens, or "off".
        draft_model: Folder or ``owner/name`` of a smaller model with the same tokens, which drafts too.
        max_tokens: Of an answer, where a request says nothing else.
        max_batch: Requests that are read or generate at once; a session has one conversation at a time.
        max_reading: Of those, the most whose prompts are read, in turns; None is all.
        chat_template: In place of the checkpoint's.
        template_options: For the template, where a request says nothing else.
    """

    model: str | os.PathLike[str] = field(kw_only=False)
    revision: str | None = None
    exact: bool = False
    decay_layer_offset: int | str | None = None
    expert_cache_bytes: int | None = None
    expert_policy: str | None = None
    adapter_path: str | os.PathLike[str] | None = None
    kv_quantization: KVQuantization | None = None
    memory_budget_bytes: int | None = None
    max_snapshots: int | None = None
    store: str | os.PathLike[str] | bool = True
    store_budget_bytes: int = 8 << 30
    store_kv_bits: int | None = None
    prefill_step_tokens: int | None = None
    snapshot_every_tokens: int = 4096
    read_ahead: bool = True
    thinking: Thinking = field(default_factory=Thinking)
    speculate: int | str = "auto"
    draft_model: str | os.PathLike[str] | None = None
    max_tokens: int = REST
    max_batch: int = field(default=1, init=False)
    max_reading: int | None = field(default=None, init=False)
    chat_template: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)

    # A session goes on from the cache of its one conversation; of a server's requests each has a cache of its own.
    is_shared: ClassVar[bool] = False
    positive: ClassVar[tuple[str, ...]] = (
        *("prefill_step_tokens", "snapshot_every_tokens", "max_snapshots", "max_batch", "max_reading"),
    )

    def __post_init__(self) -> None:
        check_speculation(self.speculate)
        for is_given, what in (
            (self.speculate == "off", "speculate off"),
            (self.kv_quantization, "quantized keys and values"),
        ):
            if is_given and self.draft_model is not None:
                raise OptionError(f"a draft model does not go with {what}; leave one of them out.")
        if self.store_kv_bits not in (None, 4, 8):
            raise OptionError(f"store_kv_bits {self.store_kv_bits} is not 4 or 8; give one of them or None.")
        for name in self.positive:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise OptionError(f"{name} {getattr(self, name)} is not positive; give 1 or more.")
        for name in ("memory_budget_bytes", "store_budget_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise OptionError(f"{name} {getattr(self, name)} is negative; give 0 or more.")

    @property
    def loading(self) -> dict[str, Any]:
        """The options of `ring_mlx.load`."""
        names = ("revision", "exact", "decay_layer_offset", "expert_cache_bytes", "expert_policy", "adapter_path")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Loading:
    """The model is being loaded; ``done`` of ``total`` parts are in memory, 0 of 0 while files are found."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class PrefillProgress:
    """The prompt is being read.

    Args:
        done: Tokens that need no more reading, reused ones included.
        total: Tokens of the prompt.
        reused: Tokens from a snapshot.
        eta_s: Seconds until the first token, or None while it is not known.
    """

    done: int
    total: int
    reused: int
    eta_s: float | None


@dataclass(frozen=True)
class ThinkingText:
    """A piece of the thought, without tags."""

    text: str


@dataclass(frozen=True)
class AnswerText:
    """A piece of the answer, without thinking tags and tool calls."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A finished call: ``<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>``.

    ``raw`` is the model's text with the tags; of several calls in one block, only the first has it.
    """

    name: str
    arguments: Mapping[str, Any]
    raw: str = field(default="", compare=False)


@dataclass(frozen=True)
class TokenLogprob:
    """One token of the answer, its log-probability, its place in the text, and the likeliest alternatives that were allowed.

    Of the prompt where that is asked for; its first token has no log-probability.
    """

    token: bytes
    logprob: float | None
    offset: int = 0
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Revised:
    """A correction: texts and calls so far are to be dropped, and the answer comes again after the whole ``thought``."""

    thought: str


@dataclass(frozen=True)
class Statistics:
    """What the answer cost.

    Args:
        prompt_tokens: Of the whole prompt, ``read_tokens + reused_tokens``.
        read_tokens: Run through the model for this answer.
        reused_tokens: Known from snapshots.
        prompt_tps: Tokens read a second.
        time_to_first_token_s: From the start of the work, without the time in the queue.
        generated_tokens: Thought, tags and stop token included.
        thinking_tokens: Of these, the thought.
        generation_tps: Tokens generated a second.
        drafted_tokens, accepted_tokens: Drafts that were read together with a token, and those of them that came.
        peak_memory_bytes: Of the process on the device, since it started.
        seed: Repeats the answer.
        quantization: Of the weights, in words.
        kv_quantization: Of keys and values, in words.
    """

    prompt_tokens: int = 0
    read_tokens: int = 0
    reused_tokens: int = 0
    prompt_tps: float = 0.0
    time_to_first_token_s: float = 0.0
    generated_tokens: int = 0
    thinking_tokens: int = 0
    generation_tps: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    peak_memory_bytes: int = 0
    seed: int | None = None
    quantization: str = ""
    kv_quantization: str = ""

    @property
    def tokens_a_step(self) -> float:
        """Tokens generated a step of the model."""
        return self.generated_tokens / max(1, self.generated_tokens - self.accepted_tokens)


@dataclass(frozen=True)
class End:
    """The last event.

    Args:
        reason: "stop" (the model ended), "length" (``max_tokens`` or the context), "stopped" (`Session.stop`) or
            "error" (the iterator raises next).
        message: The assistant's turn, to append to the conversation: role, content, and where there are any
            ``reasoning_content`` and ``tool_calls``. Empty if the prompt was not read to its end, or a stop text cut it.
        error: The failure in one line, or "".
        stop_text: The stop text that cut the answer, or "".
    """

    reason: Reason
    message: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    stop_text: str = ""


Event = Loading | PrefillProgress | ThinkingText | AnswerText | ToolCall | TokenLogprob | Revised | Statistics | End


@dataclass(frozen=True)
class ModelInfo:
    """The model that a session holds.

    ``memory_limit_bytes`` is what this machine should give a model: on Metal the recommended working set. ``sampling`` is
    used where a request gives no value.
    """

    name: str
    context_tokens: int
    quantization: str
    kv_quantization: str
    has_chat_template: bool
    fingerprint: str
    memory_limit_bytes: int
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Counters:
    """Counts of a session since its start.

    Args:
        read_tokens: Prompt tokens run through the model, those read ahead included.
        ahead_tokens: Of these, read ahead.
        reused_tokens: Prompt tokens known from snapshots.
        generated_tokens: Of all answers.
        snapshots: Held in memory.
        snapshot_bytes: Their bytes, with shared blocks counted once.
    """

    read_tokens: int = 0
    ahead_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    snapshots: int = 0
    snapshot_bytes: int = 0
