"""What `--speculate auto` gains with the toy, task by task: ``python -m benchmarks.speculation_tasks``, or ``--draft`` for a draft model.

Of each task's answers, the seconds after their first tokens: plain, and with drafts, in alternation. A warm pace is kept from
answer to answer, as in a chat; a cold one is new for each, as in `ring-mlx generate`. The text that is sent back with one change
is forced, since the toy cannot do that. With ``--draft`` the toy has four times its layers, of which the added ones do nothing, and
drafts come from the plain toy with weights rounded to a few bits.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper

from benchmarks.common import arguments, report
from ring_mlx import demo_model_path, load, render_chat
from ring_mlx.generation.decoding import decode, prefill, step_sizes
from ring_mlx.generation.draft_model import DraftModel, LookupOrModel
from ring_mlx.generation.drafts import Drafter, PromptLookup
from ring_mlx.generation.pace import Pace
from ring_mlx.generation.speculation import speculate
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.model import Model

FACTS = (
    "Remember that Anna's code word is lantern. Ben's favourite fruit is mango. Clara's home town is Marlow. "
    "David's locker code is 4071. Emma's instrument is cello. Frank's favourite colour is silver."
)
FILE = "\n".join(
    f"The {word} of room {n} is {n * 37 % 100}." for n, word in enumerate(["door", "lamp", "desk", "clock"] * 4)
)
# Questions of a chat, one conversation each; what is said repeats, or does not.
TASKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sorting": (
        ("Sort these numbers: 41 7 93 25 68 12",),
        ("Sort these words: pear lantern apple garden stone",),
        ("Sort these numbers: 5 81 33 60 2 77 49",),
    ),
    "recall": ((f"{FACTS} What is David's locker code?", "What is Anna's code word?", "And Clara's home town?"),),
    "spelling": (
        ('Spell the word "lantern" backwards.',),
        ('Spell the word "garden".',),
        ('Spell "marble" backwards.',),
    ),
    "follow-ups": (("What is 12 + 30?", "Now add 5.", "Now double it.", "Then add 12.", "What is 12 + 30?"),),
    "one change": ((f"Write this again with lamp for door.\n{FILE}",),),
    "small talk": (("Hello!",), ("What can you do?",), ("How are you today?",), ("Tell me about yourself.",)),
    "sums": (("What is 4756 + 3879?",), ("What is 92 - 37?",), ("What is 48 * 7?",), ("What is 731 + 268?",)),
}


class Answer(NamedTuple):
    """A prompt that was read, and what follows: ``text`` of so many tokens, forced where the model would say another."""

    ids: list[int]
    cache: HybridCache
    logits: mx.array
    text: list[int]
    is_forced: bool

    def options(self) -> dict[str, Any]:
        """For `decode` and `speculate`."""
        return {
            "max_tokens": len(self.text),
            "next_forced": partial(next, iter(self.text if self.is_forced else ()), None),
        }


def answers(model: Model, tokenizer: TokenizerWrapper, name: str, most: int) -> Iterator[Answer]:
    """The answers to a task's questions."""
    for questions in TASKS[name]:
        messages: list[dict[str, str]] = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            ids = render_chat(tokenizer, messages)
            cache = model.make_cache()
            *_, (_, logits) = prefill(mx.array(ids), model, cache, step_sizes(len(ids), 128))
            if name == "one change":
                text = tokenizer.encode(FILE.replace("door", "lamp"), add_special_tokens=False)
            else:
                text = list(until_stop(model, tokenizer, logits, cache.copy(), ids, most))
            messages.append({"role": "assistant", "content": tokenizer.decode(text[:-1])})
            yield Answer(ids, cache, logits, text, name == "one change")


def until_stop(
    model: Model, tokenizer: TokenizerWrapper, logits: mx.array, cache: HybridCache, ids: Sequence[int], most: int
) -> Iterator[int]:
    """The tokens of an answer."""
    for token, _ in decode(logits, model, cache, mx.array(list(ids)), max_tokens=most):
        yield token
        if token in tokenizer.eos_token_ids:
            return


