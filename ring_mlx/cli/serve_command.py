"""``ring-mlx serve``: OpenAI's chat and completion routes for editors and agents; several requests at once."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_mlx.cli import options
from ring_mlx.cli.parsing import add_command, group_of
from ring_mlx.cli.progress import bar_of
from ring_mlx.defaults import MAX_TOKENS
from ring_mlx.distributed.ending import before_end
from ring_mlx.distributed.member import joined
from ring_mlx.errors import OptionError
from ring_mlx.terminal_text import for_output, note

if TYPE_CHECKING:
    from ring_mlx.distributed.member import Member
    from ring_mlx.distributed.orders import Orders
    from ring_mlx.serve.engine import Load
    from ring_mlx.serve.parts import Parts
    from ring_mlx.serve.server import Server
    from ring_mlx.serve.settings import Settings

ANSWER = "answer, where a request says nothing else"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HELP = {
    "model_name": "what clients call the model (the repository, or the folder's name)",
    "api_key": "clients must send it as Bearer or X-Api-Key; RING_MLX_API_KEY keeps it out of the list of processes",
    "batch": "requests that are read or answered at once (8)",
    "queue": "requests that may wait beyond those; more get 503 (64)",
    "reading": "of these, the most whose prompts are read, in turns (all)",
    "step": "prompt tokens read between two tokens of the other answers (512)",
    "body": "longest body of a request (8 MiB)",
    "hosts": "further names, separated by commas, that clients may ask for; * admits all (this machine's own)",
    "origins": "web pages of other places, separated by commas, such as https://ui.example.com; * admits all (none)",
    "log": "what is told on standard error: INFO a line for each request, WARNING what is odd, ERROR less (WARNING)",
    "template": "text of a chat template in place of the checkpoint's",
    "template_args": "JSON object of template options where a request says nothing else",
    "memory": "most memory (a quarter of what is left, at most 4 GiB)",
    "count": "at most so many in memory (any number)",
    "cache_dir": "folder for snapshots (the system's for caches, or RING_MLX_CACHE)",
    "ahead": "do not read the start of the next turn while nobody waits",
}


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "serve",
        "OpenAI's routes over HTTP, for editors and agents",
        "OpenAI's chat and completion routes for editors and agents; several requests at once.",
        "ring-mlx serve --model inclusionAI/Ring-mini-linear-2.0 --port 8080",
    )
    options.add_model_options(parser)
    options.add_expert_options(parser)
    options.add_distributed_option(parser)
    group_of(parser, "model").add_argument("--model-name", help=HELP["model_name"])
    options.add_quiet_option(parser)
    a = parser.add_argument_group("address")
    a.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    a.add_argument("--port", type=options.natural_int, default=8080, help="port; 0 takes a free one (8080)")
    a.add_argument("--api-key", help=HELP["api_key"])
    a.add_argument("--allowed-hosts", type=_names, default=(), metavar="NAMES", help=HELP["hosts"])
    a.add_argument("--allowed-origins", type=_names, default=(), metavar="ORIGINS", help=HELP["origins"])
    a.add_argument("--log-requests", action="store_true", help="print a line for each request")
    a.add_argument("--log-level", choices=LOG_LEVELS, default="WARNING", help=HELP["log"])
    a = group_of(parser, ANSWER)
    options.add_setting(a, "max_tokens", MAX_TOKENS)
    for name in ("temp", "top_p", "top_k", "min_p"):
        options.add_setting(a, name, None)
    a.add_argument("--chat-template", metavar="TEXT", help=HELP["template"])
    a.add_argument("--chat-template-args", type=options.json_object, help=HELP["template_args"])
    options.add_thinking_options(parser)
    g = parser.add_argument_group("how much at once")
    g.add_argument(
        *("--max-batch", "--decode-concurrency"), type=options.positive_int, default=8, metavar="N", help=HELP["batch"]
    )
    g.add_argument("--prompt-concurrency", type=options.positive_int, metavar="N", help=HELP["reading"])
    g.add_argument("--max-queue", type=options.positive_int, default=64, help=HELP["queue"])
    g.add_argument("--max-body", type=options.byte_count, default=8 << 20, metavar="SIZE", help=HELP["body"])
    g.add_argument("--prefill-step-size", type=options.positive_int, default=512, help=HELP["step"])
    s = parser.add_argument_group("snapshots")
    s.add_argument("--cache-dir", type=Path, help=HELP["cache_dir"])
    s.add_argument("--no-store", action="store_true", help="keep snapshots in memory only")
    s.add_argument(
        "--store-size", type=options.byte_count, default=8 << 30, metavar="SIZE", help="most room on disk (8 GiB)"
    )
    s.add_argument(
        *("--cache-memory", "--prompt-cache-bytes"), type=options.byte_count, metavar="SIZE", help=HELP["memory"]
    )
    s.add_argument("--prompt-cache-size", type=options.positive_int, metavar="N", help=HELP["count"])
    s.add_argument("--no-read-ahead", action="store_true", help=HELP["ahead"])
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted or terminated; returns the exit code."""
    if args.log_level in ("ERROR", "CRITICAL"):
        warnings.simplefilter("ignore")
    key = args.api_key if args.api_key is not None else os.environ.get("RING_MLX_API_KEY")
    with joined(args.distributed) as member:
        if member is None:
            return _serve(args, key)
        member.check(args)
        orders = member.orders()
        if member.is_first:
            return _serve(args, key, member, orders)
        _follow(args, member, orders)
    return 0


