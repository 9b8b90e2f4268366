"""``ring-mlx cache-prompt``: read a long text once and keep what the model knows of it."""

from __future__ import annotations

import argparse
import sys
import time

from ring_mlx.checkpoint.vocabulary import whole_ids
from ring_mlx.cli import from_options
from ring_mlx.cli.progress import bar_of
from ring_mlx.cli.prompt_cache import open_reader, save
from ring_mlx.errors import CacheFileError, PromptError
from ring_mlx.generation.templates import render_chat
from ring_mlx.system.files import behind_links, check_writable
from ring_mlx.system.terminal_text import harmless
from ring_mlx.system.wired import Wired


def run(args: argparse.Namespace) -> int:
    """Read the prompt and write the file; returns the exit code."""
    try:
        check_writable(behind_links(args.prompt_cache_file))
    except OSError as e:
        raise CacheFileError(f"{args.prompt_cache_file} cannot be written ({e}); give another file.") from None
    text = from_options.read_prompt(args.prompt)
    model, tokenizer, name = from_options.load_named(args)
    if args.ignore_chat_template:
        ids = [int(i) for i in tokenizer.encode(text)]
    else:
        messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
        ids = render_chat(tokenizer, [*messages, {"role": "user", "content": text}], continue_last=True)
    if not text.strip() or not ids:
        raise PromptError("the prompt is empty; give some text.")
    context = model.config.context_tokens
    if len(ids) >= context:
        raise PromptError(f"{len(ids)} tokens leave no room in the context of {context}; shorten the prompt.")
    ids, reader = whole_ids(ids, model.config.vocab_size), open_reader(args, model, tokenizer, name)
    started = time.perf_counter()
    with bar_of(args, "prompt", "tokens") as bar, Wired():
        bar(reader.start(ids), len(ids))
        for done in reader.read(ids, {}, lambda: False):
            bar(done, len(ids))
    reader.live.cache.save(args.prompt_cache_file, ids, model.fingerprint, model=name)
    save(reader)
    speed = len(ids) / (time.perf_counter() - started)
    said = f"Read {len(ids)} tokens at {speed:.3f} tokens-per-sec, saved {args.prompt_cache_file}"
    print(harmless(said), file=sys.stderr)
    return 0
