"""Recall at depth: a fact stated somewhere in a long text, asked for at its end."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as cached
from functools import partial
from itertools import islice, takewhile
from typing import NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.errors import OptionError
from ring_mlx.evaluation.needles import MOST_FACTS, Fact, draw_facts
from ring_mlx.evaluation.needles import filler as small_talk
from ring_mlx.evaluation.sharing import SharedReader
from ring_mlx.generation.decoding import generate_step, prefill_step_or_default
from ring_mlx.generation.defaults import MAX_TOKENS
from ring_mlx.generation.sampling_ranges import within
from ring_mlx.generation.templates import render_chat, render_text
from ring_mlx.generation.thinking import ThoughtSplitter, splitter_after
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.model import Model
from ring_mlx.system.progress import Progress, TimeLeft


@dataclass(frozen=True)
class Cell:
    """Answers to the facts at one depth (0 is the start of the text, 1 its end) of texts of one length.

    ``tokens`` are the longest prompt's; ``cut_off`` answers did not end within the tokens allowed.
    """

    length: int
    depth: float
    tokens: int
    right: int
    asked: int
    cut_off: int


@dataclass(frozen=True)
class Grid:
    """Cells by length, then depth; tokens of all prompts, and those read, as shared starts are read once."""

    cells: list[Cell]
    prompt_tokens: int
    read_tokens: int


class Asked(NamedTuple):
    """One question: where its fact stands, its prompt, and what separates the thought from the answer."""

    length: int
    depth: float
    fact: Fact
    ids: list[int]
    splitter: ThoughtSplitter


def depths_of(count: int) -> list[float]:
    """So many depths, evenly from the start to the end; one alone is the middle."""
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]


def recall(
    model: Model,
    tokenizer: TokenizerWrapper,
    lengths: Sequence[int],
    depths: int,
    *,
    needles: int = 3,
    max_tokens: int = MAX_TOKENS,
    filler: Iterator[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Grid:
    """Ask for facts hidden at every depth of every length, greedily.

    All lengths are beginnings of one text, so what prompts share is read once.

    Args:
        lengths: Tokens of the prompts, about.
        depths: How many, as `depths_of`.
        needles: Facts stated together at each place, each asked for alone.
        max_tokens: Of an answer, thought included; -1 is what the context holds.
        filler: Sentences; None is small talk.
        progress: Called with (questions answered, all, how many are right, seconds left) and after each step of a text.

    Raises:
        OptionError: If a length holds no sentence beside the facts or exceeds the context, or there are more facts
            than can be drawn.
    """
    if needles > MOST_FACTS:
        raise OptionError(f"--needles {needles} is more than {MOST_FACTS} different facts; give fewer.")
    context = model.config.context_tokens
    room = max(max_tokens, 1)
    if max(lengths) + room > context:
        raise OptionError(
            f"--recall {max(lengths)} and {room} tokens of an answer exceed the context of {context}; give less."
        )
    asked = _questions(tokenizer, sorted(set(lengths)), depths_of(depths), needles, filler, seed)
    graded: dict[int, tuple[bool, bool]] = {}

    def tell(tokens: int) -> None:
        if tokens:
            time_left.did("tokens", tokens)
        if progress:
            right = sum(is_right for is_right, _ in graded.values())
            progress(len(graded), len(asked), f"{right} right" * bool(graded), time_left.left_s())

    reader = SharedReader(model, [a.ids for a in asked], prefill_step_or_default(), tell)
    time_left = TimeLeft(tokens=reader.total_tokens(), answers=len(asked))
    for i, cache, rest in reader.read():
        most = within(max_tokens, context - len(asked[i].ids) + 1)
        graded[i] = _answer(model, tokenizer, asked[i], cache, rest, most, tell)
        time_left.did("answers", 1)
        tell(0)
    return Grid(_cells(asked, graded), sum(len(a.ids) for a in asked), reader.read_tokens)


def table(grid: Grid) -> str:
    """As text: a line a length, a column a depth."""
    lengths, depths = axes(grid)
    by_place = {(c.length, c.depth): c for c in grid.cells}
    lines = [f"{'tokens':>9} " + " ".join(f"{f'at {d:.0%}':>8}" for d in depths)]
    for length in lengths:
        row = [by_place[length, d] for d in depths]
        lines.append(f"{length:9,} " + " ".join(f"{c.right / c.asked:8.0%}" for c in row))
    asked, cut = (sum(getattr(c, name) for c in grid.cells) for name in ("asked", "cut_off"))
    lines.append(f"{asked} questions of {grid.prompt_tokens:,} tokens, of which {grid.read_tokens:,} were read")
    if cut:
        lines.append(f"{cut} answers did not end within --max-tokens; they count as they stand")
    return "\n".join(lines)


def axes(grid: Grid) -> tuple[list[int], list[float]]:
    return sorted({c.length for c in grid.cells}), sorted({c.depth for c in grid.cells})


def _questions(
    tokenizer: TokenizerWrapper,
    lengths: Sequence[int],
    depths: Sequence[float],
    needles: int,
    filler: Iterator[str] | None,
    seed: int,
) -> list[Asked]:
    @cached
    def cost(sentence: str) -> int:
        return len(tokenizer.encode(f" {sentence}", add_special_tokens=False))

    facts = {
        (length, d): draw_facts(random.Random(f"{seed} {length} {d}"), needles) for length in lengths for d in depths
    }
    frames = {length: max(_size(tokenizer, facts[length, d]) for d in depths) for length in lengths}
    text = list(islice(filler or iter(partial(small_talk, random.Random(seed)), None), max(lengths)))
    asked = []
    for length in lengths:
        room, taken = length - frames[length], 0
        while taken < len(text) and (room := room - cost(text[taken])) >= 0:
            taken += 1
        if not taken:
            raise OptionError(
                f"--recall {length} has no room for filler beside {frames[length]} tokens of facts and template; "
                "give more tokens, or fewer --needles."
            )
        for d in depths:
            at = round(d * taken)
            stated = [*text[:at], *(f.stated for f in facts[length, d]), *text[at:taken]]
            for fact in facts[length, d]:
                messages = [{"role": "user", "content": " ".join([*stated, fact.question])}]
                splitter = splitter_after(render_text(tokenizer, messages))
                asked.append(Asked(length, d, fact, render_chat(tokenizer, messages), splitter))
    return asked


def _size(tokenizer: TokenizerWrapper, facts: Sequence[Fact]) -> int:
    """Tokens of a prompt without filler."""
    content = " ".join([*(f.stated for f in facts), facts[0].question])
    return len(render_chat(tokenizer, [{"role": "user", "content": content}]))


def _answer(
    model: Model,
    tokenizer: TokenizerWrapper,
    asked: Asked,
    cache: HybridCache,
    rest: Sequence[int],
    max_tokens: int,
    tell: Callable[[int], None],
) -> tuple[bool, bool]:
    """Whether the answer is right, and whether it was cut off; ``tell`` is called with the tokens of each step."""
    read = 0

    def report(done: int, total: int) -> None:
        nonlocal read
        tell(done - read)
        read = done

    steps = generate_step(rest, model, cache, max_tokens=max_tokens, progress=report)
    out = list(takewhile(lambda token: token not in tokenizer.eos_token_ids, (token for token, _ in steps)))
    visible = asked.splitter.feed_last(tokenizer.decode(out))[1]
    return holds(visible, asked.fact.value), len(out) == max_tokens


def holds(answer: str, value: str) -> bool:
    """Whether the answer names the value as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer, re.IGNORECASE) is not None


def _cells(asked: Sequence[Asked], graded: dict[int, tuple[bool, bool]]) -> list[Cell]:
    places: dict[tuple[int, float], list[int]] = {}
    for i, a in enumerate(asked):
        places.setdefault((a.length, a.depth), []).append(i)
    cells = []
    for place, members in places.items():
        right, cut_off = (sum(column) for column in zip(*(graded[i] for i in members), strict=True))
        cells.append(Cell(*place, max(len(asked[i].ids) for i in members), right, len(members), cut_off))
    return cells