def _serve(
    args: argparse.Namespace, key: str | None, member: Member | None = None, orders: Orders | None = None
) -> int:
    if key is None and args.host not in LOOPBACK:
        note(f"note: --host {args.host} without --api-key lets anyone there use the model.")
    if args.model is None:
        note(options.TOY_NOTE)
    load = partial(_load_part, member, orders) if member is not None and orders is not None else None
    server = make_server(args, key, load)
    if member is not None:
        before_end(server.engine.abandon)
    stop = threading.Event()
    handlers = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.start()
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(for_output(f"http://{host}:{server.server_port}/v1 loads {server.engine.settings.name}"), flush=True)
        with bar_of(args, "loading the model"):
            while not stop.is_set() and not server.engine.wait_until_loaded(0.2):
                pass
        if not stop.is_set():
            print("ready; Ctrl-C ends it", flush=True)
        while not stop.wait(0.5):
            if server.engine.failure is not None:
                raise server.engine.failure
    finally:
        at_rest = server.close()
        if orders is not None and at_rest and server.engine.failure is None:
            orders.tell({"do": "close"})
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def _follow(args: argparse.Namespace, member: Member, orders: Orders) -> None:
    """Serve as a rank that rank 0 leads; Ctrl-C, which a terminal sends to all, is for rank 0 to answer."""
    from ring_mlx.distributed.follower import Follower
    from ring_mlx.serve.parts import Parts

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    model, tokenizer, _ = member.load_named(args)
    try:
        Follower(Parts(model, tokenizer, make_settings(args)), member.group).run(orders)
    except OSError as e:
        raise member.lost(e) from None


def _load_part(member: Member, orders: Orders, settings: Settings) -> Parts:
    """Rank 0's part of the model, and what it is worked with; called on the model's thread."""
    from ring_mlx.distributed.leader import Leader

    try:
        model, tokenizer = member.load(settings.model, settings.revision, settings.exact, settings.decay_layer_offset)
        return Leader(model, tokenizer, settings, member, orders)
    except RuntimeError as e:
        raise member.lost(e) from None


def make_server(args: argparse.Namespace, key: str | None, load: Load | None = None) -> Server:
    """The server that the options describe."""
    from ring_mlx.serve.server import Server

    return Server(
        make_settings(args),
        args.host,
        args.port,
        api_key=key,
        max_body_bytes=args.max_body,
        allowed_hosts=args.allowed_hosts,
        allowed_origins=args.allowed_origins,
        log_requests=args.log_requests or args.log_level in ("DEBUG", "INFO"),
        load=load,
    )


def make_settings(args: argparse.Namespace) -> Settings:
    """The numbers among the options."""
    from ring_mlx.loading import demo_model_path
    from ring_mlx.serve.settings import Settings
    from ring_mlx.session_events import Sampling

    return Settings(
        model=args.model or str(demo_model_path()),
        name=args.model_name or _name(args.model),
        revision=args.revision,
        **options.loading_options(args),
        sampling=Sampling(temp=args.temp, top_p=args.top_p, top_k=args.top_k, min_p=args.min_p),
        max_tokens=args.max_tokens,
        max_batch=args.max_batch,
        max_reading=args.prompt_concurrency,
        max_queue=args.max_queue,
        prefill_step_tokens=args.prefill_step_size,
        memory_budget_bytes=args.cache_memory,
        max_snapshots=args.prompt_cache_size,
        store=False if args.no_store else args.cache_dir or True,
        store_budget_bytes=args.store_size,
        read_ahead=not args.no_read_ahead,
        thinking=options.thinking_of(args),
        chat_template=args.chat_template or None,
        template_options=_template_options(args.chat_template_args or {}),
    )


def _template_options(given: dict[str, Any]) -> dict[str, Any]:
    from ring_mlx.serve.protocol import TEMPLATE_OWN

    for name in given:
        if name in TEMPLATE_OWN:
            raise OptionError(f"--chat-template-args has {name!r}, which the server itself says; leave it out.")
    return given


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _name(model: str | None) -> str:
    if model is None:
        return "ring-nano"
    folder = Path(os.path.expanduser(model))
    return folder.resolve().name if folder.is_dir() else model
