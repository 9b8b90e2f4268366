"""How an answer looks: streamed or whole, in formulas, code, tables, headings, and while the model thinks."""

from __future__ import annotations

import asyncio
import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual.widgets.markdown import MarkdownBlock

from ring_mlx import harmless
from tests.tui_pilot import chat
from tui.widgets.answer import Answer, open_from, parser
from tui.widgets.blocks import Code, CodeBlock, Formula, Table
from tui.widgets.turns import Turns

FRAGMENTS = [
    "\\(", "\\)", "\\[", "\\]", "$", "$$", "\n", "\n\n", "- ", "1. ", "> ", "# ", "```", "```py\n", "`", "*", "**", "|", "|--|--|\n",
    "| a | b |\n", "\\begin{align}", "\\end{align}", "\\frac{1}{2}", "\\boxed{", "}", "{", "x^2", " = ", "word", " text here ", "  ",
    "    ", "\\\\", "&", "5", "[a](b)", "<b>", "~~", "---\n", "===\n", "\\sum_{i}", "\t", "%", "\\text{if }", "_", "^", "!", "&amp;",
    "\\", "#", "+ ", "http://x.to/y", ">", "*\n", "\u2028", "你好", "[1]: http://x\n", "<div>\n", "word\n",
]  # fmt: skip
DOCUMENTS = st.lists(st.sampled_from(FRAGMENTS), min_size=2, max_size=20).map("".join)


PARSER = parser()


def tops(text):
    """The first line of each top-level block, its type, and everything below it."""
    found, level = [], 0
    for token in PARSER.parse(text):
        if token.level == 0 and token.nesting >= 0:
            found.append((token.map[0], []))
        if found:
            children = [(t.type, t.content, str(t.attrs)) for t in token.children or ()]
            found[-1][1].append((token.type, token.content, token.info, children))
        level += token.nesting
    return found


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS)
def test_a_text_in_pieces_is_parsed_as_the_whole_at_every_cut(text):
    settled, at = [], 0
    for end in range(1, len(text) + 1):
        blocks = tops(text[at:end])
        start = open_from([line for line, _ in blocks], text[at:end].count("\n"))
        now = settled + [block for _, block in blocks]
        settled += [block for line, block in blocks if line < start]
        at += sum(len(line) + 1 for line in text[at:end].split("\n")[:start])
        assert now == [block for _, block in tops(text[:end])]


def tree(widget, depth=0):
    """What an answer's widgets show."""
    found = []
    for child in widget.children:
        if isinstance(child, (MarkdownBlock, Code)):
            found.append((depth, type(child).__name__, str(child.render())))
        found += tree(child, depth + 1)
    return found


def test_streamed_widgets_equal_those_of_the_whole():
    chance = random.Random(7)

    async def script(d):
        column = d.chat.query_one(Turns)._column
        for _ in range(12):
            text = "".join(chance.choice(FRAGMENTS) for _ in range(chance.randint(2, 25)))
            cuts = sorted(chance.sample(range(len(text)), min(len(text), chance.choice([1, 3, 12]))))
            whole, streamed = Answer(text), Answer("")
            await column.mount(whole, streamed)
            await d.settle()
            for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
                await streamed.append(harmless(text[start:end]))
            await d.settle()
            assert tree(streamed) == tree(whole), (text, cuts)
            await column.remove_children(Answer)

    chat(script)


def test_a_new_block_leaves_the_styles_of_the_others(monkeypatch):
    """Textual applies the style sheet again to blocks with rules such as ``:last-child``: in a long answer to hundreds."""

    async def script(d):
        await d.exchange("q", MATH)
        answer = d.app.query_one(Answer)
        assert answer.children[-1].styles.margin.bottom == 1
        assert answer.size.height == answer.virtual_size.height - 1
        assert not [block for block in answer.query("*") if block._has_order_style]

    chat(script)


def test_an_answer_leaves_as_much_time_to_keys_as_it_takes(monkeypatch):
    shown = []

    async def script(d):
        await d.say("q")
        more = Answer._show_more

        async def slow(self):
            started = time.perf_counter()
            await asyncio.sleep(0.1)
            await more(self)
            shown.append((started, time.perf_counter()))

        monkeypatch.setattr(Answer, "_show_more", slow)
        for _ in range(60):
            d.chat.post_message(d.text("word "))
            await asyncio.sleep(0.01)
        rests = [start - end for (_, end), (start, _) in pairwise(shown)]
        assert rests
        assert min(rests) > 0.09
        await d.post(d.end())
        assert d.app.query_one(Answer).source == "word " * 60

    chat(script)


MATH = r"""So \(a^2\) and

\[
x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}
\]

- item $x_1$

> quote \(e^{i\pi}\)

| f | \(f'\) |
|:--|--:|
| $x^n$ | $n x^{n-1}$ |

\[ \boxed{42} \] and $\foo{y}$, `\(code\)`, $5 and $10.
"""


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (200, 60)])
def test_formulas_are_seen_and_copies_have_their_source(size):
    async def script(d):
        await d.exchange("q", *MATH.splitlines(keepends=True))
        answer = d.app.query_one(Answer)
        shown = "\n".join(text for _, _, text in tree(answer))
        for part in (
            "So a² and",
            "√(b² - 4ac)",
            "item x₁",
            "e^(iπ)",
            "n xⁿ⁻¹",
            "[42]",
            r"$\foo{y}$",
            r"\(code\)",
            "$5 and $10.",
        ):
            assert part in shown
        assert d.said[-1] == answer.source == MATH
        await d.command("/copy")
        assert d.app.clipboard == MATH
        formula = d.app.query_one(Formula)
        assert ("─" in str(formula.render())) == (size[0] > 40 or formula.size.width > 24)

    chat(script, size)


