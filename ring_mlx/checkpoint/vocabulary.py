"""Token ids and their text, checked against the rows of a model's embedding."""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, StreamingDetokenizer, TokenizerWrapper, _byte_decoder

from ring_mlx.errors import PromptError, TokenizerError
from ring_mlx.model.config_values import shown

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
KEPT_TOKENS = 8


def check_rows(tokenizer: TokenizerWrapper, vocabulary: Mapping[str, int], rows: int, where: str) -> None:
    """Refuse a tokenizer that makes an id beyond the rows of the embedding, where memory would be read.

    ``vocabulary`` includes added tokens; ``where`` names the tokenizer in the TokenizerError.
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
    """Ids from outside as plain integers; a PromptError if one is no integer or has no row in the embedding."""
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
    """Give the tokenizer our streaming detokenizer, which takes every id below ``rows`` and keeps all spaces.

    mlx-lm's know as many ids as there are tokens, so that later tokens are lost if ids have gaps, and they drop the
    first space of a text or one after each line break.
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
    else:
        tokenizer._detokenizer = TextDetokenizer(tokenizer, vocabulary)


def _is_byte_level(decoder: Any) -> bool:
    """Whether letters stand for bytes, also if the decoder is alone in a sequence or before a Fuse."""
    steps = json.loads(decoder.__getstate__()) if decoder is not None else {}
    kinds = [step.get("type") for step in steps.get("decoders", [steps])]
    return kinds in (["ByteLevel"], ["ByteLevel", "Fuse"])


def token_bytes(tokenizer: TokenizerWrapper, token: int) -> bytes:
    """What a token adds to the text; a character may take several tokens."""
    detokenizer = tokenizer._detokenizer
    if isinstance(detokenizer, (ByteDetokenizer, TextDetokenizer)):
        return detokenizer.bytes_of(token)
    return str(tokenizer.decode([token])).encode(errors="replace")


class TextOffsets:
    """Where in the text each token begins, in characters; one that continues a character begins where that does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def next(self, said: bytes) -> int:
        """The place of the next token, which adds these bytes."""
        begun = bytes(self._decoder.getstate()[0])
        is_broken = begun and len((begun + said[:1]).decode("utf-8", "replace")) > 1
        offset = self._length + bool(is_broken)
        self._length += len(self._decoder.decode(said))
        return offset


class ByteDetokenizer(StreamingDetokenizer):
    """Byte-level tokens to text as they come; over all of them exactly what the tokenizer decodes.

    ``names`` holds the token of each id, in the letters that stand for bytes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._bytes = names, {letter: bytes([b]) for letter, b in _byte_decoder().items()}
        self.reset()

    def reset(self) -> None:
        self.text, self.offset, self.tokens = "", 0, list[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes of an id; none if no token has it."""
        name = self._names[token] if token < len(self._names) else ""
        try:
            return b"".join([self._bytes[letter] for letter in name])
        except KeyError:  # an added token, which is text
            return name.encode(errors="replace")

    def add_token(self, token: int) -> None:
        self.tokens.append(token)
        self.text += self._decoder.decode(self.bytes_of(token))

    def finalize(self) -> None:
        """Add what is left of a character that never became whole."""
        self.text += self._decoder.decode(b"", final=True)


class TextDetokenizer(StreamingDetokenizer):
    """Tokens of any kind to text as they come, through ``tokenizer.decode`` of the last ones.

    A decoder treats the first token of a text in a special way. `follow` gives it a token before, so that the first
    space of a continuation is not lost.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocabulary: Mapping[str, int]) -> None:
        self._decode = tokenizer.decode
        backend = tokenizer._tokenizer.backend_tokenizer
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        has_bytes = backend.decoder is not None and b"ByteFallback" in backend.decoder.__getstate__()
        found = {i: _BYTE_TOKEN.fullmatch(token) for token, i in vocabulary.items()} if has_bytes else {}
        self._bytes = {i: bytes.fromhex(byte[1]) for i, byte in found.items() if byte}
        self._texts = {*vocabulary.values()} - {*self._bytes}
        self._before = next((i for i in sorted(self._texts) if self._decode([i]).isalpha()), None)
        self.reset()

    def reset(self) -> None:
        self.text, self.offset, self.tokens = "", 0, list[int]()
        self._window, self._shown = list[int](), 0

    def follow(self, ids: Sequence[int]) -> None:
        """Continue a text; after a special token a new one begins."""
        if ids and ids[-1] not in self._special:
            self._keep(list(ids[-KEPT_TOKENS:]))

    def bytes_of(self, token: int) -> bytes:
        """The bytes of an id within a text; none if no token has it."""
        if token in self._bytes:
            return self._bytes[token]
        before = [] if self._before is None else [self._before]
        return str(self._decode([*before, token]))[len(self._decode(before)) :].encode(errors="replace")

    def add_token(self, token: int) -> None:
        """Take an id; bytes wait for the next token, which tells whether they are characters."""
        self.tokens.append(token)
        self._window.append(token)
        if token in self._texts:
            self._show(self._decode(self._window).rstrip("\ufffd"))
            if len(self._window) > 4 * KEPT_TOKENS and self._shown == len(self._decode(self._window)):
                self._keep(self._window[-KEPT_TOKENS:])

    def finalize(self) -> None:
        self._show(self._decode(self._window))

    def _show(self, text: str) -> None:
        self.text += text[self._shown :]
        self._shown = max(self._shown, len(text))

    def _keep(self, window: list[int]) -> None:
        """Continue after some tokens, unless decoders may take all of their text."""
        text = self._decode(window)
        if text.strip():
            self._window, self._shown = window, len(text)
