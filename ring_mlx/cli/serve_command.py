"""``ring-mlx serve``: OpenAI's chat and completion routes for editors and agents; several requests and models at once."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from ring_mlx import options
from ring_mlx.checkpoint.loading import demo_model_path
from ring_mlx.cli import from_options
from ring_mlx.cli.progress import bar_of
from ring_mlx.cli.served_models import aliases_of, keep_s_of, served_models
from ring_mlx.distributed.failure import before_end
from ring_mlx.distributed.follower import Follower
from ring_mlx.distributed.group import Channel
from ring_mlx.distributed.leader import Leader
from ring_mlx.distributed.rank import Rank, joined
from ring_mlx.engine.events import SessionOptions
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.model_thread import Load
from ring_mlx.errors import OptionError
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.generation_fields import TEMPLATE_OWN
from ring_mlx.serve.request_log import RequestLog
from ring_mlx.serve.server import Server
from ring_mlx.system.files import text_of
from ring_mlx.system.terminal_text import for_output, note

MOST_SYSTEM_BYTES = 1 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted or terminated; returns the exit code."""
    if args.log_level in ("ERROR", "CRITICAL"):
        warnings.simplefilter("ignore")
    key = args.api_key if args.api_key is not None else os.environ.get("RING_MLX_API_KEY")
    with joined(args.distributed) as rank:
        if rank is None:
            return _serve(args, key)
        rank.check(args)
        if args.draft_model is not None:
            raise OptionError("--draft-model does not go with `ring-mlx launch`; leave one of them out.")
        if len(args.models) > 1 or args.keep is not None:
            raise OptionError("`ring-mlx launch` serves one model, which stays; give one --model and no --keep.")
        channel = rank.channel()
        if rank.is_first:
            return _serve(args, key, rank, channel)
        _follow(args, rank, channel)
    return 0


def _serve(args: argparse.Namespace, key: str | None, rank: Rank | None = None, channel: Channel | None = None) -> int:
    if key is None and args.host not in LOOPBACK:
        note(f"note: --host {args.host} without --api-key lets anyone there use the model.")
    if args.model is None:
        note(from_options.TOY_NOTE)
    load = partial(_load_part, rank, channel) if rank is not None and channel is not None else None
    server = make_server(args, key, load)
    if rank is not None:
        before_end(server.engine.abandon)
    stop, drain = threading.Event(), threading.Event()

    def terminate(*_: object) -> None:
        if drain.is_set() or not args.drain or rank is not None:  # other ranks end at once
            stop.set()
        drain.set()

    handlers = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: stop.set())}
    handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, terminate)
    try:
        server.start()
        host = f"[{args.host}]" if ":" in args.host else args.host
        models = server.models
        what = f"loads {models.first.name}" if models.is_single else f"has {', '.join(models.names)}"
        print(for_output(f"http://{host}:{server.server_port}/v1 {what}"), flush=True)
        with bar_of(args, "loading the model"):
            while (
                not (stop.is_set() or drain.is_set()) and models.is_single and not server.engine.wait_until_loaded(0.2)
            ):
                pass
        if not (stop.is_set() or drain.is_set()):
            print("ready; Ctrl-C ends it", flush=True)
        while not stop.wait(0.1 if drain.is_set() else 0.5):
            if drain.is_set() and models.drained(args.drain):
                break
            if models.is_single and server.engine.failure is not None:
                raise server.engine.failure
    finally:
        at_rest = server.close()
        if channel is not None and at_rest and server.engine.failure is None:
            channel.send({"do": "close"})
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def _follow(args: argparse.Namespace, rank: Rank, channel: Channel) -> None:
    """Serve as a rank that rank 0 leads; Ctrl-C, which a terminal sends to all, is for rank 0 to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    model, tokenizer, _ = rank.load_named(args)
    try:
        Follower(LoadedModel(model, tokenizer, make_settings(args)), rank.group).run(channel)
    except OSError as e:
        raise rank.lost(e) from None


def _load_part(rank: Rank, channel: Channel, options: SessionOptions, _: object) -> LoadedModel:
    """Rank 0's part of the model, and what it is worked with; called on the model's thread."""
    try:
        how = {"exact": options.exact, "decay_layer_offset": options.decay_layer_offset}
        model, tokenizer = rank.load(options.model, options.revision, **how)
        return Leader(model, tokenizer, options, rank, channel)
    except RuntimeError as e:
        raise rank.lost(e) from None


def make_server(args: argparse.Namespace, key: str | None, load: Load | None = None) -> Server:
    served = served_models(args, make_settings(args))
    return Server(
        served,
        args.host,
        args.port,
        api_key=key,
        max_body_bytes=args.max_body,
        allowed_hosts=args.allowed_hosts,
        allowed_origins=args.allowed_origins,
        strict=args.strict,
        request_log=RequestLog(args.log) if args.log else None,
        log_requests=args.log_requests or args.log_level in ("DEBUG", "INFO"),
        aliases=aliases_of(args, served),
        keep_s=keep_s_of(args, served),
        load=load,
    )


def make_settings(args: argparse.Namespace) -> Settings:
    return Settings(
        model=args.model or str(demo_model_path()),
        name="",
        revision=args.revision,
        **options.loading_options(args),
        sampling=options.sampling_of(args),
        system_prompt=_system_prompt(args.system_prompt),
        speculate=args.speculate or "auto",
        draft_model=args.draft_model,
        max_tokens=args.max_tokens,
        max_batch=args.max_batch,
        max_reading=args.prompt_concurrency,
        max_queue=args.max_queue,
        prefill_step_tokens=args.prefill_step_size,
        memory_budget_bytes=args.cache_memory,
        max_snapshots=args.prompt_cache_size,
        store=options.store_of(args),
        store_budget_bytes=args.store_size,
        read_ahead=not args.no_read_ahead,
        thinking=options.thinking_of(args),
        chat_template=args.chat_template or None,
        template_options=_template_options(args.chat_template_args or {}),
    )


def _system_prompt(path: Path | None) -> str:
    try:
        return "" if path is None else text_of(path, MOST_SYSTEM_BYTES).rstrip("\n")
    except (OSError, ValueError) as e:
        raise OptionError(f"--system-prompt {path} cannot be read ({e}); give a UTF-8 text file.") from None


def _template_options(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name in TEMPLATE_OWN:
            raise OptionError(f"--chat-template-args has {name!r}, which the server itself says; leave it out.")
    return given