def test_a_wide_formula_goes_on_in_the_next_line():
    tex = " + ".join(rf"\frac{{a_{{{n}}}}}{{b}}" for n in range(20))

    async def script(d):
        await d.exchange("q", f"\\[ {tex} \\]")
        assert "a₁₉/b" in "".join("".join(row.split()) for row in d.screen_text)

    chat(script, (40, 24))


def test_a_turn_continues_below_its_text():
    """The first lines of a paragraph stay when a stopped answer goes on."""

    async def script(d):
        await d.exchange("q", "one\ntwo\nthree")
        await d.command("/continue")
        await d.post(d.text(" four"))
        assert tree(d.app.query_one(Answer))[0][2] == "one two three four"

    chat(script)


@pytest.mark.parametrize("language", ["python", "javascript", "rust", "bash", "json"])
def test_the_label_of_code_has_the_whole_language(language):
    async def script(d):
        await d.say("q")
        for letter in f"```{language}\nx = 1\n```\n":
            await d.app.query_one(Answer).append(letter)
        await d.settle()
        assert str(d.app.query_one(".copy").render()) == f"{language} · copy"

    chat(script)


def test_code_too_long_for_a_line_goes_on_after_a_sign_that_is_not_copied():
    line = "x = " + " + ".join(map(str, range(60)))

    async def script(d):
        await d.exchange("q", f"```py\n{line}\ny = 1\n```")
        code = d.app.query_one(Code)
        rows = str(code.render()).split("\n")
        assert len(rows) > 2
        assert all(row.startswith("↪ ") for row in rows[1:-1])
        assert all(len(row) <= code.size.width for row in rows)
        assert rows[0] + "".join(row[2:] for row in rows[1:-1]) == line
        assert code.region.height == len(rows)
        assert d.app.query_one(CodeBlock).code == f"{line}\ny = 1"
        d.app.screen.selections = {}
        code.text_select_all()
        assert d.app.screen.get_selected_text() == f"{line}\ny = 1"

    chat(script)


TABLE = "| name | size |\n|:--|--:|\n| a | 5 |\n| long name | 100 |\n"


def test_a_table_is_as_wide_as_its_content_and_aligned():
    async def script(d):
        await d.exchange("q", *TABLE.splitlines(keepends=True))
        rows = str(d.app.query_one(Table).render()).split("\n")
        assert rows == [" name      │ size", "───────────┼──────", " a         │    5", " long name │  100"]

    chat(script, (200, 60))


@pytest.mark.parametrize("columns", [2, 9, 30])
def test_a_table_loses_no_word_on_a_narrow_terminal(columns):
    words = [f"w{n}ord" for n in range(columns)]
    row = "| " + " | ".join(words) + " |\n"

    async def script(d):
        await d.exchange("q", row + "|--" * columns + "|\n" + row.replace("w", "c"))
        shown = "".join(str(d.app.query_one(Table).render()).split())
        assert max(map(len, str(d.app.query_one(Table).render()).split("\n"))) <= 40
        for n in range(columns):
            assert f"c{n}ord" in shown or columns == 9

    chat(script, (40, 24))


def test_text_is_at_most_100_columns_wide_and_headings_are_left():
    async def script(d):
        await d.exchange("q", "# Title\n\n" + "word " * 100 + "\n\n```\n" + "x" * 150 + "\n```\n")
        rows = d.screen_text
        assert max(len(row[row.index("word") :].rstrip("▁▂▃▄▅▆▇█ ")) for row in rows if "word" in row) <= 100
        assert any("x" * 150 in row for row in rows)
        assert next(row for row in rows if "Title" in row).index("Title") < 6

    chat(script, (200, 60))


def test_tags_are_text():
    async def script(d):
        await d.exchange(
            "q", "<answer>\n42 <b>bold</b>\n</answer>\n\n<details>hidden</details>\n\n[1]: http://x.to/y\n"
        )
        shown = "\n".join(d.screen_text)
        for part in ("<answer>", "42 <b>bold</b>", "<details>hidden", "[1]: http://x.to/y"):
            assert part in shown

    chat(script)


def test_the_last_line_is_apart_from_the_prompt():
    async def script(d):
        await d.exchange("q", "\n\n".join(f"line {n}" for n in range(60)))
        note = d.app.query(".note").last()
        assert d.chat.entry.region.y - note.region.bottom == 1

    chat(script)


def test_the_end_of_a_thought_is_seen_while_it_comes():
    async def script(d):
        await d.say("q")
        await d.post(d.thought("first\n\nsecond \\(x^2\\)\nthird\n", 3, 0.1))
        tail = d.app.query_one(".tail")
        rows = str(tail.render()).split("\n")
        assert [row[2:] for row in rows] == ["first", "second x²", "third"]
        sign = rows[-1][0]
        await d.post(d.thought("fourth " + "word " * 30, 40, 0.2))
        rows = str(tail.render()).split("\n")
        assert len(rows) == tail.region.height == 3
        assert "first" not in str(rows)
        assert rows[-1][0] != sign
        await d.post(d.text("It is"))
        assert not tail.display
        assert not d.app.query_one(".thought").display
        await d.post(d.end())
        assert not tail.display

    chat(script)
