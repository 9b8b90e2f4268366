"""The options of ``ring-mlx generate``."""

from __future__ import annotations

import argparse

from ring_mlx import options
from ring_mlx.errors import OptionError
from ring_mlx.generation.defaults import MAX_TOKENS
from ring_mlx.options import group_of


def check(args: argparse.Namespace) -> None:
    """Refuse flags that need others; raises OptionError."""
    options.check_template_flags(args)
    if args.draft_model is not None and args.speculate == "off":
        raise OptionError("--draft-model drafts for --speculate only; add --speculate auto, or leave it out.")
    if args.draft_model is not None and args.kv_bits is not None:
        raise OptionError("--draft-model does not go with --kv-bits; leave one of them out.")


def add(parser: argparse.ArgumentParser) -> None:
    p = group_of(parser, "prompt")
    p.add_argument("--prompt", "-p", default="hello", help="the message; - reads standard input (hello)")
    p.add_argument("--system-prompt", metavar="TEXT", help="system prompt for the chat template")
    p.add_argument("--prefill-response", metavar="TEXT", help="text with which the answer starts")
    p.add_argument("--ignore-chat-template", action="store_true", help="take the prompt as plain text")
    p.add_argument("--chat-template-config", type=options.json_object, help="JSON object for the template")
    p.add_argument("--prompt-cache-file", help="continue what `ring-mlx cache-prompt` saved")
    a = group_of(parser, "answer")
    options.add_setting(a, "max_tokens", MAX_TOKENS, "-m")
    a.add_argument("--extra-eos-token", nargs="+", default=(), help="more tokens that end the answer")
    options.add_setting(a, "thinking_budget", None)
    form = a.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE|JSON", help="the answer is JSON that this schema allows")
    form.add_argument("--grammar", metavar="FILE|TEXT", help="the answer is a text of this GBNF or Lark grammar")
    form.add_argument("--regex", metavar="PATTERN", help="the answer is a text that this pattern matches as a whole")
    options.add_thinking_options(parser)
    options.add_speculate_option(parser)
    options.add_draft_option(a)
    o = group_of(parser, "output")
    o.add_argument(
        "--thinking", choices=("show", "hide", "fold"), default="show", help="how to print the thought (show)"
    )
    o.add_argument("--verbose", type=_str2bool, default=True, help="False prints only the text (True)")
    o.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options.add_quiet_option(parser)
    options.add_model_options(parser)
    options.add_expert_options(parser)
    options.add_distributed_option(parser)
    options.add_sampling_options(parser)
    options.add_prefill_options(parser)
    options.add_store_options(parser)


def _str2bool(text: str) -> bool:
    if text.lower() not in ("true", "t", "false", "f"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "t")
