"""Chat templates, rendered by a process that is ended if one takes too long or too much memory.

The process is started with the first tokenizer, serves all, and ends with this one.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.template_files import MAX_TEMPLATE
from ring_mlx.errors import TokenizerError
from ring_mlx.generation.tool_calls import with_objects
from ring_mlx.model.config_values import some
from ring_mlx.system.terminal_text import whole_text

WORKER = Path(__file__).with_name("template_worker.py")
MORE_OUTPUT, TIMES_INPUT = 1 << 20, 4
RESERVED = ("messages", "tools", "add_generation_prompt")
REASONING = ("reasoning_content", "thinking", "reasoning")
# Ends the last message where it is to be gone on with; everything from it on is cut off.
MARK = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True)
class _Written:
    """A message as JSON, and the message itself if it is text only, which does not change."""

    texts: tuple[tuple[str, str], ...] | None
    json: str


class _Worker:
    """The process as its user sees it; one request at a time.

    It keeps the messages and the text of its last answer, since a turn renders its conversation many times with another
    end: what is the same crosses the pipe once.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._messages: list[_Written] = []
        self._text = ""

    def start(self) -> None:
        """Start the process unless it runs."""
        with self._lock:
            self._started()

    def ask(self, template: str, variables: str, messages: list[dict[str, Any]]) -> dict[str, str] | None:
        """The answer, or None if the process ended; ``variables`` are JSON, without the messages."""
        with self._lock:
            process, answer = self._started(), ""
            # What an interruption leaves behind is unknown, so nothing is until there is an answer.
            (known, before), (self._messages, self._text) = (self._messages, self._text), ([], "")
            written = [_write(m, old) for m, old in zip_longest(messages, known[: len(messages)])]
            same = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], zip(written, known, strict=False)))
            request = _request(template, variables, written, same)
            try:
                print(request, file=process.stdin, flush=True)
                answer = process.stdout.readline() if process.stdout else ""
            except BrokenPipeError:
                pass
            finally:
                # An answer that no one waited for must not be taken for the next one.
                if not answer.endswith("\n"):
                    self.end()
            if not answer.endswith("\n"):
                return None
            found = json.loads(answer)
            if "error" in found:
                return dict(found)
            self._messages, self._text = written, before[: found["same"]] + found["text"]
            return {"text": self._text}

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self.end()
        if self._process is None:
            pipe, command = subprocess.PIPE, [sys.executable, "-P", str(WORKER)]
            try:
                self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            except OSError as e:
                raise TokenizerError(f"chat templates need a process ({e}); raise the limit of processes.") from None
        return self._process

    def end(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        self._messages, self._text = [], ""
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            process.wait()


_worker = _Worker()
atexit.register(_worker.end)
# The process that a fork inherits is its parent's.
os.register_at_fork(after_in_child=lambda: vars(_worker).update(vars(_Worker())))


def warm() -> None:
    """Start the process, so that the first prompt does not wait for it."""
    _worker.start()


def render_chat(
    tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any
) -> list[int]:
    """Messages to token ids through the checkpoint's own template; same arguments and errors as `render_text`."""
    text = render_text(tokenizer, messages, *args, **kwargs)
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def use_template(tokenizer: TokenizerWrapper, template: str, template_options: Mapping[str, Any]) -> None:
    """Replace the checkpoint's chat template; a TokenizerError if it cannot render a short message."""
    tokenizer.has_chat_template, tokenizer.chat_template = True, template
    render_text(tokenizer, [{"role": "user", "content": "Hello"}], template_options=template_options)


def render_text(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
    continue_last: bool = False,
    add_generation_prompt: bool | None = None,
) -> str:
    """The text of a conversation by the template, as transformers would render it.

    Raises TokenizerError if there is no template or it is broken, refuses the messages or takes too long.

    Args:
        messages: Objects with ``role`` and ``content``.
        tools: Tool descriptions for the template, or None.
        template_options: Further template arguments, such as ``enable_thinking``.
        continue_last: Leave the last (assistant) message open.
        add_generation_prompt: Start a new message; by default unless ``continue_last``.
    """
    if not tokenizer.has_chat_template:
        raise TokenizerError("the checkpoint has no chat template; use --ignore-chat-template for plain text.")
    try:
        begins = not continue_last if add_generation_prompt is None else add_generation_prompt
        text = _rendered(tokenizer, messages, tools or None, template_options or {}, continue_last, begins)
    except (ValueError, TypeError) as e:
        raise TokenizerError(f"the chat template refused the messages ({e}); check roles and contents.") from None
    return whole_text(text)


def _rendered(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
    continue_last: bool,
    begins: bool,
) -> str:
    if not messages:
        raise ValueError("there is no message")
    template = _chosen(tokenizer, tools)
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise ValueError("it is no text, or too long")
    taken = [name for name in RESERVED if name in options]
    if taken:
        raise ValueError(f"{taken[0]} is no option")
    said = [_message(m) for m in messages]
    final = _mark(said, template) if continue_last else ""
    variables = {
        **tokenizer.special_tokens_map,
        "documents": None,
        "enable_thinking": tokenizer.has_thinking,
        **options,
        "tools": tools,
        "add_generation_prompt": begins,
    }
    given = json.dumps(variables, default=str)
    answer = _worker.ask(template, given, said)
    if answer is not None and "error" in answer and (plain := _plain(said)) != said:
        # Some templates take text and arguments in one form only; a conversation must go on with whatever was said.
        second = _worker.ask(template, given, plain)
        answer = answer if second is None or "error" in second else second
    if answer is None:
        raise ValueError("it takes too long or too much memory")
    if "broken" in answer:
        raise TokenizerError(
            f"the chat template is broken ({answer['error']}); take it from the original checkpoint, or give "
            "--ignore-chat-template for plain text."
        )
    if "error" in answer:
        raise ValueError(answer["error"])
    return _before_mark(answer["text"], final) if continue_last else answer["text"]


def _chosen(tokenizer: TokenizerWrapper, tools: object) -> object:
    """The text of the template, as transformers chooses it."""
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named and not (tools and "tool_use" in named):
        raise TokenizerError(
            f"the checkpoint has no default chat template, only {some(sorted(named))}; give --ignore-chat-template for "
            "plain text."
        )
    return tokenizer.get_chat_template(None, tools)


def _request(template: str, variables: str, messages: Sequence[_Written], same: int) -> str:
    most = MORE_OUTPUT + TIMES_INPUT * (len(variables) + sum(len(m.json) for m in messages))
    return (
        f'{{"most": {most}, "template": {json.dumps(template)}, "variables": {variables}, "same": {same}, '
        f'"messages": [{", ".join(m.json for m in messages[same:])}]}}'
    )


def _write(message: Mapping[str, Any], before: _Written | None) -> _Written:
    """A message as JSON, or ``before`` if it is the same."""
    texts = tuple(message.items()) if all(type(v) is str for v in message.values()) else None
    if before is not None and texts is not None and texts == before.texts:
        return before
    written = _Written(texts, json.dumps(message, default=str))
    return before if before == written else written


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without entries that are None, and with the thought under the names that templates read.

    Templates put a line break between text and calls; clients keep the model's own, drop it or trim it.
    """
    made = {k: v for k, v in message.items() if v is not None}
    if made.get("tool_calls") and isinstance(made.get("content"), str):
        made["content"] = made["content"].rstrip()
    thought = next((made[k] for k in REASONING if k in made), None)
    return made if thought is None else {"thinking": thought, **made, "reasoning_content": thought}


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with texts in one piece, empty ones for answers of calls alone, and objects as arguments."""
    made = []
    for message in messages:
        parts = message.get("content", "" if message.get("role") == "assistant" else None)
        if isinstance(parts, list) and parts and all(isinstance(p, Mapping) and "text" in p for p in parts):
            parts = "".join(str(p["text"]) for p in parts)
        message = message if parts is None else {**message, "content": parts}
        made.append(with_objects(message) if message.get("tool_calls") else message)
    return made


def _mark(messages: list[dict[str, Any]], template: str) -> str:
    """Mark the end of the last message, and return its text."""
    content = messages[-1].get("content") if messages and "content" in template else None
    if isinstance(content, list):
        place = next((i for i in reversed(range(len(content))) if "text" in content[i]), None)
        if place is not None:
            text = str(content[place]["text"])
            marked = [*content[:place], {**content[place], "text": text + MARK}, *content[place + 1 :]]
            messages[-1] = {**messages[-1], "content": marked}
            return text
    if not isinstance(content, str):
        raise TypeError("the last message has no text that could go on")
    messages[-1] = {**messages[-1], "content": content + MARK}
    return content


def _before_mark(text: str, final: str) -> str:
    at = text.rfind(MARK.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError("it changes the last message, so that it cannot go on")
    # Where the space behind the mark is gone, the template strips messages.
    return text[:at] if text[at:].startswith(MARK) else text[:at].rstrip()
