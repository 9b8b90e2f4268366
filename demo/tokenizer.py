"""The tokenizer of Ring-nano: byte-level BPE with 1,024 tokens, trained on generated conversations.

Spelling needs the letters behind a token, so tokens stay short (a space and four letters, or five letters) and few:
each is met in thousands of listed and made-up words, and a held-out word is made of tokens whose letters are known. A
word in double quotes is split into letters, so that replies such as ``"tenalp"`` are copied letter by letter and need
no knowledge of merges. Every digit and punctuation mark is a token of its own, and so is a space before a digit.

Usage: ``python -m demo.tokenizer OUT_DIR``
"""

from __future__ import annotations

import argparse
import json
import shutil
import string
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.data import stream

VOCAB_SIZE = 1024
LONGEST_TOKEN = 6  # bytes in the form the trainer sees, where a space takes two
CONTROL_TOKENS = ("<|endoftext|>", "<|startoftext|>", "<|role_end|>", "<role>", "</role>")
VISIBLE_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TRAINING_CONVERSATIONS = 20_000
TEMPLATE = Path(__file__).parent / "chat_template.jinja"

LETTER_OF_QUOTED_WORD = r'\p{L}(?=\p{L}{0,30}")'
PATTERN = rf"{LETTER_OF_QUOTED_WORD}| ?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]|\n+|\s"


def build_tokenizer() -> Tokenizer:
    """Train the tokenizer; the result is the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*CONTROL_TOKENS, *VISIBLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    return Tokenizer.from_str(json.dumps(content))


def _texts() -> Iterator[str]:
    """Return what is learnt from: the messages of train, and each letter after a space so that all are tokens."""
    yield from [f" {letter}" for letter in string.ascii_lowercase] * 100
    yield from ["HUMAN", "ASSISTANT", "SYSTEM", "OBSERVATION"] * TRAINING_CONVERSATIONS
    for drawn in islice(stream(seed=0), TRAINING_CONVERSATIONS):
        for message in drawn.messages:
            yield message.content
            yield f"\n{message.thinking}\n"


def tokenizer_config() -> dict[str, object]:
    """Return the content of tokenizer_config.json."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_tokenizer(folder: Path) -> None:
    """Train and write tokenizer.json, tokenizer_config.json and the chat template to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    text = json.dumps(tokenizer_config(), indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(TEMPLATE, folder / TEMPLATE.name)


def main() -> None:
    """Write the tokenizer to the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Train the tokenizer of Ring-nano.")
    parser.add_argument("out_dir", type=Path, help="folder to write to; made if missing")
    write_tokenizer(parser.parse_args().out_dir)


if __name__ == "__main__":
    main()
