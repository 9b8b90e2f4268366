"""A draft model: the same text whatever it drafts, each token read once, and used only while it pays."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from ring_mlx.checkpoint import weights
from ring_mlx.checkpoint.loading import demo_model_path, load_model
from ring_mlx.cli import main
from ring_mlx.generation.draft_model import LONG, DraftModel, LookupOrModel
from ring_mlx.generation.drafts import MODEL, Draft, PromptLookup
from ring_mlx.generation.pace import Pace
from ring_mlx.generation.speculation import speculate
from ring_mlx.model import memory
from tests.compare import assert_close
from tests.test_speculation import LENGTH, PROMPT, Gpu, Timed, assert_same, plain, read, several
from tests.tiny import make_model

WIDER = {"hidden_size": 64, "intermediate_size": 112}  # no deeper, since the rounding of float32 grows with each layer


@pytest.fixture(scope="module")
def model():
    return make_model(**WIDER)


@pytest.fixture(scope="module")
def small():
    return make_model()


class Counted:
    """A model that counts the tokens that it reads, and fails where that is wanted."""

    def __init__(self, model):
        self._model, self.tokens, self.fails = model, 0, False
        self.make_cache, self.config, self.layers = model.make_cache, model.config, model.layers

    def __call__(self, ids, cache, **how):
        self.tokens += ids.size
        found = self._model(ids, cache, **how)
        if self.fails:
            raise MemoryError("full")
        return found


def assert_has_read(drafts, model):
    """The draft model's cache holds the text but for its last tokens, as if they had been read one after the other."""
    cache = drafts._held.cache
    assert not drafts._ahead
    other = read(model, drafts._tokens[: drafts._held.read])[1]
    assert cache.offset == other.offset
    for a, b in zip(cache, other, strict=True):
        if not isinstance(a, KVCache):
            assert_close(a[0], b[0], 1e-5)


@pytest.mark.parametrize(("sampler", "processors"), [("greedy", "none"), ("seeded", "penalties"), ("xtc", "none")])
def test_a_draft_model_gives_the_same(model, small, sampler, processors):
    how = {"sampler": sampler, "processors": processors}
    pace = Pace(3, always=True)
    assert_same(several(model, DraftModel(small, PROMPT), pace=pace, **how), plain(model, **how))
    assert pace.drafted >= LENGTH


def test_a_model_that_drafts_for_itself_is_always_right_and_reads_each_token_once(model):
    counted, pace = Counted(model), Pace(3, always=True)
    drafts = DraftModel(counted, PROMPT)
    assert_same(several(model, drafts, pace=pace), plain(model))
    assert pace.accepted == pace.drafted >= LENGTH - 8
    assert len(PROMPT) + LENGTH - 6 <= counted.tokens <= len(PROMPT) + LENGTH


@pytest.mark.parametrize("take", range(0, LENGTH + 1, 5))
def test_what_does_not_come_is_taken_back(model, small, take):
    drafts = DraftModel(small, PROMPT)
    assert_same(several(model, drafts, take, pace=Pace(4, always=True)), plain(model, take))
    for token in (1, 2, 3, 4, 5, 6):  # whatever was drafted, it is not this
        drafts.add(token)
    drafts.catch_up()
    found = drafts.draft(3).tokens
    assert found == DraftModel(small, drafts._tokens).draft(3).tokens
    for token in found[:2]:
        drafts.add(token)
    assert drafts._held.read == len(drafts._tokens)
    assert_has_read(drafts, small)


def test_a_long_text_is_read_in_steps(small):
    sizes, text = [], [n * 7 % 70 for n in range(50)]
    counted = Counted(small)
    counted.__class__ = type("Sized", (Counted,), {"__call__": lambda s, ids, c, **h: sized(s, ids, c, h)})

    def sized(counted, ids, cache, how):
        sizes.append(ids.size)
        return Counted.__call__(counted, ids, cache, **how)

    drafts = DraftModel(counted, text, step_tokens=16)
    assert sizes == []  # nothing is read before a draft is wanted
    assert drafts.draft(2).tokens == DraftModel(small, text, step_tokens=64).draft(2).tokens
    assert sizes == [16, 16, 16, 2, 1]
    assert drafts.draft(2).tokens == drafts.draft(3).tokens[:2]
    assert sizes == [16, 16, 16, 2, 1, 1]


