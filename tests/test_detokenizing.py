"""What is shown is what the tokenizer decodes, at every door, and each token's bytes and place are told."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_mlx import Sampling, Session, demo_model_path
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.checkpoint.vocabulary import ByteDetokenizer, TextOffsets, know_all_ids, token_bytes
from ring_mlx.cli import main
from ring_mlx.cli.exit_codes import CUT_OFF
from tests.parrot import make_parrot
from tests.serving import client_of, send

QUESTION = [{"role": "user", "content": "What is 27 + 35?"}]
CODE = ["    def f", "(x):", "\n        ", "return", "  x", " \n"]
CLOSED = {"enable_thinking": False}
SNAKE = "\U0001f40d".encode()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes parrots, each set of pieces once."""
    folders = {}

    def make(*pieces, **options):
        if pieces not in folders:
            folders[pieces] = make_parrot(tmp_path_factory.mktemp("say") / "model", pieces, **options)
        return folders[pieces]

    return make


def generated(folder, capsys, *flags):
    assert main(["generate", "--model", str(folder), "--json", *flags]) in (0, CUT_OFF)
    return json.loads(capsys.readouterr().out)["text"]


def answers(events):
    return "".join(getattr(e, "text", "") for e in events)


# The first space of a text, and the spaces of code.


@pytest.mark.parametrize("pieces", [(" is", " 62", "."), tuple(CODE), (" ", "  a", "\0", "\x1f ")])
def test_every_door_says_all_spaces(made, capsys, serve, pieces):
    folder, text = made(*pieces), "".join(pieces)
    assert generated(folder, capsys, "--ignore-chat-template") == text
    assert generated(folder, capsys, "--prefill-response", "The sum") == text
    cache = folder.parent / "cache.safetensors"
    assert main(["cache-prompt", "--model", str(folder), "--prompt", "a", "--prompt-cache-file", str(cache)]) == 0
    capsys.readouterr()
    flags = ["--prompt-cache-file", str(cache), "--prompt", "b", "--prefill-response", "The sum"]
    assert generated(folder, capsys, *flags) == text
    with Session(folder, store=False) as session:
        assert answers(session.send("The sum")) == text
        talk = [*QUESTION, {"role": "assistant", "content": "The sum"}]
        reply = list(session.send(talk, continue_last=True))
        assert answers(reply) == text
        assert reply[-1].message["content"] == "The sum" + text
    request = {"model": "toy", "prompt": "The sum", "temperature": 0}
    with client_of(serve(model=folder)) as client:
        assert client.completions.create(**request).choices[0].text == text
        assert "".join(p.choices[0].text for p in client.completions.create(stream=True, **request)) == text


def test_an_answer_keeps_the_indentation_of_its_first_line(made, capsys, serve):
    folder, text = made("<think>", "a", "</think>\n\n", *CODE), "".join(CODE)
    for flags in (["--thinking", "hide"], ["--json"]):
        assert main(["generate", "--model", str(folder), "--verbose", "False", *flags]) == 0
        said = capsys.readouterr().out
        assert (json.loads(said)["answer"] if "--json" in flags else said).startswith(text.rstrip())
    with Session(folder, store=False) as session:
        assert list(session.send(QUESTION))[-1].message["content"] == text
    body = {"messages": QUESTION, "temperature": 0}
    answer = send(serve(model=folder), "POST", "/v1/chat/completions", body)[2]
    assert answer["choices"][0]["message"]["content"] == text


def test_the_toys_sentence_can_be_cut_anywhere():
    """Also by a model that has read the spaces: what it says after the cut fits what it said before."""
    whole, cuts = "The sum is 62.", set()
    with Session(None, store=False) as session:
        for tokens in range(30, 33):
            first = list(session.send(QUESTION, max_tokens=tokens, sampling=Sampling(temp=0)))[-1].message
            assert whole.startswith(first["content"])
            again = list(session.send([*QUESTION, first], continue_last=True, sampling=Sampling(temp=0)))[-1].message
            cuts.add(first["content"])
            assert again["content"] == whole
    assert {"The", "The sum", "The sum is"} <= cuts


# Characters in several tokens.


def test_half_a_character_waits_for_its_other_half_and_what_is_none_is_shown(made, capsys):
    folder = made("caf", b"\xc3", b"\xa9 ", SNAKE[:2], SNAKE[2:], "\ufffd", b"\xe4")
    whole = "caf\u00e9 \U0001f40d\ufffd"
    shown = ["caf", "caf", "caf\u00e9 ", "caf\u00e9 ", whole[:-1], whole, whole]
    for n, text in enumerate(shown, 1):
        assert generated(folder, capsys, "--ignore-chat-template", "-m", str(n)) == text
    assert generated(folder, capsys, "--ignore-chat-template") == whole
    with Session(folder, store=False) as session:
        assert answers(session.send("a", max_tokens=4)) == "caf\u00e9 "
        assert answers(session.send("a")) == whole
        first = list(session.send(QUESTION, max_tokens=2, template_options=CLOSED))[-1].message
        assert first["content"] == "caf"
        again = list(session.send([*QUESTION, first], continue_last=True, max_tokens=1))[-1].message
        assert again["content"] == "cafcaf", "the half does not stand between"


