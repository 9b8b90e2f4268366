"""``ring-mlx generate``: one prompt in, text out, with the flags of mlx_lm.generate."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx import options
from ring_mlx.checkpoint.vocabulary import whole_ids
from ring_mlx.cli import from_options
from ring_mlx.cli.exit_codes import CUT_OFF, INTERRUPTED
from ring_mlx.cli.printer import Printer
from ring_mlx.cli.progress import bar_of
from ring_mlx.cli.prompt_cache import load_prompt, open_reader, save, text_after_cached
from ring_mlx.distributed.group import agreed
from ring_mlx.distributed.rank import Rank, joined
from ring_mlx.engine.branches import Prompt, Renderer, branch_points
from ring_mlx.engine.reading import PromptReader
from ring_mlx.errors import OptionError, PromptError
from ring_mlx.generation.constraint import Constraint
from ring_mlx.generation.decoding import LogitsProcessor, Progress, Sampler, decode
from ring_mlx.generation.draft_model import DraftModel, LookupOrModel
from ring_mlx.generation.draft_sources import pace_of
from ring_mlx.generation.drafts import Drafter, PromptLookup
from ring_mlx.generation.forms import Form
from ring_mlx.generation.grammars import Grammars
from ring_mlx.generation.pace import Pace
from ring_mlx.generation.sampling_ranges import within
from ring_mlx.generation.speculation import speculate
from ring_mlx.generation.stream import GenerationEvent, check_lengths, events_of, thought_closer
from ring_mlx.generation.thinking import splitter_after
from ring_mlx.model.model import Model
from ring_mlx.system.terminal_text import harmless_json, note
from ring_mlx.system.wired import Wired


def run(args: argparse.Namespace) -> int:
    """Generate and print, alone or as one of several processes; returns the exit code."""
    with joined(args.distributed) as rank:
        return _generate(args, rank)


def _generate(args: argparse.Namespace, rank: Rank | None) -> int:
    if rank is not None:
        rank.check(args)
        if args.draft_model is not None:
            raise OptionError("--draft-model does not go with `ring-mlx launch`; leave one of them out.")
    text = from_options.read_prompt(args.prompt)
    if not text.strip():
        raise PromptError("the prompt is empty; give some text.")
    form = from_options.form_of(args)
    loaded = from_options.load_with_draft(args) if rank is None else (*rank.load_named(args), None)
    model, tokenizer, name, draft = loaded
    for token in args.extra_eos_token:
        _add_eos(tokenizer, token, model.config.vocab_size)
    sampler, processors = from_options.make_sampling(args, model, tokenizer)
    if rank is not None:
        sampler = agreed(sampler, rank.group)
    reader = open_reader(args, model, tokenizer, name, has_store=rank is None)
    source = _source(args, model, tokenizer, text, reader)
    experts, pace = getattr(model, "expert_statistics", None), _pace(args, reader, rank)
    printer = Printer(args.thinking, quiet=args.json, verbose=args.verbose, experts=experts, pace=pace)
    code = 0
    with bar_of(args, "prompt", "tokens", rank is None or rank.is_first) as bar, Wired():
        try:
            for event in _events(args, model, tokenizer, source, reader, sampler, processors, pace, draft, form, bar):
                printer.show(event)
        except KeyboardInterrupt:
            code = INTERRUPTED
    printer.finish(interrupted=code != 0)
    if code == 0 and (said := printer.end_note(model.config.context_tokens)):
        note(f"[generate] {said}")
    if args.json:
        print(harmless_json(printer.as_json(name)), flush=True)
    if code == 0:
        save(reader)
    return code or (CUT_OFF if printer.is_cut_off else 0)


def _pace(args: argparse.Namespace, reader: PromptReader, rank: Rank | None) -> Pace | None:
    """How many tokens to draft a step; None is plain decoding."""
    for is_given, flag in ((reader.kv_quantization is not None, "--kv-bits"), (rank is not None, "`ring-mlx launch`")):
        if is_given and args.speculate not in (None, "off"):
            raise OptionError(f"--speculate {args.speculate} does not go with {flag}; leave one of them out.")
        if is_given:
            return None
    return pace_of(args.speculate or "auto")


class _Source(NamedTuple):
    """A prompt to answer, how many of its tokens a file holds, and what finds the places where others may go on."""

    prompt: Prompt
    in_file: int = 0
    points: Callable[[int], dict[int, str]] = lambda known: {}


def _source(
    args: argparse.Namespace, model: Model, tokenizer: TokenizerWrapper, text: str, reader: PromptReader
) -> _Source:
    file = args.prompt_cache_file
    if file and args.system_prompt is not None:
        raise OptionError(
            "--system-prompt comes before what --prompt-cache-file has read; give it to `ring-mlx cache-prompt` instead."
        )
    before = load_prompt(reader, file, model) if file else []
    if args.ignore_chat_template:
        ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=not file)]
        return _Source(Prompt("", [*before, *ids], None), len(before))
    messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt is not None else []
    messages.append({"role": "user", "content": text})
    continue_last = args.prefill_response is not None
    if continue_last:
        messages.append({"role": "assistant", "content": args.prefill_response})
    extra = args.chat_template_config or {}
    if file:
        after = text_after_cached(tokenizer, messages, extra, continue_last)
        ids = [int(i) for i in tokenizer.encode(after, add_special_tokens=False)]
        return _Source(Prompt("", [*before, *ids], None), len(before))
    renderer = Renderer(tokenizer, extra.pop("tools", None), extra, continue_last)
    prompt = renderer.prompt(messages)
    if reader.store is None:
        return _Source(prompt)
    return _Source(prompt, 0, partial(branch_points, renderer, messages, prompt))


def _events(
    args: argparse.Namespace,
    model: Model,
    tokenizer: TokenizerWrapper,
    source: _Source,
    reader: PromptReader,
    sampler: Sampler,
    processors: Sequence[LogitsProcessor],
    pace: Pace | None,
    draft: Model | None,
    form: Form | None,
    bar: Progress,
) -> Iterator[GenerationEvent]:
    """Read what no snapshot holds of the prompt, then generate."""
    ids, started = whole_ids(source.prompt.ids, model.config.vocab_size), time.perf_counter()
    step, context = from_options.prefill_step_size(args), model.config.context_tokens
    check_lengths(model, len(ids) - source.in_file, source.in_file, args.max_tokens, step, args.thinking_budget)
    known = source.in_file or reader.start(ids)
    bar(known, len(ids))
    for done in reader.read(ids, source.points(known), lambda: False) if known < len(ids) else ():
        bar(done, len(ids))
    assert reader.logits is not None
    thinking = options.thinking_of(args)
    splitter, limit = (
        splitter_after(tokenizer.decode(ids), thinking.start),
        within(args.max_tokens, context - len(ids) + 1),
    )
    constraint = None
    if form is not None:
        splitter.end_at_first()
        is_thinking = splitter.inside and not args.ignore_chat_template
        grammars = Grammars(tokenizer, model.config.vocab_size)
        constraint = Constraint(grammars, form, is_thinking, "" if is_thinking else args.prefill_response or "")
    how: dict[str, Any] = {
        "constraint": constraint,
        "max_tokens": limit,
        "sampler": sampler,
        "logits_processors": processors,
        "next_forced": thought_closer(tokenizer, splitter, args.thinking_budget, thinking, limit),
    }
    cache = reader.live.cache
    if pace is not None:
        drafter: Drafter = PromptLookup(ids)
        if draft is not None:
            drafter = LookupOrModel(drafter, DraftModel(draft, ids, args.prefill_step_size), pace)
        steps = speculate(reader.logits, model, cache, ids, drafter, pace, **how)
    else:
        kv = reader.kv_quantization
        steps = decode(reader.logits, model, cache, mx.array(ids, dtype=mx.int32), kv_quantization=kv, **how)
    read = len(ids) - known
    for event in events_of(
        steps, tokenizer, splitter, limit, prompt_tokens=read, cached_tokens=known, before=ids, started=started
    ):
        if constraint is not None:
            constraint.check()
        yield event


def _add_eos(tokenizer: TokenizerWrapper, token: str, rows: int) -> None:
    """Stop at a token too; digits are an id, as in mlx_lm."""
    number = int(token[:20]) if token.isdecimal() else tokenizer.get_vocab().get(token)
    if number is None or number >= rows:
        raise OptionError(f"--extra-eos-token {token!r} is not in the vocabulary; give a token or an id below {rows}.")
    tokenizer.eos_token_ids = tokenizer.eos_token_ids | {number}