def test_a_draft_model_that_fails_leaves_both_caches_good(model, small):
    counted = Counted(small)
    drafts, pace = DraftModel(counted, PROMPT), Pace(3, always=True)
    logits, cache = read(model)
    steps = speculate(logits, model, cache, PROMPT, drafts, pace, max_tokens=LENGTH)
    given = [next(steps)[0]]
    counted.fails = True
    with pytest.raises(MemoryError):
        given.extend(t for t, _ in steps)
    assert given == [t for t, _ in plain(model)[0]][: len(given)]
    assert cache.offset == len(PROMPT) + len(given)
    counted.fails = False
    assert drafts.draft(3).tokens == DraftModel(small, drafts._tokens).draft(3).tokens


def test_a_full_context_is_no_error(model):
    short = make_model(max_position_embeddings=len(PROMPT) + 16)
    pace = Pace(3, always=True)
    drafts = LookupOrModel(PromptLookup(), DraftModel(short, PROMPT), pace)
    assert_same(several(model, drafts, pace=pace), plain(model))
    assert 0 < pace.drafted < 2 * LENGTH


class Fixed:
    """A drafter of one answer."""

    def __init__(self, *draft):
        self._draft = Draft(*draft)

    def add(self, token):
        pass

    def draft(self, most):
        return Draft(self._draft.tokens[:most], self._draft.length)


def paced():
    pace = Pace()
    for _ in range(3):
        pace.took(1, 1.0)
    return pace


def test_a_fixed_number_is_drafted_by_long_n_grams_or_else_by_the_model(small):
    for length, expected in ((6, 6), (LONG, LONG), (LONG - 1, MODEL), (0, MODEL)):
        lookup = Fixed([9, 9, 9] if length else [], length)
        drafts = LookupOrModel(lookup, DraftModel(small, PROMPT), Pace(3, always=True))
        assert drafts.guess().length == drafts.draft(3).length == expected


def test_the_better_of_lookup_and_model_drafts(small):
    pace = paced()
    drafts = LookupOrModel(Fixed([9, 9, 9], 3), DraftModel(small, PROMPT), pace)
    assert drafts.guess() == ([], MODEL)
    for _ in range(30):  # the lookup is right, which shows while the model drafts
        drafts.guess()
        drafts.add(9)
    assert drafts.guess() == ([9], 3)
    for _ in range(30):
        pace.compared(3, False)
    assert drafts.guess() == ([], MODEL)


def test_time_of_drafts_is_not_the_steps(monkeypatch):
    gpu, pace = Gpu(monkeypatch), Timed(most=3, always=True)

    class Slow(Fixed):
        def draft(self, most):
            gpu.now += 5.0 if most > 1 else 0.0
            return super().draft(most)

    how = {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1), "max_tokens": 41}
    list(speculate(mx.zeros((1, 4)), gpu, [], [0], Slow([0] * 9, 3), pace, **how))
    assert {seconds for t, seconds in pace.times if t == 4} == {13.0}


QUESTION = "Repeat: one two three four five. one two three four"


def generate(capsys, *flags):
    code = main(["generate", "--no-store", "--temp", "0", "--json", "-m", "12", "-p", QUESTION, *map(str, flags)])
    return code, capsys.readouterr()


