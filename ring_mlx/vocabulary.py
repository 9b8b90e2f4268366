"""Token ids against the rows of a model's embedding, and their text; knows tokenizers, not files and not models."""

from __future__ import annotations

import codecs
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    StreamingDetokenizer,
    TokenizerWrapper,
    _byte_decoder,
)

from ring_mlx.config_values import shown
from ring_mlx.errors import PromptError, TokenizerError


def check_rows(tokenizer: TokenizerWrapper, vocabulary: Mapping[str, int], rows: int, where: str) -> None:
    """Hold every id that a tokenizer can make against the rows of the embedding: beyond them memory is read.

    Args:
        tokenizer: mlx-lm's wrapper.
        vocabulary: Its tokens, those added included.
        rows: Of the embedding.
        where: Whose tokenizer it is, for the message.

    Raises:
        TokenizerError: Naming a token, its id and the rows.
    """
    largest = max(vocabulary.values(), default=-1)
    token = next((t for t, i in vocabulary.items() if i == largest), "")
    backend = tokenizer._tokenizer.backend_tokenizer
    # What a template puts around a text has ids of its own, whatever the vocabulary says of their tokens.
    around = [*backend.encode("a").ids, *backend.encode("a", "a").ids, (backend.padding or {}).get("pad_id", 0)]
    if max(around) > largest:
        token, largest = "of its post-processor", max(around)
    for eos in tokenizer.eos_token_ids:
        if type(eos) is not int or eos < 0:
            raise TokenizerError(f"eos_token_id {eos!r} in {where} is not the id of a token; correct it there.")
        if eos > largest:
            token, largest = "eos_token_id", eos
    if largest >= rows:
        raise TokenizerError(
            f"token {shown(token)} in {where} has the id {largest}, but the model has rows for ids below {rows} only; use "
            "the tokenizer that belongs to this model."
        )


def whole_ids(ids: Iterable[Any], rows: int) -> list[int]:
    """Ids that come from outside, as plain integers.

    Raises:
        PromptError: If one is not an integer or has no row in the embedding.
    """
    found = []
    for i in ids:
        try:
            number = -1 if isinstance(i, bool) else operator.index(i)
        except TypeError:
            number = -1
        if not 0 <= number < rows:
            raise PromptError(f"{i!r} is not a token id from 0 to {rows - 1}; use this model's tokenizer.")
        found.append(number)
    return found


def know_all_ids(tokenizer: TokenizerWrapper, vocabulary: Mapping[str, int], rows: int) -> None:
    """Let the streaming detokenizer take every id below ``rows``; those that no token has are no text.

    mlx-lm's knows as many ids as there are tokens, so that where ids have gaps later tokens fall out of its list.
    """
    count = max(rows, 1 + max(vocabulary.values(), default=0))
    tokenizer.clean_up_tokenization_spaces = False  # it changes text, for which no one asked
    backend = tokenizer._tokenizer.backend_tokenizer
    if isinstance(tokenizer._detokenizer, BPEStreamingDetokenizer) or _is_byte_level(backend.decoder):
        names = [""] * count
        for token, i in vocabulary.items():
            names[i] = token
        for i, added in backend.get_added_tokens_decoder().items():
            names[i] = added.content
        tokenizer._detokenizer = ByteDetokenizer(names)
    elif isinstance(tokenizer._detokenizer, SPMStreamingDetokenizer):
        known = tokenizer._detokenizer.tokenmap
        known += [b""] * (count - len(known))


def _is_byte_level(decoder: Any) -> bool:
    """Whether letters stand for bytes, also where the decoder stands in a sequence by itself or before a Fuse."""
    steps = json.loads(decoder.__getstate__()) if decoder is not None else {}
    kinds = [step.get("type") for step in steps.get("decoders", [steps])]
    return kinds in (["ByteLevel"], ["ByteLevel", "Fuse"])


def token_bytes(tokenizer: TokenizerWrapper, token: int) -> bytes:
    """What a token adds to the text, of which a character may take several tokens."""
    detokenizer = tokenizer._detokenizer
    if isinstance(detokenizer, ByteDetokenizer):
        return detokenizer.bytes_of(token)
    return str(tokenizer.decode([token])).encode(errors="replace")


class TextOffsets:
    """Where in the text each token begins, in characters: one that goes on with a character begins where that does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def next(self, said: bytes) -> int:
        """The place of the next token, which is so many bytes."""
        begun = bytes(self._decoder.getstate()[0])
        is_broken = begun and len((begun + said[:1]).decode("utf-8", "replace")) > 1
        offset = self._length + bool(is_broken)
        self._length += len(self._decoder.decode(said))
        return offset


class ByteDetokenizer(StreamingDetokenizer):
    """Byte-level tokens to text as they come; over all of them exactly what the tokenizer decodes.

    mlx-lm's own drops the first space of a text, and fails at some tokens.

    Args:
        names: The token of each id, in the letters that stand for bytes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._bytes = names, {letter: bytes([b]) for letter, b in _byte_decoder().items()}
        self.reset()

    def reset(self) -> None:
        """Forget what has been said."""
        self.text, self.offset, self.tokens = "", 0, list[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def bytes_of(self, token: int) -> bytes:
        """What an id says; one that no token has says nothing."""
        name = self._names[token] if token < len(self._names) else ""
        try:
            return b"".join([self._bytes[letter] for letter in name])
        except KeyError:  # an added token, which is text
            return name.encode(errors="replace")

    def add_token(self, token: int) -> None:
        """Take an id."""
        self.tokens.append(token)
        self.text += self._decoder.decode(self.bytes_of(token))

    def finalize(self) -> None:
        """Say what is left of a character that never became whole."""
        self.text += self._decoder.decode(b"", final=True)
