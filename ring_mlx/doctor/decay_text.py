"""Text for the decay check: the more wrongly a model forgets, the less likely it finds this text.

A wrong decay hardly shows in what was said last, so the packaged text is long: conversations of the demo suite that
state many facts, several of which are then asked for, each on its own. The facts' values cannot be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.errors import OptionError
from ring_mlx.evaluation.perplexity import encode, read_text
from ring_mlx.evaluation.sharing import shared
from ring_mlx.evaluation.suite import Question, read_suite, suite_path
from ring_mlx.generation.templates import render_chat, render_text
from ring_mlx.generation.thinking import opens_thought
from ring_mlx.generation.thought_end import THINK_END, THINK_START

PROBES = 24
PASSAGE_TOKENS = 8192
TASK = "recall-"
FACT = re.compile(r"\b([A-Z]\w+)'s ([a-z]+(?: [a-z]+)?) is (\w+)\.")


class Probe(NamedTuple):
    """Tokens that continue a text, and from which on they are counted."""

    ids: list[int]
    first: int


class Part(NamedTuple):
    """A text to read once, and what is scored after it; a part without probes is scored itself."""

    shared: list[int]
    probes: list[Probe]

    @property
    def tokens(self) -> int:
        return len(self.shared) + sum(len(p.ids) for p in self.probes)


def parts_of_file(path: Path, tokenizer: TokenizerWrapper, context: int, most: int) -> list[Part]:
    """A text file in parts as long as the context allows, at most ``most`` tokens in all."""
    ids = encode(read_text(path, "--text"), tokenizer, f"--text {path}")[: max(2, most)]
    size = min(context, PASSAGE_TOKENS)
    pieces = [ids[at : at + size] for at in range(0, len(ids), size)]
    return [Part(piece, []) for piece in pieces if len(piece) > 1]


def packaged_parts(tokenizer: TokenizerWrapper, context: int, most: int) -> list[Part]:
    """Conversations of the demo suite, the longest that fit the context, at most ``most`` tokens in all.

    Raises OptionError if context and ``most`` hold none of them.
    """
    found: list[Part] = []
    left = most
    for size, question in _longest_first(read_suite(suite_path("demo"))):
        part = _part(tokenizer, question) if size <= min(context, left) else None
        if part and part.tokens <= left and len(part.shared) + max(len(p.ids) for p in part.probes) <= context:
            found.append(part)
            left -= part.tokens
            if left < most // 4:
                break
    if not found:
        raise OptionError(
            f"the context of {context:,} and {most:,} tokens hold no conversation of the demo suite; give --text FILE, "
            "or more --tokens."
        )
    return found


def _longest_first(questions: Sequence[Question]) -> list[tuple[int, Question]]:
    """Recalls with the tokens of the toy's tokenizer that their name, such as recall-1024, promises."""
    sizes = [(int(q.task.removeprefix(TASK)), q) for q in questions if q.task.startswith(TASK)]
    return sorted(sizes, key=lambda pair: -pair[0])


def _part(tokenizer: TokenizerWrapper, question: Question) -> Part | None:
    """The conversation without its question, and facts of its first half asked for; None if it states none plainly."""
    *before, last = question.messages
    body = " ".join(re.split(r"(?<=\.)\s+", last["content"])[:-1])
    said = " ".join(m["content"] for m in (*before, {"content": body}) if m.get("role", "user") == "user")
    facts = FACT.findall(said)
    facts = facts[: max(1, len(facts) // 2)]
    asked = facts[:: max(1, len(facts) // PROBES)][:PROBES]
    probes = [_probe(tokenizer, before, body, *fact) for fact in asked]
    if not probes:
        return None
    same = _common([p.ids[: p.first] for p in probes])
    return Part(probes[0].ids[:same], [Probe(p.ids[same:], p.first - same) for p in probes])


def _probe(
    tokenizer: TokenizerWrapper, before: Sequence[dict[str, str]], body: str, name: str, thing: str, value: str
) -> Probe:
    messages = [*before, {"role": "user", "content": f"{body} What is {name}'s {thing}?".strip()}]
    prompt = render_chat(tokenizer, messages)
    opening = "" if opens_thought(render_text(tokenizer, messages)) else f"{THINK_START}\n"
    answer = f"{opening}{name}'s {thing} is {value}.\n{THINK_END}\n\nIt is {value}."
    return Probe([*prompt, *(int(i) for i in tokenizer.encode(answer, add_special_tokens=False))], len(prompt))


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts start with, but the last of the shortest."""
    return min(shared(*prompts), min(map(len, prompts)) - 1)
