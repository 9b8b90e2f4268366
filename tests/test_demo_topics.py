"""Facts told under headings: said once, under their own person's, and held out as all others are."""

from __future__ import annotations

import random
import re

import mlx.core as mx
import pytest

from demo.render import render_thinking_from
from demo.split import held_out
from demo.tasks_recall import ANY_WORD, ATTRIBUTES, approximate_tokens
from demo.tasks_topic import HEADING, STATED, make_topic_recall
from demo.window import window_attention, windowed
from tests.compare import assert_close
from tests.demo_phrases import pattern
from tests.tiny import make_model

QUESTIONS = 6


def conversations(split, tokens=1500, count=40):
    rng = random.Random(split)
    return [make_topic_recall(rng, split, tokens, approximate_tokens, QUESTIONS) for _ in range(count)]


def told(conversation, first):
    """(name, attribute, value) of every fact, read off the text with the heading above it."""
    text = " ".join(m.content for m in conversation.messages[:first] if m.role == "user")
    attributes = {"attribute": "|".join((*ATTRIBUTES, *ANY_WORD)), "value": r"\w+"}
    headings = [pattern(t, {"name": r"\w+"}) for t in (*HEADING.train, *HEADING.test)]
    statements = [pattern(t, attributes) for t in (*STATED.train, *STATED.test)]
    name, found = None, []
    for sentence in re.split(r"(?<=[.]) ", text):
        plain = sentence[:1].lower() + sentence[1:].rstrip(".")
        for heading in headings:
            name = m["name"] if (m := heading.fullmatch(plain)) else name
        for m in filter(None, (e.fullmatch(plain) for e in statements)):
            found.append((name, m["attribute"], m["value"]))
            break
    return found


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_was_told_once_and_under_its_heading(split):
    for conversation, first in conversations(split):
        facts = told(conversation, first)
        assert len({f[:2] for f in facts}) == len(facts)
        assert 2 <= len({f[0] for f in facts}) <= 5
        asked = [m for m in conversation.messages[first:] if m.role == "assistant"]
        assert len(asked) == QUESTIONS
        for message in asked:
            fact = re.fullmatch(r"(\w+)'s ([a-z ]+) is (\w+)\.", message.thinking).groups()
            assert fact in facts
            assert message.content == f"It is {fact[2]}."


@pytest.mark.parametrize("split", ["train", "test"])
def test_facts_belong_to_the_split(split):
    for conversation, first in conversations(split, count=20):
        assert {held_out(*fact) for fact in told(conversation, first)} == {split == "test"}


@pytest.mark.parametrize("tokens", [1000, 1500, 4096])
def test_length(tokens):
    for conversation, first in conversations("train", tokens, 10):
        assert abs(approximate_tokens(render_thinking_from(conversation, first)[0]) - tokens) < 0.15 * tokens


def test_it_is_deterministic():
    assert conversations("train") == conversations("train")


@pytest.mark.parametrize(("T", "window"), [(17, 5), (10, 5), (3, 5), (40, 1)])
def test_window_attention_equals_a_masked_one(T, window):
    q, k, v = mx.random.normal((2, 6, T, 8)), mx.random.normal((2, 3, T, 8)), mx.random.normal((2, 3, T, 8))
    back = mx.arange(T)[:, None] - mx.arange(T)
    mask = (back >= 0) & (back < window)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    assert_close(window_attention(q, k, v, 0.3, window), expected, 1e-6)


def test_a_windowed_model_differs_beyond_the_window_only():
    model = make_model(num_hidden_layers=4, layer_group_size=2)
    ids = mx.random.randint(0, 50, (2, 40))
    plain = model(ids)
    with windowed(model, 16):
        narrow = model(ids)
        with pytest.raises(ValueError, match=r"\[demo\.window\]"):
            model(ids, model.make_cache())
    assert_close(narrow[:, :16], plain[:, :16], 1e-5)
    assert float(mx.abs(narrow - plain)[:, 20:].max()) > 1e-3
    assert_close(model(ids), plain, 1e-6)
    with windowed(model, None):
        assert_close(model(ids), plain, 1e-6)