class Ways:
    """The ways to give a task's answers, and what they counted."""

    def __init__(self, model: Model, draft: Model | None, found: Sequence[Answer]) -> None:
        self._model, self._draft, self._found = model, draft, found
        self.warm = Pace()

    def _seconds(self, answer: Answer, pace: Pace | None) -> npt.NDArray[np.float64]:
        """By the clock and of the processor, after the answer's first token."""
        ids, cache = answer.ids, answer.cache.copy()
        if pace is None:
            steps = decode(answer.logits, self._model, cache, mx.array(ids), **answer.options())
        else:
            drafter = self._drafter(ids, pace)
            steps = speculate(answer.logits, self._model, cache, ids, drafter, pace, **answer.options())
        next(steps)
        began = time.perf_counter(), time.process_time()
        said = [token for token, _ in steps]
        assert said == answer.text[1:]
        return np.array([time.perf_counter(), time.process_time()]) - began

    def _drafter(self, ids: Sequence[int], pace: Pace) -> Drafter:
        lookup = PromptLookup(ids)
        return lookup if self._draft is None else LookupOrModel(lookup, DraftModel(self._draft, ids), pace)

    def row(self, repeats: int) -> dict[str, Any]:
        """What was measured: each answer in each way, one after the other, so that a round has one load of the machine."""
        cold = Pace()
        rounds = []
        for n in range(repeats + 1):
            each = []
            for answer in self._found:
                own = Pace()
                each.append([self._seconds(answer, pace) for pace in (None, self.warm, own)])
                cold.steps, cold.tokens = cold.steps + own.steps, cold.tokens + own.tokens
            rounds += [np.sum(each, axis=0)] * bool(n)
        count = sum(len(answer.text) for answer in self._found)
        return {
            "tokens": count,
            "off tok/s": [count / off[0] for off, _, _ in rounds],
            "ratio": [float(off[0] / warm[0]) for off, warm, _ in rounds],
            "of processor": statistics.median(float(off[1] / warm[1]) for off, warm, _ in rounds),
            "cold": [float(off[0] / cold[0]) for off, _, cold in rounds],
            "cold of processor": statistics.median(float(off[1] / cold[1]) for off, _, cold in rounds),
            "accepted": self.warm.accepted / self.warm.drafted if self.warm.drafted else 0.0,
            "tokens a step": self.warm.tokens / self.warm.steps,
            "cold tokens a step": cold.tokens / cold.steps,
        }


def deeper(model: Model, times: int) -> Model:
    """The model with more layers, which add nothing to the residual stream but take as long."""
    layers = list(model.layers)
    for n in range(len(layers) * (times - 1)):
        layer = copy.deepcopy(layers[n % len(model.layers)])
        for name, module in layer.named_modules():
            if name.endswith(("dense", "down_proj")):
                module.update({k: mx.zeros_like(v) for k, v in module.parameters().items()})
        layers.append(layer)
    model.model.layers = layers
    return model


def coarser(model: Model, bits: int) -> Model:
    """The model with its packed weights rounded to fewer bits."""
    for module in model.modules():
        if "scales" in module:
            how = {"group_size": module.group_size, "bits": module.bits}
            plain = mx.dequantize(module.weight, module.scales, module.biases, **how)
            rough = mx.dequantize(*mx.quantize(plain, module.group_size, bits), module.group_size, bits)
            module.weight, module.scales, module.biases = mx.quantize(rough, **how)
    return model


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer at most (200)")
    parser.add_argument("--task", choices=tuple(TASKS), action="append", help="only this one; may be repeated")
    parser.add_argument("--draft", type=int, metavar="BITS", help="draft with the toy in so many bits for a deeper toy")
    args = parser.parse_args()
    model, tokenizer = load(demo_model_path())
    draft = None
    if args.draft:
        draft, model = coarser(load(demo_model_path())[0], args.draft), deeper(model, 4)
    rows = (
        {"task": name, **Ways(model, draft, list(answers(model, tokenizer, name, args.tokens))).row(args.repeats)}
        for name in args.task or TASKS
    )
    about = f"a toy of {len(model.layers)} layers, drafts by the toy in {args.draft} bits" if args.draft else "the toy"
    report(args, rows, about)


if __name__ == "__main__":
    main()
