"""The options of ``ring-mlx serve``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ring_mlx import options
from ring_mlx.generation.defaults import MAX_TOKENS
from ring_mlx.options import group_of

ANSWER = "answer, unless the request says otherwise"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
HELP = {
    "model": "folder of a checkpoint, owner/name on the hub, or a folder of checkpoints; may be given several times (the packaged toy)",
    "model_name": "what clients call the model; of several, given once for each (the repository, or the folder's name)",
    "alias": "a further name by which clients may ask for a model, such as gpt-5=ring-mini; * stands for any name; may be given several times",
    "keep": "how long a model stays in memory after its last answer: seconds, or 90s, 5m, 1h; -1 is for ever (for ever; of several models 5m)",
    "api_key": "clients must send it as Bearer or X-Api-Key; give it in RING_MLX_API_KEY to hide it from lists of processes",
    "batch": "requests that are read or answered at once (8)",
    "queue": "requests that may wait beyond those; more get 503 (64)",
    "reading": "the most of these whose prompts are read, in turns (all)",
    "step": "prompt tokens read between two tokens of the other answers (512)",
    "body": "longest body of a request (8 MiB)",
    "hosts": "more host names by which clients may address the server, separated by commas; * admits all (this machine's own)",
    "origins": "web pages of other sites that may ask, separated by commas, such as https://ui.example.com; * admits all (none)",
    "strict": "refuse requests with fields that are not honoured, instead of naming these in a header",
    "log": "what goes to standard error: INFO a line for each request, WARNING warnings, ERROR only errors (WARNING)",
    "request_log": "file for a line of JSON for each request, its tokens and times, never its text; - is standard output (none)",
    "drain": "how long SIGTERM lets running answers go on, while new requests get 503; a second one ends them (10s)",
    "system": "text of the system prompt of conversations that have none",
    "template": "text of a chat template in place of the checkpoint's",
    "template_args": "JSON object of template options, unless the request gives them",
    "memory": "most memory (a quarter of what is left, at most 4 GiB)",
    "count": "the most snapshots in memory (any number)",
    "ahead": "do not read ahead the start of the next turn while no request waits",
}


def add(parser: argparse.ArgumentParser) -> None:
    options.add_model_options(parser, _Models, HELP["model"])
    options.add_expert_options(parser)
    options.add_distributed_option(parser)
    m = group_of(parser, "model")
    m.add_argument("--model-name", action="append", metavar="NAME", help=HELP["model_name"])
    m.add_argument("--alias", action="append", default=[], metavar="ALIAS=MODEL", help=HELP["alias"])
    m.add_argument("--keep", type=options.seconds, metavar="DURATION", help=HELP["keep"])
    parser.set_defaults(models=())
    options.add_quiet_option(parser)
    a = parser.add_argument_group("address")
    a.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    a.add_argument("--port", type=options.natural_int, default=8080, help="port; 0 takes a free one (8080)")
    a.add_argument("--api-key", help=HELP["api_key"])
    a.add_argument("--allowed-hosts", type=_names, default=(), metavar="NAMES", help=HELP["hosts"])
    a.add_argument("--allowed-origins", type=_names, default=(), metavar="ORIGINS", help=HELP["origins"])
    a.add_argument("--strict", action="store_true", help=HELP["strict"])
    a.add_argument("--log-requests", action="store_true", help="print a line for each request")
    a.add_argument("--log-level", choices=LOG_LEVELS, default="WARNING", help=HELP["log"])
    a.add_argument("--log", metavar="FILE", help=HELP["request_log"])
    a.add_argument("--drain", type=options.seconds, default=10.0, metavar="DURATION", help=HELP["drain"])
    a = group_of(parser, ANSWER)
    options.add_setting(a, "max_tokens", MAX_TOKENS)
    options.add_sampling_settings(a)
    a.add_argument("--system-prompt", type=Path, metavar="FILE", help=HELP["system"])
    a.add_argument("--chat-template", metavar="TEXT", help=HELP["template"])
    a.add_argument("--chat-template-args", type=options.json_object, help=HELP["template_args"])
    options.add_thinking_options(parser)
    options.add_speculate_option(parser)
    options.add_draft_option(a)
    g = parser.add_argument_group("how much at once")
    g.add_argument(
        *("--max-batch", "--decode-concurrency"), type=options.positive_int, default=8, metavar="N", help=HELP["batch"]
    )
    g.add_argument("--prompt-concurrency", type=options.positive_int, metavar="N", help=HELP["reading"])
    g.add_argument("--max-queue", type=options.positive_int, default=64, help=HELP["queue"])
    g.add_argument("--max-body", type=options.byte_count, default=8 << 20, metavar="SIZE", help=HELP["body"])
    g.add_argument("--prefill-step-size", type=options.positive_int, default=512, help=HELP["step"])
    options.add_store_options(parser)
    s = group_of(parser, "snapshots")
    s.add_argument(
        *("--cache-memory", "--prompt-cache-bytes"), type=options.byte_count, metavar="SIZE", help=HELP["memory"]
    )
    s.add_argument("--prompt-cache-size", type=options.positive_int, metavar="N", help=HELP["count"])
    s.add_argument("--no-read-ahead", action="store_true", help=HELP["ahead"])


class _Models(argparse.Action):
    """Collects all models; ``model`` is the first, as other commands have it."""

    def __call__(self, _: object, namespace: argparse.Namespace, value: Any, __: object = None) -> None:
        namespace.models = [*namespace.models, value]
        namespace.model = namespace.models[0]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