def test_generate_with_a_draft_model_says_the_same(capsys, chat_folder):
    _, off = generate(capsys)
    _, random = generate(capsys, "--speculate", "2", "--draft-model", chat_folder)
    _, itself = generate(capsys, "--speculate", "3", "--draft-model", demo_model_path())
    off, random, itself = (json.loads(found.out) for found in (off, random, itself))
    assert random["text"] == itself["text"] == off["text"]
    assert random["speculation"]["drafted"] > random["speculation"]["accepted"]
    assert itself["speculation"]["accepted"] >= itself["speculation"]["drafted"] - 3


def tokens_only(folder, change):
    """A folder with the toy's config and tokenizer, but for a change of (config, tokenizer)."""
    shutil.copytree(demo_model_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    files = [folder / "config.json", folder / "tokenizer.json"]
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    change(*contents)
    for file, content in zip(files, contents, strict=True):
        file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def swap(config, tokenizer):
    vocab = tokenizer["model"]["vocab"]
    names = {i: token for token, i in vocab.items()}
    vocab[names[300]], vocab[names[301]] = 301, 300
    merges = tokenizer["model"]["merges"]  # so that the others need neither
    tokenizer["model"]["merges"] = [m for m in merges if "".join(m) not in (names[300], names[301])]


def lacking(config, tokenizer):
    vocab = tokenizer["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if last not in ("".join(m), *m)]
    del vocab[last]


def special(config, tokenizer):
    token = next(token for token, i in tokenizer["model"]["vocab"].items() if i == 300)
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 300, "content": token, "special": True})


def more_rows(config, tokenizer):
    config["vocab_size"] += 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap, r"token 300 is '\S+' in the draft model other, and '\S+' in the model; give a draft"),
        (lacking, r"token \d+ is nothing in the draft model other, and '.+' in the model; give a draft"),
        (special, r"token 300 is '.+' \(special\) in the draft model other, and '[^']+' in the model; give a draft"),
        (more_rows, r"other has rows for 1088 tokens, and the model 1024; give a draft"),
    ],
)
def test_a_draft_model_with_other_tokens_is_refused(tmp_path, capsys, change, says):
    code, out = generate(capsys, "--speculate", "2", "--draft-model", tokens_only(tmp_path / "other", change))
    assert code == 2
    assert re.search(rf"\[tokenizer\] {says}", out.err)
    assert sum("[tokenizer]" in line for line in out.err.splitlines()) == 1


def test_both_models_must_fit(capsys, chat_folder, monkeypatch):
    toy = memory.held_bytes(load_model(demo_model_path())) + memory.WORKSPACE_BYTES
    draft = memory.held_bytes(load_model(chat_folder))
    flags = "--speculate", "2", "--draft-model", chat_folder
    monkeypatch.setattr(memory, "budget_bytes", lambda: toy + draft + (1 << 16))
    assert generate(capsys, *flags)[0] in (0, 4)
    monkeypatch.setattr(memory, "budget_bytes", lambda: toy + draft - (1 << 16))
    monkeypatch.setattr("ring_mlx.checkpoint.weights.give", _give_once())
    code, out = generate(capsys, *flags)
    assert code == 2
    assert re.search(r"\[memory\] demo_model needs 0\.\d GB .* beside the draft model's 0\.\d GB; ", out.err)


def _give_once():
    """Gives weights to the first model only."""
    give, left = weights.give, [1]

    def once(*a):
        left.pop()
        give(*a)

    return once


def test_a_draft_model_needs_speculation(capsys, chat_folder):
    code, out = generate(capsys, "--speculate", "off", "--draft-model", chat_folder)
    assert code == 2
    assert "--draft-model drafts for --speculate only; add --speculate auto" in out.err


def test_a_draft_model_does_not_go_with_launch(capsys, monkeypatch):
    rank = SimpleNamespace(check=lambda args: None, is_first=True)
    monkeypatch.setattr("ring_mlx.cli.generate_command.joined", lambda how: nullcontext(rank))
    code, out = generate(capsys, "--speculate", "2", "--draft-model", "x")
    assert code == 2
    assert "--draft-model does not go with `ring-mlx launch`" in out.err