def test_tokens_are_told_with_their_bytes_and_places(made, serve):
    pieces = ("caf", b"\xc3", b"\xa9 ", 1030, SNAKE[:2], SNAKE[2:], b"\xe4", "a", "\u65e5")
    folder = made(*pieces, gap=40)
    request = {"model": "toy", "prompt": "q", "temperature": 0, "logprobs": 1}
    with client_of(serve(model=folder)) as client:
        choice = client.completions.create(**request).choices[0]
        streamed = [p.choices[0].logprobs for p in client.completions.create(stream=True, **request) if p.choices]
        body = {"messages": QUESTION, "temperature": 0, "logprobs": True, "top_logprobs": 1, "model": "toy"}
        content = (
            client.chat.completions.create(**body, extra_body={"chat_template_kwargs": CLOSED})
            .choices[0]
            .logprobs.content
        )
    told = choice.logprobs
    names = ["caf", "bytes:\\xc3", "bytes:\\xa9\\x20", "", "bytes:\\xf0\\x9f", "bytes:\\x90\\x8d"]
    assert told.tokens == [*names, "bytes:\\xe4", "a", "\u65e5"]
    assert [next(iter(top)) for top in told.top_logprobs] == told.tokens
    assert choice.text == "caf\u00e9 \U0001f40d\ufffda\u65e5"
    assert told.text_offset == [0, 3, 3, 5, 5, 5, 6, 7, 8]
    assert [o for p in streamed if p for o in p.text_offset] == told.text_offset
    said = [bytes(t.bytes) for t in content]
    assert said == [b"" if isinstance(p, int) else p.encode() if isinstance(p, str) else p for p in pieces]
    assert all(
        t.top_logprobs[0].bytes == t.bytes and t.token == bytes(t.bytes).decode(errors="replace") for t in content
    )


# Any ids.


def with_added(folder, special):
    """Added tokens: some take an id of the vocabulary's, some look like bytes, one is a special token."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, content in enumerate(("<tool>", "\u00e9", "\u00e9 \u00fc", "\u65e5\u672c", "a b")):
        tokenizer["added_tokens"].append({"id": 1024 + i, "content": content, "special": special, **plain})
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """With gaps, added tokens, a decoder in a sequence, and a setting that asks for spaces to be cleaned away."""
    folder = with_added(make_parrot(tmp_path_factory.mktemp("any") / "model", [1040, b"\xf0\x9f"], rows=30), True)
    first = load_tokenizer(folder)
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"decoder": {"type": "Sequence", "decoders": [raw["decoder"], {"type": "Fuse"}]}}))
    eager = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    settings = {"clean_up_tokenization_spaces": True, eager: True}
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return [first, load_tokenizer(folder)]


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 1080), max_size=40), which=st.integers(0, 1))
def test_streamed_pieces_are_the_whole(tokenizers, ids, which):
    tokenizer = tokenizers[which]
    whole, detokenizer, pieces = tokenizer.decode(ids), tokenizer.detokenizer, []
    for i in ids:
        detokenizer.add_token(i)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    assert "".join([*pieces, detokenizer.last_segment]) == whole
    said = [token_bytes(tokenizer, i) for i in ids]
    assert b"".join(said).decode(errors="replace") == whole
    offsets = TextOffsets()
    for n, (place, token) in enumerate((offsets.next(s), s) for s in said):
        if token and token[0] & 0xC0 != 0x80:  # begins a character
            assert place == len(b"".join(said[:n]).decode(errors="replace"))


def test_an_added_token_that_takes_an_id_of_the_vocabulary_hides_what_had_it(tmp_path):
    """The library numbers it by the count of the tokens, which with a gap is one of their ids."""
    folder = with_added(make_parrot(tmp_path / "model", ["zz1", "zz2", "zz3"], gap=2, rows=9), False)
    tokenizer = load_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    assert vocabulary["<tool>"] == vocabulary["zz2"]
    for names in (vocabulary, dict(reversed(vocabulary.items()))):  # whichever of two comes last
        know_all_ids(tokenizer, names, 1040)
        for i in range(1024, 1040):
            assert token_bytes(tokenizer, i).decode(errors="replace") == tokenizer.decode([i])


def test_nothing_is_cleaned_up(tokenizers):
    for tokenizer in tokenizers:
        assert isinstance(tokenizer._detokenizer, ByteDetokenizer)
        text = "if a , b : print ( x ) ; do n't . \n"
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_token_of_the_toy_and_every_pair_of_them():
    tokenizer, rng = load_tokenizer(demo_model_path()), np.random.default_rng(0)
    for ids in [[i] for i in range(1024)] + rng.integers(0, 1024, (500, 2)).tolist():
        assert b"".join(token_bytes(tokenizer, i) for i in ids).decode(errors="replace") == tokenizer.decode(ids)
