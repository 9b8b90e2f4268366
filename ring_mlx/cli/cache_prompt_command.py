"""``ring-mlx cache-prompt``: read a long text once and keep what the model knows of it."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from ring_mlx.cli import options
from ring_mlx.cli.parsing import add_command, group_of
from ring_mlx.cli.progress import bar_of
from ring_mlx.errors import CacheFileError, PromptError
from ring_mlx.files import behind_links, check_writable
from ring_mlx.terminal_text import harmless


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "cache-prompt",
        "read a prompt once and save the state",
        "Read a long text once and keep what the model knows of it, for `ring-mlx generate --prompt-cache-file`.",
        "ring-mlx cache-prompt --prompt - --prompt-cache-file book.safetensors < book.txt",
    )
    p = group_of(parser, "prompt")
    p.add_argument("--prompt", required=True, help="text to read; - reads standard input")
    p.add_argument("--prompt-cache-file", required=True, help="file to write")
    p.add_argument("--system-prompt", metavar="TEXT", help="system prompt for the chat template")
    p.add_argument("--ignore-chat-template", action="store_true", help="plain text, without the template")
    options.add_quiet_option(parser)
    options.add_model_options(parser)
    options.add_prefill_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the prompt and write the file; returns the exit code."""
    from ring_mlx.generation import generate_step
    from ring_mlx.tokenizer import render_chat

    try:
        check_writable(behind_links(args.prompt_cache_file))
    except OSError as e:
        raise CacheFileError(f"{args.prompt_cache_file} cannot be written ({e}); give another file.") from None
    options.check_template_flags(args)
    text = options.read_prompt(args.prompt)
    model, tokenizer, name = options.load_named(args)
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
    cache = model.make_cache()
    kv_quantization = options.make_kv_quantization(args)
    if kv_quantization is not None:
        kv_quantization.check(model.config.head_dim)
    started = time.perf_counter()
    step = options.prefill_step_size(args)
    with bar_of(args, "prompt", "tokens") as bar:
        for _ in generate_step(
            ids,
            model,
            cache,
            max_tokens=1,
            prefill_step_size=step,
            kv_quantization=kv_quantization,
            progress=bar,
        ):
            pass
    cache.save(args.prompt_cache_file, ids, model.fingerprint, model=name)
    speed = len(ids) / (time.perf_counter() - started)
    said = f"Read {len(ids)} tokens at {speed:.3f} tokens-per-sec, saved {args.prompt_cache_file}"
    print(harmless(said), file=sys.stderr)
    return 0
