"""Renders chat templates in a separate process that can be ended, since a template is a checkpoint's program.

Run as a file by `ring_mlx.generation.templates`. Reads a JSON object a line: ``template``, ``variables``, ``messages`` after the
``same`` first ones of the request before, and the ``most`` characters of output. Answers ``error``, with ``broken`` where it is no template, or ``text`` after the
``same`` first characters of the text before, which counts as empty where no message was the same. What templates are given is what transformers gives them, in its sandbox:
the filter ``tojson``, ``raise_exception``, ``strftime_now``, ``dict``, ``namespace`` and the tag ``generation``.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, ext, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CPU_S, MEMORY_BYTES, MOST_DIGITS = 2, 512 << 20, 1000


class Generation(ext.Extension):
    """``{% generation %}``, which marks the model's own words in training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Names(Namespace):
    """``namespace()`` without names that begin with an underscore, which would lead to Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        made = dict(*given, **kwargs)
        for name in made:
            _check_name(name)
        Namespace.__init__(self, made)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class Environment(ImmutableSandboxedEnvironment):
    """transformers' sandbox, in which no power is so large that its digits take long."""

    intercepted_binops = frozenset(["**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "**" and not (numbers and max(abs(left), abs(right)) <= MOST_DIGITS):
            raise SecurityError(f"{operator} of such large numbers")
        return super().call_binop(context, operator, left, right)


def main() -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _bound_memory()
    messages: list[Any] = []
    text = ""
    for line in sys.stdin:
        _bound_time()
        request = json.loads(line)
        messages[request["same"] :] = request["messages"]
        answer = _answer(request["template"], {**request["variables"], "messages": messages}, request["most"])
        if "text" in answer:
            before, text = text if request["same"] else "", answer["text"]
            same = common_text(before, text)
            answer = {"same": same, "text": text[same:]}
        print(json.dumps(answer), flush=True)


def common_text(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _answer(template: str, variables: dict[str, Any], most: int) -> dict[str, Any]:
    try:
        text, pieces = 0, []
        for piece in _compiled(template).generate(variables):
            text += len(piece)
            if text > most:
                return {"error": f"its output is longer than {most:,} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except TemplateSyntaxError as e:
        return {"error": str(e)[:2000], "broken": True}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as e:  # noqa: BLE001 a template is a program of the checkpoint's author
        return {"error": str(e)[:2000] or type(e).__name__}


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": Names,
    }
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name like {name!r}")


def _bound_memory() -> None:
    """Limit memory from now on; macOS ignores the limit, so only time is limited there."""
    try:
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    _bound(resource.RLIMIT_AS, now + MEMORY_BYTES)


def _bound_time() -> None:
    """Limit the present request, in processor time, so that a busy machine refuses nothing."""
    _bound(resource.RLIMIT_CPU, math.ceil(time.process_time()) + CPU_S)


def _bound(kind: int, wanted: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    main()
