"""``ring-mlx agent``: the configuration of a coding agent for a running server, printed or used."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ring_mlx.cli.agents import KEY, RECIPES, Endpoint, Recipe
from ring_mlx.errors import OptionError
from ring_mlx.system.terminal_text import for_output, note

TIMEOUT_S = 10.0
MOST_BYTES = 1 << 20
# Agents keep room for an answer within the context; more than this would leave too little for the conversation.
ANSWER_PART, MOST_ANSWER = 4, 32_768
# Agents begin with instructions and tools of 15,000 to 50,000 tokens.
SMALL_CONTEXT = 32_768


def run(args: argparse.Namespace) -> int:
    """Print the configuration, or start the tool with it; returns the tool's exit code."""
    key = args.api_key if args.api_key is not None else os.environ.get(KEY)
    served = ask(args.url, args.model, key)
    if served.context_tokens < SMALL_CONTEXT:
        note(f"note: {served.model} has a context of {served.context_tokens:,} tokens, which is little for an agent.")
    if args.words is not None:
        return start(RECIPES[args.tool](served), args.words)
    hidden = replace(served, key=f"${KEY}") if key else served
    for line in printed(RECIPES[args.tool](hidden), hidden):
        print(for_output(line))
    return 0


def ask(url: str, model: str | None, key: str | None) -> Endpoint:
    """What a server says of a model. Raises OptionError if there is no server, or not this model."""
    url = url.rstrip("/").removesuffix("/v1")
    listed = _models(url, key)
    names = [str(one["id"]) for one in listed]
    if odd := next((name for name in names if not name.isprintable()), None):
        raise OptionError(f"{url} has a model of the name {odd!r}, which no shell can take; give it another name.")
    if model is not None and model not in names:
        raise OptionError(f"{url} has no model {model!r}; give one of {', '.join(names[:20])}.")
    found = listed[names.index(model)] if model is not None else listed[0]
    context = found.get("context_length")
    if not isinstance(context, int):
        raise OptionError(
            f"{url} does not know the context of {found['id']} before it is loaded; send it a request first, then try again."
        )
    return Endpoint(url, str(found["id"]), key or "none", context, min(context // ANSWER_PART, MOST_ANSWER))


def printed(recipe: Recipe, served: Endpoint) -> Iterator[str]:
    """The lines of a shell script that does what --run does."""
    yield f"# {recipe.program} with {served.model} at {served.url}: a context of {served.context_tokens:,} tokens"
    yield f"# (if there is no {recipe.program}: {recipe.install})"
    paths = {name: f"ring-mlx-{name}" for name in recipe.files}

    def quoted(text: str) -> str:
        return f'"{text}"' if text == f"${KEY}" else shlex.quote(_with_paths(text, paths))

    for name, text in recipe.files.items():
        yield f"cat > {paths[name]} <<END"  # the shell puts the key in place of its name, and nothing else
        yield from re.sub(r"[\\`$]", r"\\\g<0>", text).replace(f"\\${KEY}", f"${KEY}").splitlines()
        yield "END"
    for name, value in recipe.variables.items():
        if value != f"${name}":
            yield f"export {name}={quoted(value)}"
    yield " ".join([recipe.program, *map(quoted, recipe.arguments)])


def start(recipe: Recipe, more: list[str]) -> int:
    """Run the tool; its files are temporary. Returns its exit code. Raises OptionError if it is not installed."""
    program = shutil.which(recipe.program)
    if program is None:
        raise OptionError(f"there is no {recipe.program} on the path; install it with {recipe.install!r}.")
    with tempfile.TemporaryDirectory(prefix="ring-mlx-agent-") as folder:
        paths = {name: str(Path(folder) / name) for name in recipe.files}
        for name, text in recipe.files.items():
            Path(paths[name]).write_text(text)
        variables = {name: _with_paths(value, paths) for name, value in recipe.variables.items()}
        command = [program, *(_with_paths(word, paths) for word in recipe.arguments), *more]
        try:
            child = subprocess.Popen(command, env={**os.environ, **variables})
        except OSError as e:
            raise OptionError(
                f"{program} cannot be started ({e.strerror}); install it with {recipe.install!r}."
            ) from None
        # The terminal's Ctrl-C is for the tool, which may go on after it.
        before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _with_paths(text: str, paths: dict[str, str]) -> str:
    return re.sub(r"\{([a-z]+\.[a-z]+)\}", lambda m: paths.get(m[1], m[0]), text)


def _models(url: str, key: str | None) -> list[dict[str, Any]]:
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        parts = urlsplit(url)
        if parts.scheme not in kinds or parts.hostname is None:
            raise ValueError("it is no address such as http://127.0.0.1:8080")
        connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=TIMEOUT_S)
        try:
            connection.request(
                "GET", f"{parts.path}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {}
            )
            answer = connection.getresponse()
            if answer.status == 401:
                raise OptionError(f"{url} wants another key; give it in {KEY}.")
            found = json.loads(answer.read(MOST_BYTES))["data"]
            assert isinstance(found, list)
            assert found
            assert all(isinstance(one, dict) and "id" in one for one in found)
            return found
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AssertionError) as e:
        why = str(e) if isinstance(e, (OSError, ValueError)) and str(e) else "its answer is not a list of models"
        raise OptionError(
            f"no server of ring-mlx answers at {url} ({why}); start `ring-mlx serve`, or give --url."
        ) from None
