"""Tokenizers of other kinds than the family's: streamed text is what the tokenizer decodes, wherever tokens are cut."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_mlx import Session
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.checkpoint.vocabulary import token_bytes
from ring_mlx.cli import main
from tests.parrot import byte_letters, make_parrot
from tests.serving import client_of

BYTES = [f"<0x{b:02X}>" for b in range(256)]
WORDS = ["▁The", "▁sum", "▁is", "▁", "▁▁▁▁", "def", "▁62", ".", "\n", "日", "é", "\ufffd", "</w>", "n't", "▁,", " x"]
PIECES = ["[UNK]", "a", "[SEP]", "the", "sum", "##s", "62", ".", ",", "##日", "do", "'", "n't", "##\n", "\n", "' s"]
SUFFIXED = ["[UNK]", "a</w>", "[SEP]", "b", "is</w>", "</w>", " ", "日"]
SPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
FALLBACK, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
ADDED = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False}


def bpe(tokens, *decoders):
    vocab = {t: i for i, t in enumerate(tokens)}
    unknown = {"unk_token": "[UNK]"} if "[UNK]" in vocab else {}
    return {"type": "BPE", "vocab": vocab, "merges": [], **unknown}, {"type": "Sequence", "decoders": [*decoders]}


def spm(*decoders):
    return bpe(["[UNK]", "<s>", "</s>", *BYTES, *WORDS], *decoders)


def metaspace(scheme):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}


def wordpiece(cleanup):
    vocab = {t: i for i, t in enumerate(PIECES)}
    model = {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    return model | {"max_input_chars_per_word": 99}, {"type": "WordPiece", "prefix": "##", "cleanup": cleanup}


KINDS = {
    "llama": spm(SPACE, FALLBACK, FUSE, STRIP),
    "gemma": spm(SPACE, FALLBACK, FUSE),
    "metaspace": spm(FALLBACK, metaspace("first")),
    "metaspace never": spm(metaspace("never")),
    "wordpiece": wordpiece(True),
    "wordpiece plain": wordpiece(False),
    "suffix": bpe(SUFFIXED, {"type": "BPEDecoder", "suffix": "</w>"}),
    "bytes after all": bpe(
        [*byte_letters(), "[UNK]", "Ġa"],
        {"type": "Fuse"},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ),
    "none": (bpe(SUFFIXED)[0], None),
}


def write(folder, kind, gap=4):
    """Tokenizer.json with an added token, a special one and, where mlx-lm loads it so, a gap of ids."""
    model, decoder = KINDS[kind]
    size = len(model["vocab"])
    added = [
        {"id": size, "content": "<tool>", "special": False},
        {"id": size + 1, "content": "<role>", "special": True},
    ]
    raw = {"added_tokens": [a | ADDED for a in added], "decoder": decoder, "model": model}
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    (folder / "config.json").write_text(json.dumps({"vocab_size": size + 2 + gap}))
    return size + 2 + gap


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return [(write(root / kind, kind), load_tokenizer(root / kind)) for kind in KINDS]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, len(KINDS) - 1), st.data())
def test_streamed_pieces_are_the_whole(kinds, which, data):
    rows, tokenizer = kinds[which]
    first = max(0, rows - 30)
    ids = data.draw(st.lists(st.integers(0, rows - 1) | st.integers(first, rows - 1), max_size=80))
    detokenizer, pieces = tokenizer.detokenizer, []
    for i in ids:
        detokenizer.add_token(i)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    assert "".join([*pieces, detokenizer.last_segment]) == tokenizer.decode(ids)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(KINDS) - 1), st.data())
def test_what_goes_on_with_a_text_fits_it(kinds, which, data):
    """Behind two letters, since what joins halves of a character to one changes the text before."""
    rows, tokenizer = kinds[which]
    letters = [i for t, i in tokenizer.get_vocab().items() if re.fullmatch("[▁Ġ#]*[a-z]+(</w>)?", t)]
    ids = st.lists(st.integers(0, rows - 1), max_size=20)
    before = data.draw(ids) + data.draw(st.lists(st.sampled_from(letters), min_size=2, max_size=2))
    after, detokenizer = data.draw(ids), tokenizer.detokenizer
    detokenizer.follow(before)
    for i in after:
        detokenizer.add_token(i)
    detokenizer.finalize()
    assert tokenizer.decode(before) + detokenizer.text == tokenizer.decode([*before, *after])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Says " is 62", a character in three bytes, a half of one, and text."""
    words = dict(KINDS["llama"][0]["vocab"])
    said = ["▁is", "▁62", "<0xE6>", "<0x97>", "<0xA5>", ".", "<0xE7>", "▁▁▁▁", "def"]
    folder = make_parrot(tmp_path_factory.mktemp("llama") / "model", [words[w] for w in said])
    config = json.loads((folder / "config.json").read_text())
    template = "{{ messages[-1].content }}{% if messages[-1].role == 'user' %}<role>{% endif %}"
    write(folder, "llama")
    (folder / "chat_template.jinja").write_text(template)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_door_of_a_sentencepiece_model(llama, capsys, serve):
    text = " is 62日.\ufffd    def"
    for flags, said in ((["--ignore-chat-template"], text), (["--prefill-response", "The"], text), ([], text[1:])):
        assert main(["generate", "--model", str(llama), "--prompt", "def", "--json", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == said
    with Session(llama, store=False) as session:
        talk = [{"role": "user", "content": "def"}, {"role": "assistant", "content": "def"}]
        assert list(session.send(talk, continue_last=True))[-1].message["content"] == "def" + text
        assert list(session.send(talk[:1]))[-1].message["content"] == text[1:]
        for tokens, said in enumerate([" is", " is 62", " is 62", " is 62", " is 62日"], 1):
            assert list(session.send("def", max_tokens=tokens))[-1].message["content"] == said
    request = {"model": "toy", "prompt": "def", "temperature": 0, "logprobs": 1}
    with client_of(serve(model=llama)) as client:
        choice = client.completions.create(**request).choices[0]
        assert choice.text == text
        assert "".join(p.choices[0].text for p in client.completions.create(stream=True, **request)) == text
    assert choice.logprobs.tokens[:3] == [" is", " 62", "bytes:\\xe6"]
    assert choice.logprobs.text_offset == [0, 3, 6, 6, 6, 7, 8, 9, 13]


def test_bytes_of_tokens_are_those_of_the_text(kinds):
    for _, tokenizer in kinds:
        before = tokenizer._detokenizer._before
        for token, i in tokenizer.get_vocab().items():
            said = token_bytes(tokenizer, i)
            if token in BYTES and "▁" in tokenizer.get_vocab() and i in tokenizer._detokenizer._bytes:
                assert said == bytes([int(token[3:5], 16)])
            else:
                assert tokenizer.decode([before, i]) == tokenizer.decode([before]) + said.decode()
