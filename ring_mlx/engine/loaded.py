"""A loaded model with its tokenizer, and what a scheduler needs to answer requests with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.drafting import load_with_draft
from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.loading import Claim, load
from ring_mlx.engine.branches import Prepared, Prompt, Renderer
from ring_mlx.engine.events import ModelInfo, SessionOptions
from ring_mlx.engine.model_drafts import ModelDrafts
from ring_mlx.engine.reading import PromptReader
from ring_mlx.engine.request import Request
from ring_mlx.engine.snapshots import SnapshotTree, Store
from ring_mlx.engine.snapshots.store import open_store
from ring_mlx.errors import OptionError, PromptError
from ring_mlx.generation.batch import Batch
from ring_mlx.generation.constraint import Constraint
from ring_mlx.generation.draft_sources import DraftSource, PromptDrafts, pace_of
from ring_mlx.generation.grammars import Grammars
from ring_mlx.generation.sampling_ranges import within
from ring_mlx.generation.stream import check_lengths, encode_prompt
from ring_mlx.generation.templates import use_template
from ring_mlx.generation.thinking import ThoughtSplitter, splitter_after
from ring_mlx.generation.thought_end import THINK_END
from ring_mlx.model import memory
from ring_mlx.model.config import RingConfig
from ring_mlx.model.model import Model
from ring_mlx.system.terminal_text import whole_text

PIECE_CHARACTERS = 1 << 15
LIKELY_CHARACTERS, SURE = 4, 1.02  # of a token; of a sum of pieces, which may have some tokens more than the whole


class LoadedModel:
    """Makes the parts of a `Scheduler`; `ring_mlx.distributed.leader` makes parts that also direct the other ranks.

    Raises TokenizerError if the options have a chat template that cannot be used; OptionError if keys and values cannot
    be quantized so.
    """

    can_tell_prompts: ClassVar[bool] = True

    def __init__(
        self, model: Model, tokenizer: TokenizerWrapper, options: SessionOptions, draft: Model | None = None
    ) -> None:
        self.model, self.tokenizer, self.options, self.draft = model, tokenizer, options, draft
        if options.kv_quantization is not None:
            options.kv_quantization.check(model.config.head_dim)
            self.check_plain("quantized keys and values")
        if options.chat_template is not None:
            use_template(tokenizer, options.chat_template, options.template_options)

    @classmethod
    def load(
        cls, options: SessionOptions, progress: Callable[..., object] | None = None, claim: Claim = memory.claim
    ) -> LoadedModel:
        """Load the model that the options name. Raises RingError as `ring_mlx.load`."""
        if options.draft_model is None:
            return cls(*load(options.model, **options.loading, progress=progress, claim=claim), options)
        folders = resolve_model(options.model, options.revision), resolve_model(options.draft_model)
        how = {name: value for name, value in options.loading.items() if name != "revision"}
        bar = nullcontext(progress)
        model, tokenizer, draft = load_with_draft(*folders, lambda label: bar, claim=claim, **how)
        return cls(model, tokenizer, options, draft)

    @cached_property
    def info(self) -> ModelInfo:
        model, kv = self.model, self.options.kv_quantization
        return ModelInfo(
            name=Path(self.options.model).name,
            context_tokens=model.config.context_tokens,
            quantization=_quantization(model),
            kv_quantization=f"{kv.bits} bits, groups of {kv.group_size}" if kv else "none",
            has_chat_template=bool(self.tokenizer.has_chat_template),
            fingerprint=model.fingerprint,
            memory_limit_bytes=memory.budget_bytes(),
            sampling=model.sampling,
        )

    def budget_bytes(self) -> int:
        """Most bytes of snapshots in memory."""
        given = self.options.memory_budget_bytes
        return memory.snapshot_budget_bytes() if given is None else given

    def tree(self) -> SnapshotTree:
        """Snapshots in memory, within the part of the budget that a draft model's do not take."""
        return SnapshotTree(self.budget_bytes() - self._draft_budget_bytes, self.options.max_snapshots)

    @cached_property
    def _draft_budget_bytes(self) -> int:
        """Most bytes of the draft model's snapshots: the part that its caches have of both models'."""
        if self.draft is None:
            return 0
        caches = [memory.cache_bytes(m.config, memory.PLAIN_CONTEXT) for m in (self.draft, self.model)]
        return self.budget_bytes() * caches[0] // sum(caches)

    @property
    def draft_config(self) -> RingConfig | None:
        """That of the draft model, of which each sequence has a cache too."""
        return None if self.draft is None else self.draft.config

    def store(self) -> Store | None:
        """Snapshots on disk; those whose keys and values have another form are kept apart."""
        return open_store(self.options, self.model)

    def reader(self, tree: SnapshotTree, store: Store | None, step_tokens: int | None = None) -> PromptReader:
        """A reader of prompts with its own cache."""
        o = self.options
        return PromptReader(
            self.model,
            tree,
            store,
            step_tokens=step_tokens or o.prefill_step_tokens,
            every_tokens=o.snapshot_every_tokens,
            kv_quantization=o.kv_quantization,
        )

    def batch(self) -> Batch:
        o = self.options
        return Batch(self.model, o.prefill_step_tokens, None if o.is_shared else 1, o.kv_quantization)

    @cached_property
    def drafts(self) -> DraftSource | None:
        """Where drafts come from; None is plain decoding, also for quantized keys and values, which take no token back."""
        pace = None if self.options.kv_quantization is not None else pace_of(self.options.speculate)
        if pace is None:
            return None
        lookup = PromptDrafts(pace, self.options.is_shared)
        if self.draft is None:
            return lookup
        return ModelDrafts(lookup, self.draft, self.options.prefill_step_tokens, self._draft_budget_bytes)

    def check_plain(self, what: str) -> None:
        """Raises OptionError if a number of drafts is wanted, which does not go with ``what``."""
        if isinstance(self.options.speculate, int):
            raise OptionError(f"speculate {self.options.speculate} does not go with {what}; leave one of them out.")

    def prepare(self, request: Request) -> Prepared:
        """Render, encode and measure a request's prompt. Raises RingError if the request cannot be answered."""
        renderer = None
        if isinstance(request.prompt, str):
            for name in ("template_options", "continue_last"):
                if getattr(request, name):
                    raise OptionError(f"{name} needs the chat template, but the prompt is text; give messages.")
            prompt = Prompt(request.prompt, encode_prompt(self.tokenizer, request.prompt), None)
        else:
            renderer = renderer_of(request, self.tokenizer, self.options.template_options)
            prompt = renderer.prompt(request.prompt)
        return self.measured(request, prompt, renderer)

    def count_tokens(self, text: str) -> int:
        """The tokens of a text within a message; from any thread.

        It is encoded in pieces of whole lines, so that other threads get their turn.
        """
        return sum(self._counts([text]))

    def check(self, request: Request) -> int:
        """The tokens of a request's prompt; from any thread. Raises RingError if it cannot be answered, or not in memory."""
        context, prompt = self.model.config.context_tokens, request.prompt
        texts = [prompt] if isinstance(prompt, str) else [str(m.get("content") or "") for m in prompt]
        if sum(map(len, texts)) > LIKELY_CHARACTERS * context:  # not all of it needs to be encoded
            counted = 0
            for count in self._counts(texts):
                counted += count
                if counted > context * SURE:
                    raise PromptError(
                        f"more than {counted:,} tokens exceed the context of {context}; shorten the prompt."
                    )
        tokens = len(self.prepare(request).prompt.ids)
        held = self.weight_bytes + (self.options.expert_cache_bytes or 0)
        if self.draft is not None:
            held += memory.cache_bytes(self.draft.config, tokens)
        memory.check_prompt(self.model.config, held, tokens)
        return tokens

    def _counts(self, texts: Iterable[str]) -> Iterator[int]:
        """The tokens of each piece of texts."""
        for text in texts:
            at = 0
            while at < len(text):
                end = at + PIECE_CHARACTERS
                end = text.rfind("\n", at, end) + 1 or end if end < len(text) else end
                yield len(self.tokenizer.encode(whole_text(text[at:end]), add_special_tokens=False))
                at = end

    @cached_property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        models = [self.model] if self.draft is None else [self.model, self.draft]
        return sum(a.nbytes for m in models for _, a in tree_flatten(m.parameters()))

    def measured(self, request: Request, prompt: Prompt, renderer: Renderer | None) -> Prepared:
        """A prompt that fits the context, with the tokens that are left for the answer.

        Raises PromptError if it does not fit, or is empty; OptionError if the request's numbers are out of range, or the answer
        cannot be held to the request's form (GrammarError).
        """
        most = self.options.max_tokens if request.max_tokens is None else request.max_tokens
        step = self.options.prefill_step_tokens
        check_lengths(self.model, len(prompt.ids), 0, most, step, request.thinking_budget)
        limit = within(most, self.model.config.context_tokens - len(prompt.ids) + 1)
        return Prepared(prompt, renderer, limit, self._constraint(request, prompt))

    def splitter(self, request: Request, prompt: Prompt) -> ThoughtSplitter:
        """What tells thought from answer; with a form, the first end of a thought ends it."""
        is_chat = not (request.is_text or isinstance(request.prompt, str))
        found = splitter_after(prompt.text, self.options.thinking.start, is_chat and self.tokenizer.has_thinking)
        if request.form is not None:
            found.end_at_first()
        return found

    @cached_property
    def grammars(self) -> Grammars:
        """The grammars of forms."""
        return Grammars(self.tokenizer, self.model.config.vocab_size)

    def _constraint(self, request: Request, prompt: Prompt) -> Constraint | None:
        if request.form is None:
            return None
        is_thinking = not request.is_text and self.splitter(request, prompt).inside
        before = ""
        if request.continue_last and not is_thinking:
            before = str(request.prompt[-1].get("content") or "").rpartition(THINK_END)[2].lstrip()
        return Constraint(self.grammars, request.form, is_thinking, before)


def renderer_of(request: Request, tokenizer: TokenizerWrapper, options: Mapping[str, Any] | None = None) -> Renderer:
    """The renderer of a request's messages; the request's template options come before ``options``."""
    options = {**(options or {}), **(request.template_options or {})}
    return Renderer(tokenizer, request.tools or None, options, request.continue_last)


def _quantization(model: Model) -> str:
    found = {(m.bits, m.group_size) for m in model.modules() if hasattr(m, "bits")}
    if not found:
        return f"none ({str(model.model.norm.weight.dtype).rpartition('.')[2]})"
    return ", ".join(f"{bits} bits in groups of {group}" for bits, group in sorted(found))
