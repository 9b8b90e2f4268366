"""Checks a tokenizer.json before its library reads it: no endless pattern, no text that grows without bound.

The library is native code that cannot be stopped from outside. Some files make it panic, hang or fill the memory; what
real tokenizers have passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ring_mlx.checkpoint.regex_cost import EMPTY, regex_problem
from ring_mlx.errors import TokenizerError
from ring_mlx.model.config_values import is_count, shown
from ring_mlx.system.regular_files import MAX_TOKENIZER_BYTES, read_json

STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
MAX_NODES, MAX_DEPTH, MAX_LETTERS = 4_000, 12, 4_000
# How much longer a text may become, all replacements together; the numbers of a template or padding; a token's id.
MAX_GROWTH, MAX_NUMBER, MAX_ID = 64, 1 << 20, 1 << 24
MAX_ADDED = 100_000


def check_tokenizer(file: Path) -> None:
    """Refuse a tokenizer.json that would harm the library, in a TokenizerError that names what and where."""
    content = read_json(file, TokenizerError, MAX_TOKENIZER_BYTES)
    problem = _model_problem(content.get("model")) or _added_problem(content.get("added_tokens"))
    for step in STEPS:
        problem = problem or _step_problem(step, content.get(step))
    for setting in ("truncation", "padding"):
        for _, key, value in _walk(content.get(setting)):
            if type(value) in (int, float) and not 0 <= value <= MAX_NUMBER:
                problem = problem or f"{setting} has {key} {shown(value)}"
    if problem:
        raise TokenizerError(f"{file}: {problem}, which is not read; take the file from the original checkpoint.")


def _model_problem(model: Any) -> str | None:
    if not isinstance(model, Mapping) or model.get("type", "BPE") not in MODELS:
        return "the model is of no known type"
    vocab = model.get("vocab")
    if not isinstance(vocab, (Mapping, list)) or not vocab:
        return "the vocabulary is empty"
    if isinstance(vocab, Mapping):
        wrong = next((t for t, i in vocab.items() if type(i) is not int or not 0 <= i < MAX_ID), None)
        if wrong is not None:
            return f"the id of {shown(wrong)} is {shown(vocab[wrong])}"
    return _prefix_problem(model) or _unknown_problem(model, vocab)


def _prefix_problem(model: Mapping[str, Any]) -> str | None:
    """A merge whose second part lacks the prefix, over which the library panics."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not prefix or not isinstance(prefix, str) or not isinstance(merges, list):
        return None
    for merge in merges:
        second = merge[-1] if isinstance(merge, list) and merge else str(merge).rpartition(" ")[2]
        if not str(second).startswith(prefix):
            return f"the merge {shown(merge)} lacks the continuing_subword_prefix"
    return None


def _unknown_problem(model: Mapping[str, Any], vocab: Any) -> str | None:
    """No token for unknown letters, which would end in an error in the middle of a chat."""
    if model.get("type") == "Unigram":
        number = model.get("unk_id")
        return None if type(number) is int and 0 <= number < len(vocab) else f"unk_id is {shown(number)}"
    token = model.get("unk_token")
    if token is None and model.get("type", "BPE") == "BPE":
        return None
    known = isinstance(vocab, Mapping) and isinstance(token, str) and token in vocab
    return None if known else f"unk_token {shown(token)} is not in the vocabulary"


def _added_problem(added: Any) -> str | None:
    if added is None:
        return None
    if not isinstance(added, list) or len(added) > MAX_ADDED or not all(isinstance(t, Mapping) for t in added):
        return f"added_tokens is not a list of at most {MAX_ADDED:,} tokens"
    for token in added:
        number, content = token.get("id"), token.get("content")
        if type(number) is not int or not 0 <= number < MAX_ID or not isinstance(content, str) or not content:
            return f"the added token {shown(content)} has the id {shown(number)}"
        if len(content) > MAX_LETTERS:
            return f"the added token {shown(content)} is too long"
    return None


def _step_problem(step: str, content: Any) -> str | None:
    """Of a normalizer, pre-tokenizer, post-processor or decoder, whose parts may be nested."""
    growth, prepended = 1, 0
    for count, (depth, key, value) in enumerate(_walk(content), 1):
        if count > MAX_NODES or depth > MAX_DEPTH:
            return f"the {step} has too many parts"
        if key == "Regex" and (problem := regex_problem(value)):
            return f"the {step} has the pattern {shown(value)} ({problem})"
        if isinstance(value, str) and len(value) > MAX_LETTERS:
            return f"the {step} has a text of {len(value):,} characters"
        prepended += len(value) if key == "prepend" and isinstance(value, str) else 0
        if prepended > MAX_LETTERS:
            return f"the {step} prepends too much"
        if type(value) in (int, float) and not abs(value) <= MAX_ID:
            return f"the {step} has the number {shown(value)}"
        if isinstance(value, Mapping):
            if problem := _part_problem(value):
                return f"the {step} {problem}"
            growth *= _growth(value)
            if growth > MAX_GROWTH:
                return f"the {step} makes texts too long"
    return None


def _part_problem(part: Mapping[str, Any]) -> str | None:
    """What the library panics over, or what ends the process."""
    if _lacks_special(part):
        return "names a token that it does not describe"
    kind = part.get("type")
    if kind == "Precompiled":
        # Its table is followed unchecked; byte-level tokenizers have none.
        return "has a precompiled table"
    pattern = part.get("pattern")
    if kind == "Replace" and isinstance(pattern, Mapping):
        may_be_empty = "Regex" in pattern and regex_problem(pattern["Regex"], False) == EMPTY
        if may_be_empty or pattern.get("String") == "":
            return f"replaces {shown(pattern)}, which may be the empty text"
    if kind == "FixedLength" and not is_count(part.get("length")):
        return "cuts into pieces of no length"
    if kind == "Strip" and part.get("stop"):
        # Counted from the end of each token, however short it is.
        return "strips the ends of tokens"
    single = part.get("single")
    has_second = not isinstance(single, list) or any(key == "id" and value == "B" for _, key, value in _walk(single))
    return "is a template of two texts" if kind == "TemplateProcessing" and has_second else None


def _growth(part: Mapping[str, Any]) -> int:
    """How many times as long one part may make a text."""
    content, pattern = part.get("content"), part.get("pattern")
    if part.get("type") == "ByteLevel":
        return 2
    if pattern is None or not isinstance(content, str):
        return 1
    replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
    letters = len(replaced.encode()) if isinstance(replaced, str) and replaced else 1
    return max(1, -(-len(content.encode()) // letters))


def _lacks_special(part: Mapping[str, Any]) -> bool:
    """Whether a template names a special token without its ids, over which the library panics."""
    if part.get("type") != "TemplateProcessing":
        return False
    known = part.get("special_tokens")
    pieces = [v for _, key, v in _walk([part.get("single"), part.get("pair")]) if key == "SpecialToken"]
    names = {str(v.get("id") if isinstance(v, Mapping) else v) for v in pieces}
    return not isinstance(known, Mapping) or not names <= set(known)


def _walk(content: Any) -> Iterator[tuple[int, Any, Any]]:
    """Every value with its depth and its key, or its place in a list."""
    left: list[tuple[int, Any, Any]] = [(0, None, content)]
    while left:
        depth, key, value = left.pop()
        yield depth, key, value
        if isinstance(value, Mapping):
            left += [(depth + 1, k, v) for k, v in value.items()]
        elif isinstance(value, list):
            left += [(depth + 1, i, v) for i, v in enumerate(value)]
