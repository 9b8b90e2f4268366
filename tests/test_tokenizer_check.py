"""Which tokenizer files are given to the native library."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from ring_mlx import demo_model_path
from ring_mlx.checkpoint.regex_cost import regex_problem
from ring_mlx.checkpoint.tokenizer_check import check_tokenizer
from ring_mlx.errors import TokenizerError

# Of Ring's own tokenizer, and of the tokenizers that other families brought into use.
PATTERNS = [
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t)?|\s+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"\s?\p{L}+(?:'\p{L}+)?|(\r\n|\n)|(?<=\d)(?=\d)|.+",
    r"\p{L}(?=\p{L}{0,30}\")| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\n+|\s",
]
HOSTILE = [
    "(a+)+$",
    "(x+x+)+y",
    "((h|i)*)*z",
    "(a|a)*c",
    "(a|b|c|d)" * 12 + "z",
    "a*a*a*b",
    r"(?:\p{L}+\s?)*$",
    "(?=a*a*b)c",
    "a?" * 30 + "a" * 30,
    ".{0,60}" * 3 + "z",
    r"(a*)\1",
    r"\g<0>",
    "(?R)",
    "(?~abc)",
    "(?{x})",
    "(?:a{1000}){1000}",
    "(?:a{0,1000}){1000}b",
    "(" * 3000 + "a" + ")" * 3000,
    "[" * 3000,
    "(",
    "a)",
    "[",
    "\\",
    "a" * 5000,
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_in_use_pass(pattern):
    assert regex_problem(pattern) is None


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_without_end_do_not(pattern):
    assert regex_problem(pattern) is not None


def content(**changes):
    return json.loads((demo_model_path() / "tokenizer.json").read_text(encoding="utf-8")) | changes


def replaced(text, times=1):
    return {"type": "Replace", "pattern": {"String": "h"}, "content": text * times}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": replaced("h", 5_000)}, "too long|characters"),
        ({"normalizer": {"type": "Sequence", "normalizers": [replaced("hh")] * 40}}, "too long"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 10_000}}, "too many"),
        ({"decoder": {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""}}, "pattern"),
        ({"padding": {"strategy": {"Fixed": 1 << 40}, "pad_id": 0, "pad_token": "x"}}, "padding"),
        ({"truncation": {"max_length": -1}}, "truncation"),
        ({"added_tokens": [{"id": 1 << 40, "content": "x"}]}, "added token"),
        ({"added_tokens": [{"id": 1, "content": ""}]}, "added token"),
        ({"added_tokens": {"id": 1}}, "added_tokens"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "empty"),
        ({"model": {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []}}, "id of"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "b"}}, "unk_token"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "unk_token"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}}, "unk_id"),
        ({"model": []}, "no known type"),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<no>"}}]}},
            "does not describe",
        ),
    ],
)
def test_what_the_library_cannot_take_is_named(tmp_path, changes, said):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content(**changes)))
    with pytest.raises(TokenizerError, match=said):
        check_tokenizer(file)


def test_what_real_tokenizers_have_passes(tmp_path):
    file = tmp_path / "tokenizer.json"
    steps = [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    file.write_text(json.dumps(content(normalizer={"type": "Sequence", "normalizers": steps})))
    check_tokenizer(file)
    assert Tokenizer.from_file(str(file)).encode("Hello").ids
