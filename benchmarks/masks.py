"""``python -m benchmarks.masks``: what forms of answers cost a token, with a vocabulary of 157,184 ids.

The tokenizer is made up: byte-level, with tokens of words and of code from Python's own modules. For each form, a document is taken token by token;
seconds are those of taking a token, of making its mask, and of applying it to logits. Also timed are the tokenizer and each grammar.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ring_mlx.checkpoint.vocabulary import know_all_ids
from ring_mlx.generation.constraint import Constraint
from ring_mlx.generation.forms import CallForm, Form, TextForm
from ring_mlx.generation.grammars import Grammars

ROWS, END = 157_184, "<|end|>"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["customer", "supplier", "employee"]},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "city": {"type": "string"}}},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 8},
        "email": {"type": "string", "pattern": "^[a-z0-9.]+@[a-z0-9.]+$"},
    },
    "required": ["name", "age", "kind", "address", "tags", "email"],
    "additionalProperties": False,
}
SAID = json.dumps(
    {
        "name": "Ada Lovelace of Ockham Park, “Countess”",
        "age": 36,
        "kind": "customer",
        "address": {"street": "12 St James's Square", "city": "London"},
        "tags": ["mathematics", "analytical engine"],
        "email": "ada.l@example.org",
    },
    ensure_ascii=False,
)
CALL = f'<tool_call>\n{{"name": "save", "arguments": {SAID}}}\n</tool_call>'
CASES = {
    "JSON by a schema": (Form(TextForm("schema", json.dumps(PERSON))), SAID),
    "any JSON object": (Form(TextForm("schema", '{"type": "object"}')), SAID),
    "a call that must come": (Form(None, (CallForm("save", json.dumps(PERSON), True),), True), CALL),
    "text with a strict call": (Form(None, (CallForm("save", json.dumps(PERSON), True),)), f"I save her. {CALL}"),
    "a pattern": (Form(TextForm("regex", r"[A-Z][a-z]+( [a-z]+)*\.")), "The quick brown fox jumps over the lazy dog."),
}


def tokenizer_of(rows: int) -> TokenizerWrapper:
    """A byte-level tokenizer of so many tokens: words of Python's library, with more letters on where they do not suffice."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts: Counter[str] = Counter()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        counts.update(word for word, _ in split.pre_tokenize_str(file.read_text(encoding="utf-8", errors="replace")))
    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges: dict[tuple[str, str], None] = {}
    words, letters = [word for word, _ in counts.most_common() if len(word) < 30], "aeiou0etnsr"
    for word in (*words, *(word + more for more in letters for word in words), *(w + a + b for a in letters for b in letters for w in words)):  # fmt: skip
        for at in range(2, len(word) + 1):
            if len(tokens) < rows - 1 and word[:at] not in tokens:
                tokens[word[:at]] = None
                merges[word[: at - 1], word[at - 1]] = None
    ids = {token: i for i, token in enumerate((*tokens, END))}
    made = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    wrapper = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END), eos_token_ids=[ids[END]])
    know_all_ids(wrapper, wrapper.get_vocab(), rows)
    return wrapper


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and microseconds."""
    began = time.perf_counter()
    return work(), (time.perf_counter() - began) * 1e6


def spread(values: list[float]) -> str:
    """Median and ninth decile."""
    return f"{statistics.median(values):7.0f} {sorted(values)[len(values) * 9 // 10]:7.0f}"


def main() -> int:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="documents of each form (5)")
    rounds = parser.parse_args().rounds
    tokenizer = tokenizer_of(ROWS)
    grammars = Grammars(tokenizer, ROWS)
    print(f"{len(tokenizer.get_vocab()):,} tokens; read in {timed(lambda: grammars.tokens)[1] / 1e6:.2f} s")
    logits = mx.random.normal((1, ROWS))
    mx.eval(logits)
    print(f"{'microseconds, median and p90':26} {'grammar':>9} {'take':>15} {'mask':>15} {'applied':>15}   forced")
    for name, (form, text) in CASES.items():
        grammar_us = timed(lambda form=form: grammars.compiled(form, False))[1]
        ids, forced = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)], 0
        times: dict[str, list[float]] = {"take": [], "mask": [], "apply": []}
        for _ in range(rounds):
            constraint, left = Constraint(grammars, form, False), 0
            for token in ids:
                left = left or len(constraint.forced())
                forced, left = forced + bool(left), max(0, left - 1)
                times["mask"].append(timed(constraint._matcher.compute_bitmask)[1])
                _, both = timed(lambda c=constraint: mx.eval(c.masked(logits)))  # and the mask again
                times["apply"].append(both - times["mask"][-1])
                times["take"].append(timed(lambda c=constraint, t=token: c.take([t]))[1])
                constraint.check()
        print(
            f"{name:26} {grammar_us:9.0f} {' '.join(spread(v) for v in (times['take'], times['mask'], times['apply']))}   {forced // rounds} of {len(ids)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
