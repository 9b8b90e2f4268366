"""Thought and answer in streamed text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_mlx.errors import OptionError
from ring_mlx.generation.thinking import (
    Thinking,
    ThoughtBudget,
    ThoughtSplitter,
    end_note,
    opens_thought,
    splitter_after,
)

MARKS = ["<think>", "</think>", "<", "</", "think", ">", "`", "``", "```", "~~~", "\n", "\n\n", " ", "a < b", "5"]
MARKS += ["<tool_call>", "</tool_call>", "</tool", "```py\n", "\n```\n", "\n</think>\n\n", "`</think>`", "\\", "\ufffd"]
PIECES = st.lists(st.sampled_from(MARKS), max_size=14)
STARTS = st.sampled_from(["open", "likely", "unlikely", "closed"])


def split_all(text, cuts, start, said=""):
    """The final thought and answer, what a reader of the parts alone has, and the splitter."""
    splitter, parts, told = ThoughtSplitter(start, said), ("", ""), ("", "")
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    feeds = [lambda a=a, b=b: splitter.feed(text[a:b]) for a, b in pairwise(edges)]
    for feed in [*feeds, splitter.flush]:
        new = feed()
        told = (told[0] + new[0], told[1] + new[1])
        parts = splitter.revised or (parts[0] + new[0], parts[1] + new[1])
    return parts, told, splitter


def parted(text, start="unlikely"):
    """The final thought and answer, the same however the text is cut."""
    whole = split_all(text, [], start)[0]
    assert split_all(text, range(len(text)), start)[0] == whole
    for cut in range(1, len(text)):
        assert split_all(text, [cut], start)[0] == whole
    return whole


@given(PIECES, st.lists(st.integers(0, 99), max_size=6), STARTS)
def test_cuts_do_not_matter_and_nothing_is_lost_or_doubled(pieces, cuts, start):
    text = "".join(pieces)
    (thought, answer), told, splitter = split_all(text, cuts, start)
    assert (thought, answer) == split_all(text, [], start)[0]
    opened = text.lstrip().startswith("<think>")
    rest = text.replace("<think>", "", 1) if opened else text
    assert rest in (thought + "</think>" + answer, thought + answer)
    assert rest == thought + "</think>" + answer or not (thought and answer)
    assert not thought or start != "closed" or opened
    # Who never looks at `revised` has the right answer, if an earlier part was not told as one.
    assert told[1].endswith(answer)
    assert told[1] == answer or start == "unlikely"
    assert splitter.thinking_tokens <= len(cuts) + 1
    assert (splitter.thinking_tokens > 0) >= bool(thought)


@given(PIECES, STARTS)
def test_one_letter_at_a_time_is_the_whole(pieces, start):
    parted("".join(pieces), start)


@pytest.mark.parametrize(
    ("start", "text", "thought", "answer"),
    [
        # The prompt opens the thought, the model does, or it only closes it.
        ("open", "hm</think>42 < 43", "hm", "42 < 43"),
        ("likely", "<think>\nhm\n</think>\n\n42", "\nhm\n", "\n\n42"),
        ("likely", "hm\n</think>\n\n42", "hm\n", "\n\n42"),
        ("unlikely", " <think>hm</think>42", " hm", "42"),
        ("unlikely", "hm</think>42", "hm", "42"),
        ("closed", "<think>hm</think>42", "hm", "42"),
        # No close.
        ("open", "a</thin", "a</thin", ""),
        ("likely", "no thought", "", "no thought"),
        ("unlikely", "no thought <thin", "", "no thought <thin"),
        ("likely", "<thin", "", "<thin"),
        ("likely", "<think>hm", "hm", ""),
        ("likely", " \n", "", " \n"),
        ("open", "", "", ""),
        # Afterwards, and where the answer is certain, tags are text.
        ("open", "hm</think>a <think>b</think> c", "hm", "a <think>b</think> c"),
        ("open", 'hm</think><tool_call>{"a": "<think>"}</tool_call>', "hm", '<tool_call>{"a": "<think>"}</tool_call>'),
        ("closed", "a </think> b <think> c", "", "a </think> b <think> c"),
        ("open", "a <think> b</think>c", "a <think> b", "c"),
        # Code within the thought.
        ("open", "say `</think>` here\n</think>\n\n42", "say `</think>` here\n", "\n\n42"),
        ("open", "say ``a ` </think>`` here</think>42", "say ``a ` </think>`` here", "42"),
        ("open", "```xml\nx\n</think>\ny\n```\n</think>\n\n42", "```xml\nx\n</think>\ny\n```\n", "\n\n42"),
        ("open", "- ~~~\n  </think>\n", "- ~~~\n  ", "\n"),
        ("open", "~~~\n```\n</think>\n~~~\n</think>42", "~~~\n```\n</think>\n~~~\n", "42"),
        ("open", "```\n``` x\n</think>\n```\n</think>42", "```\n``` x\n</think>\n```\n", "42"),
        ("open", "```a```\n</think>42", "```a```\n", "42"),
        # What looks like code is none: the line ends before the span does.
        ("open", "the ` key</think>\n\nuse `x`", "the ` key", "\n\nuse `x`"),
        ("open", "the ` key</think>42", "the ` key", "42"),
        ("open", "the `` key ` x</think>42", "the `` key ` x", "42"),
        # In a quote or a list; a call that is only mentioned, and one that is cut off.
        ("open", "> ```\n> </think>\n> ```\nso\n</think>\n\n42", "> ```\n> </think>\n> ```\nso\n", "\n\n42"),
        ("open", "- ```\n  </think>\n  ```\nso\n</think>\n\n42", "- ```\n  </think>\n  ```\nso\n", "\n\n42"),
        (
            "likely",
            "use <tool_call> or\n</think>\n\n<tool_call>{}</tool_call>",
            "use <tool_call> or\n",
            "\n\n<tool_call>{}</tool_call>",
        ),
        (
            "unlikely",
            "I <tool_call>\n {\n</think>4 <tool_call>{}</tool_call>",
            "I <tool_call>\n {\n",
            "4 <tool_call>{}</tool_call>",
        ),
        (
            "likely",
            '<tool_call>{"a": "b\n</think>4 <tool_call>{"c": 1}</tool_call>',
            '<tool_call>{"a": "b\n',
            '4 <tool_call>{"c": 1}</tool_call>',
        ),
        ("likely", '<tool_call>{"\\"": "</think>"}</tool_call>', "", '<tool_call>{"\\"": "</think>"}</tool_call>'),
        ("likely", "the ` <tool_call> {`</think>4", "the ` <tool_call> {`", "4"),
        # A block that the thought leaves open: then the next one of the answer only seems to end it.
        ("likely", "```py\nx\n</think>\n\n42\n```py\ny\n```\n", "```py\nx\n", "\n\n42\n```py\ny\n```\n"),
        ("likely", "```\nx\n</think>\n\n42\n```\ny\n```\n", "```\nx\n", "\n\n42\n```\ny\n```\n"),
        ("open", "`</think>`\n```\nx\n</think>\n\n42\n```\ny\n```", "`</think>`\n```\nx\n", "\n\n42\n```\ny\n```"),
        ("likely", "```\n<think>\n</think>\n\n```\n```\nso", "", "```\n<think>\n</think>\n\n```\n```\nso"),
        ("likely", "```\na </think>\n```\n```\nso", "", "```\na </think>\n```\n```\nso"),
        # No close outside of code: that in code has to do, if there is a thought for certain.
        ("open", "```\nx\n</think>\n\n42\n```py\ny\n```\n", "```\nx\n", "\n\n42\n```py\ny\n```\n"),
        ("open", "a `</think>` b", "a `", "` b"),
        ("likely", "use `</think>` so", "", "use `</think>` so"),
        ("unlikely", "use\n```\n</think>\n```\nso", "", "use\n```\n</think>\n```\nso"),
        ("likely", "```\nx\n</think>\n\n42", "```\nx\n", "\n\n42"),
        # A call without a thought may hold a tag; one in a thought is thought.
        ("likely", '<tool_call>{"a": "</think>"}</tool_call>', "", '<tool_call>{"a": "</think>"}</tool_call>'),
        ("likely", "I <tool_call>{}</tool_call></think>42", "I <tool_call>{}</tool_call>", "42"),
        ("open", "I <tool_call>\n</think>42", "I <tool_call>\n", "42"),
    ],
)
def test_which_tag_ends_the_thought(start, text, thought, answer):
    assert parted(text, start) == (thought, answer)


def test_what_may_become_a_tag_is_held_back():
    splitter = ThoughtSplitter("open")
    assert splitter.feed("so x</th") == ("so x", "")
    assert splitter.feed("ink>yes") == ("", "yes")
    splitter = ThoughtSplitter("likely")
    assert [splitter.feed(t) for t in ("\n", "<thi", "nk>", "x")] == [("", ""), ("", ""), ("\n", ""), ("x", "")]


def test_text_is_shown_as_the_start_says_and_revised():
    splitter = ThoughtSplitter("likely")
    assert (splitter.feed("It is 4."), splitter.inside, splitter.revised) == (("It is 4.", ""), True, None)
    assert (splitter.flush(), splitter.revised) == (("", "It is 4."), ("", "It is 4."))
    assert not splitter.inside
    assert splitter.thinking_tokens == 0
    splitter = ThoughtSplitter("unlikely")
    assert (splitter.feed("Hm."), splitter.inside) == (("", "Hm."), False)
    assert splitter.feed("</think>4") == ("Hm.", "4")
    assert (splitter.revised, splitter.thinking_tokens) == (("Hm.", "4"), 2)
    assert (splitter.feed("2"), splitter.revised, splitter.thinking_tokens) == (("", "2"), None, 2)


def test_tokens_of_a_thought_are_counted_up_to_its_tag():
    splitter = ThoughtSplitter("open")
    for text in ("the ` key", "</think>", " it", " is"):
        splitter.feed(text)
    assert splitter.thinking_tokens == 4
    splitter.feed("\n")
    assert splitter.thinking_tokens == 2


@pytest.mark.parametrize(
    ("said", "text", "parts"),
    [
        ("<think>\n", "hm</think>4", ("hm", "4")),
        ("<think>\n\n</think>\n\n", "a </think> b", ("", "a </think> b")),
        ("<think>say `", "</think>` and</think>4", ("</think>` and", "4")),
        ("<think>hm</thi", "nk>4", ("", "4")),
        ("<think>\n", "<think>\nhm</think>4", ("\nhm", "4")),
        ("<think>\n", " <th", (" <th", "")),
        ("<think>", "\n`</think>` <think> </think>4", ("\n`</think>` <think> ", "4")),
        ("So: ", "4", ("", "4")),
        ("Hm, ", "so</think>4", ("so", "4")),
    ],
)
def test_what_the_prompt_holds_of_the_answer_counts(said, text, parts):
    prompt = f"<role>HUMAN</role>x<role>ASSISTANT</role>{said}"
    for cuts in ([], range(len(text))):
        splitter, found = splitter_after(prompt), ("", "")
        edges = [0, *cuts, len(text)]
        for a, b in pairwise(edges):
            new = splitter.feed(text[a:b])
            found = splitter.revised or (found[0] + new[0], found[1] + new[1])
        new = splitter.flush()
        assert (splitter.revised or (found[0] + new[0], found[1] + new[1])) == parts


def test_which_prompts_open_a_thought():
    assert opens_thought("<role>HUMAN</role>hi<|role_end|><role>ASSISTANT</role><think>\n")
    assert opens_thought("<role>ASSISTANT</role><think>\nLet me see")
    assert opens_thought("plain text <think>")
    assert not opens_thought("<role>HUMAN</role>what is <think>?<|role_end|><role>ASSISTANT</role>")
    assert not opens_thought("<role>ASSISTANT</role><think>\n\n</think>\n\n")
    assert not opens_thought("")
    assert not opens_thought("<role>ASSISTANT</role><think>x</think> the <think> tag")


def test_how_an_answer_starts():
    def start(prompt, *given):
        return splitter_after(prompt, *given).start

    family = "<role>HUMAN</role>hi<role>ASSISTANT</role>"
    assert start(family) == "likely"
    assert start(family + "The sum") == "unlikely"
    assert start("<|im_start|>assistant\n") == "unlikely"
    assert start("<|im_start|>assistant\n", "auto", True) == "likely"
    assert start("<role>ASSISTANT</role>4<role>HUMAN</role>the <think> tag") == "unlikely"
    assert start(family + "<think>\n", "closed") == "closed"
    assert start(family, "open") == "open"
    closed = splitter_after(family + "<think>\n\n</think>\n\n")
    assert not closed.inside
    assert splitter_after("<|im_start|>assistant\n<think>\n\n</think>\n\n").feed("a</think>b") == ("", "a</think>b")


def test_the_room_that_a_thought_leaves():
    assert Thinking().budget(2048) == 1536
    assert Thinking().budget(100_000) == 100_000 - 1024
    assert Thinking().budget(64) == 48
    assert Thinking().budget(63) is None
    assert Thinking(answer_room=0).budget(2048) is None
    assert Thinking(answer_room=9).budget(20) == 11
    assert Thinking(answer_room=99).budget(20) == 10
    with pytest.raises(OptionError, match="answer room -1 is negative"):
        Thinking(answer_room=-1)
    with pytest.raises(OptionError, match="thinking start 'maybe' is unknown; give auto, open, closed"):
        Thinking("maybe")


def test_words_for_the_end_of_an_answer():
    assert end_note("length", 9, 9, "", "raise it") == "the answer is empty: all 9 tokens were thought; raise it."
    assert end_note("stop", 9, 9, "", "raise it").endswith("all 9 tokens were thought; ask again or in other words.")
    assert end_note("stop", 2, 0, " ", "").startswith("the answer is empty: 2 tokens and no text came")
    assert end_note("length", 1200, 9, "a", "raise it") == "the answer was cut off after 1,200 tokens; raise it."
    assert end_note("stop", 9, 9, "a", "raise it") == ""
    assert "the model ended it at once; ask" in end_note("stop", 1, 1, "", "")
    assert "1 token and no text came; raise it" in end_note("length", 1, 0, "", "raise it")
    for text in ("a", "\ufffd", "\u65e5", " .\n", "\U0001f469\u200d\U0001f52c", "e\u0301"):
        assert end_note("stop", 2, 1, text, "") == ""
    for text in ("\u200b", "\0", "\u200d\ufeff\n", "\x1b"):
        assert "nothing of it can be seen; ask again" in end_note("stop", 2, 0, text, "")


def test_a_budget_closes_a_thought_within_code_unless_a_tag_may_have():
    splitter = ThoughtSplitter("open")
    budget = ThoughtBudget(1, [7], lambda: splitter.may_be_closed, splitter.close_next)
    assert budget.next_forced() is None
    splitter.feed("```\ncode")
    assert budget.next_forced() == 7
    assert splitter.feed("\n</think>\n\n42") == ("\n", "\n\n42")
    for text in ("```\n</think>", "the ` key</think>", "```py\nx\n</think>\n\n42\n```py\ny\n```\nand"):
        splitter = ThoughtSplitter("open")
        splitter.feed(text)
        assert splitter.inside
        assert ThoughtBudget(0, [7], lambda s=splitter: s.may_be_closed).next_forced() is None


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
    b = ThoughtBudget(3, [7], lambda: False)
    assert [b.next_forced() for _ in range(5)] == [None] * 5
