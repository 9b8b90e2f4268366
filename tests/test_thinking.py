"""Thought and answer in streamed text."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ring_mlx.thinking import ThoughtBudget, ThoughtSplitter, opens_thought

PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "a < b", "\n\n", "5"]), max_size=12)


def split_all(text, cuts, inside):
    splitter, thought, answer = ThoughtSplitter(inside), "", ""
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    for a, b in pairwise(edges):
        t, s = splitter.feed(text[a:b])
        thought, answer = thought + t, answer + s
    t, s = splitter.flush()
    return thought + t, answer + s


@given(PIECES, st.lists(st.integers(0, 99), max_size=6), st.booleans())
def test_cuts_do_not_matter(pieces, cuts, inside):
    text = "".join(pieces)
    assert split_all(text, cuts, inside) == split_all(text, [], inside)


def test_parts_without_tags():
    assert split_all("<think>\nhm\n</think>\n\n42", [], False) == ("\nhm\n", "\n\n42")
    assert split_all("hm</think>42 < 43", [3, 9], True) == ("hm", "42 < 43")
    assert split_all("no thought", [4], False) == ("", "no thought")
    assert split_all("a</thin", [3], True) == ("a</thin", "")


def test_what_may_become_a_tag_is_held_back():
    splitter = ThoughtSplitter(inside=True)
    assert splitter.feed("so x</th") == ("so x", "")
    assert splitter.feed("ink>yes") == ("", "yes")


def test_which_prompts_open_a_thought():
    assert opens_thought("<role>HUMAN</role>hi<|role_end|><role>ASSISTANT</role><think>\n")
    assert opens_thought("<role>ASSISTANT</role><think>\nLet me see")
    assert opens_thought("plain text <think>")
    assert not opens_thought("<role>HUMAN</role>what is <think>?<|role_end|><role>ASSISTANT</role>")
    assert not opens_thought("<role>ASSISTANT</role><think>\n\n</think>\n\n")
    assert not opens_thought("")


def drive(budget, opens, closing=(7, 8)):
    """Which ids are forced at each of ten tokens, where the model never closes by itself."""
    state = {"inside": opens}
    b, forced = ThoughtBudget(budget, closing, lambda: state["inside"]), []
    for _ in range(10):
        token = b.next_forced()
        forced.append(token)
        if token == 8:
            state["inside"] = False
    return forced


def test_a_budget_closes_the_thought():
    assert drive(3, True) == [None, None, None, 7, 8, *[None] * 5]
    assert drive(0, True) == [7, 8, *[None] * 8]
    assert drive(0, False) == [None] * 10


def test_a_budget_spares_a_thought_that_closes_in_time():
    inside = iter([True, True, False, False, False])
    b = ThoughtBudget(3, [7], lambda: next(inside))
    assert [b.next_forced() for _ in range(5)] == [None] * 5
