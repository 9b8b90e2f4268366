"""The flags of mlx_lm that commands refuse, each with the reason and what to use instead."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ring_mlx.errors import OptionError
from ring_mlx.options import group_of

THEIR_NAMES = {"serve": "server", "cache-prompt": "cache_prompt"}
_ROTATES = "a rotating cache forgets the prompt, and a linear state cannot forget with it; {}"
_DRAFTED = "--speculate says how many tokens are drafted; give --speculate N"
_BATCH = "a batch has no quantized keys and values; save memory with --max-batch or --cache-memory"
_CODE = "code in a checkpoint is never run and never needed; leave it out"
_TEMPLATE = "there is no default template; the checkpoint's own is used if it has one"

REFUSED: dict[str, dict[tuple[str, ...], str]] = {
    "generate": {
        ("--max-kv-size",): _ROTATES.format("leave it out, or save memory with --kv-bits"),
        ("--num-draft-tokens",): _DRAFTED,
        ("--image",): "the model reads text only; leave it out",
        ("--quantize-activations", "-qa"): "activations are never quantized; leave it out",
        ("--use-default-chat-template",): _TEMPLATE,
        ("--trust-remote-code",): _CODE,
    },
    "chat": {
        ("--max-kv-size",): _ROTATES.format("leave it out"),
        ("--pipeline",): "a chat runs in one process; start `ring-mlx launch ... serve --distributed pipeline`",
        ("--trust-remote-code",): _CODE,
    },
    "serve": {
        ("--num-draft-tokens",): _DRAFTED,
        ("--kv-bits",): _BATCH,
        ("--kv-group-size",): _BATCH,
        ("--quantized-kv-start",): _BATCH,
        ("--pipeline",): "use `ring-mlx launch ... serve --distributed pipeline`",
        ("--use-default-chat-template",): _TEMPLATE,
        ("--trust-remote-code",): _CODE,
    },
    "convert": {("--trust-remote-code",): _CODE},
    "cache-prompt": {
        ("--max-kv-size",): _ROTATES.format("leave it out, or save memory with --kv-bits"),
        ("--eos-token",): "nothing is generated, so no token ends it; leave it out",
        ("--trust-remote-code",): _CODE,
    },
}


class Refusal(argparse.Action):
    """Ends the command as soon as the flag is read, with a value or without."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, flag: str | None = None
    ) -> NoReturn:
        """Raise OptionError."""
        raise OptionError(f"{flag} is not supported: {self.help}.")


def add_refused(parser: argparse.ArgumentParser, command: str) -> None:
    """The flags that a command of ours refuses."""
    for flags, why in REFUSED.get(command, {}).items():
        group = group_of(parser, f"flags of mlx_lm.{THEIR_NAMES.get(command, command)} that are refused, and why")
        group.add_argument(*flags, action=Refusal, nargs="*", metavar="X", default=argparse.SUPPRESS, help=why)
