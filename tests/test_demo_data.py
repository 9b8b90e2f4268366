"""The demo's conversations: right, deterministic, and split without leaks."""

from __future__ import annotations

import datetime
import random
import re
from itertools import islice

import pytest

from demo import follow_ups, phrases, tasks_chat, tasks_recall, tasks_topic, tasks_word
from demo.data import (
    SPLITS,
    TASK_WEIGHTS,
    TASKS,
    eval_suite,
    extract_answer,
    make,
    make_recall,
    render,
    stream,
)
from demo.split import WORDS, Phrasings, held_out, word_held_out
from tests.demo_phrases import pattern

MANY = 20_000
FORMS = [
    form
    for module in (phrases, follow_ups, tasks_recall, tasks_topic)
    for form in vars(module).values()
    if isinstance(form, Phrasings)
]
FORMS += [intent.phrasings for intent in (*tasks_chat.INTENTS.values(), tasks_chat.CANNOT)]
SLOTS = {
    **dict.fromkeys(("a", "b", "n", "start"), r"\d+"),
    **dict.fromkeys(("item", "days", "months"), "[a-z]+"),
    **dict.fromkeys(("name", "day", "month", "other"), "[A-Z][a-z]+"),
    "attribute": "[a-z ]+",
    "letter": "[a-z]",
    "numbers": "[0-9, ]+",
    "place": "[A-Z][a-z]+",
    "thing": "[a-z ]+",
    "value": r"\w+",
    "word": '"?[a-z]+"?',
    "work": "[A-Za-z -]+",
}
TRAIN_PATTERNS = {id(form): [pattern(t, SLOTS) for t in form.train] for form in FORMS}
TEST_PATTERNS = {id(form): [pattern(t, SLOTS) for t in form.test] for form in FORMS}


def slots(form, user):
    """The values with which `user` was made from a phrasing of `form`, or None."""
    text = user[0].lower() + user[1:] if not re.match(r"[A-Z][a-z]+ (has|finds|had|fills|sold)\b", user) else user
    for expression in TRAIN_PATTERNS[id(form)] + TEST_PATTERNS[id(form)]:
        if found := expression.fullmatch(text):
            return {k: int(v) if v.isdigit() else v.strip('"') for k, v in found.groupdict().items()}
    return None


def first_slots(user, *forms):
    """The first of `forms` that could have made `user`, and the values."""
    for form in forms:
        if (values := slots(form, user)) is not None:
            return form, values
    raise AssertionError(f"no phrasing makes {user!r}")


@pytest.fixture(scope="module")
def drawn():
    """20,000 conversations of each split."""
    return {split: list(islice(stream(11, split), MANY)) for split in SPLITS}


# The split


def operand_pairs(thinking):
    """Operand pairs worked on, in any order: ``12+345``, ``12-345`` and ``12*3`` at a line's start, ``12 345`` alone."""
    found = re.findall(r"^(\d+)[+*-](\d+)(?=$| )", thinking, re.MULTILINE)
    found += re.findall(r"^(\d+) (\d+)$", thinking, re.MULTILINE)
    return {tuple(sorted(map(int, pair))) for pair in found}


def sorted_lists(thinking):
    found = re.findall(r"(?:smallest|largest) first: (.*)", thinking)
    return {tuple(sorted(map(int, numbers.split()))) for numbers in found}


def spelled(thinking):
    found = re.findall(r"(?:letters|count .): (.*)", thinking)
    return {re.sub(r"[^a-z]", "", letters) for letters in found}


def test_operands_do_not_cross_the_split(drawn):
    def all_of(split, find):
        return {key for c in drawn[split] for m in c.messages for key in find(m.thinking)}

    for find in (operand_pairs, sorted_lists):
        in_train, in_test = all_of("train", find), all_of("test", find)
        assert len(in_train) > 500
        assert not [key for key in in_train if held_out(*key)]
        asked_in_test = {key for key in in_test if held_out(*key)}
        assert len(asked_in_test) > 500
        assert not in_train & asked_in_test
    words = {split: {min(w, w[::-1]) for w in all_of(split, spelled)} for split in SPLITS}
    assert len(words["test"]) > 80
    assert not words["train"] & words["test"]
    assert all(word_held_out(w) for w in words["test"])


def test_last_question_of_test_is_held_out(drawn):
    for c in drawn["test"]:
        if c.task in ("add", "subtract", "compare", "number_chain"):
            assert any(held_out(*pair) for pair in operand_pairs(c.messages[-1].thinking)), c
        elif c.task == "sort":
            assert all(held_out(*key) for key in sorted_lists(c.messages[-1].thinking)), c


def test_held_out_ignores_order_and_takes_five_percent():
    pairs = [(a, b) for a in range(200) for b in range(a, 200)]
    assert all(held_out(a, b) == held_out(b, a) for a, b in pairs)
    assert 0.045 < sum(held_out(a, b) for a, b in pairs) / len(pairs) < 0.056
    assert held_out(*(1, 2, 3)) == held_out(*(3, 1, 2))
    assert all(word_held_out(w) == word_held_out(w[::-1]) for w in WORDS)


def test_facts_do_not_cross_the_split(drawn):
    def facts(split):
        text = (f"{m.content} {m.thinking}" for c in drawn[split] for m in c.messages)
        return {found for t in text for found in re.findall(r"(\w+)'s ([a-z ]+) is (\w+)\.", t)}

    assert len(facts("test")) > 500
    assert all(held_out(*fact) for fact in facts("test"))
    assert not any(held_out(*fact) for fact in facts("train"))


def test_held_out_words_appear_nowhere_in_train(drawn):
    seen = {w for c in drawn["train"] for m in c.messages for w in re.findall("[A-Za-z]+", f"{m.content} {m.thinking}")}
    assert not [w for w in tasks_word.TEST_WORDS if {w, w[::-1], w.title()} & seen]
    assert len(WORDS) == len(set(WORDS)) > 1500
    assert all(re.fullmatch("[a-z]{3,9}", w) for w in WORDS)


def test_phrasings_do_not_cross_the_split(drawn):
    def plain(texts):
        return {re.sub(r"[^\w{}+*<>=-]+", " ", t).strip().lower() for t in texts}

    train = plain(t for form in FORMS for t in form.train)
    test = plain(t for form in FORMS for t in form.test)
    assert len(test) > 70
    assert not train & test
    held = [expression for form in FORMS if form is not tasks_recall.FACT for expression in TEST_PATTERNS[id(form)]]
    users = {
        m.content[0].lower() + m.content[1:] for c in drawn["train"][:3000] for m in c.messages if m.role == "user"
    }
    assert not [u for u in users if any(expression.fullmatch(u) for expression in held)]


def test_half_of_test_phrasings_are_held_out(drawn):
    asked = [c.messages[0].content for c in drawn["test"] if c.task == "reverse" and c.messages[0].role == "user"]
    held = sum(any(e.fullmatch(u[0].lower() + u[1:]) for e in TEST_PATTERNS[id(phrases.REVERSE)]) for u in asked)
    assert 0.4 < held / len(asked) < 0.6


# The answers, worked out again from the questions alone


def samples(task, n=400):
    rng = random.Random(task)
    return [make(task, rng, split) for split in SPLITS for _ in range(n)]


def arithmetic(user):
    """The value that a single question asks for."""
    p = phrases
    form, v = first_slots(user, p.ADD, p.SUBTRACT, p.SUBTRACT_STORY, p.MULTIPLY)
    return v["a"] + v["b"] if form is p.ADD else v["a"] * v["b"] if form is p.MULTIPLY else v["a"] - v["b"]


@pytest.mark.parametrize("task", ["add", "subtract", "multiply"])
def test_arithmetic(task):
    drawn = samples(task, 2000)
    assert all(c.answer == str(arithmetic(c.messages[0].content)) for c in drawn)
    if task != "multiply":
        operands = [re.findall(r"\d+", c.messages[0].content) for c in drawn]
        assert sum(len(a) == len(b) == 4 for a, b in operands) > 0.25 * len(operands)


def test_columns_are_right():
    lines = [line for task in ("add", "subtract", "multiply") for c in samples(task) for line in last(c).split("\n")]
    columns = [re.fullmatch(r"(\d)([+-])(\d)[+-](\d)=(\d):(\d+)", line) for line in lines]
    for p, sign, q, carry, out, done in (c.groups() for c in columns if c):
        if sign == "+":
            assert int(p) + int(q) + int(carry) == 10 * int(out) + int(done[0])
        else:
            assert int(p) - int(q) - int(carry) == int(done[0]) - 10 * int(out)
    products = [re.fullmatch(r"(\d)\*(\d)=(\d\d)\+(\d)=(\d):(\d+)", line) for line in lines]
    for p, q, product, carry, out, done in (c.groups() for c in products if c):
        assert int(p) * int(q) == int(product)
        assert int(product) + int(carry) == int(out + done[0])
    assert sum(c is not None for c in columns) > 1000
    assert sum(c is not None for c in products) > 1000


def last(conversation):
    return conversation.messages[-1].thinking


def test_thinking_ends_with_the_result():
    for task in ("add", "subtract"):
        for c in samples(task):
            carry, digits = last(c).rsplit("=", 1)[1].split(":")
            assert int(carry + digits) == abs(int(c.answer))


def test_compare():
    for c in samples("compare"):
        p = phrases
        form, v = first_slots(c.messages[0].content, p.LARGER, p.SMALLER, p.IS_MORE, p.IS_LESS)
        a, b = v["a"], v["b"]
        number = str(max(a, b) if form is p.LARGER else min(a, b))
        truth = "Yes" if (a > b if form is p.IS_MORE else a < b) else "No"
        assert c.answer == (number if form in (p.LARGER, p.SMALLER) else truth), c


def test_sort():
    for c in samples("sort"):
        form, v = first_slots(c.messages[0].content, phrases.SORT_DOWN, phrases.SORT_UP)
        numbers = sorted(map(int, re.findall(r"\d+", str(v["numbers"]))), reverse=form is phrases.SORT_DOWN)
        assert 3 <= len(numbers) <= 6
        assert c.answer == ", ".join(map(str, numbers))


def word_answer(task, word, letter):
    return {
        "reverse": "".join(reversed(word)),
        "spell": "-".join(word),
        "count": str(sum(c == letter for c in word)),
        "length": str(len(word)),
    }[task]


@pytest.mark.parametrize("task", list(tasks_word.FORMS))
def test_words(task):
    for c in samples(task):
        v = slots(tasks_word.FORMS[task][0], c.messages[0].content)
        assert c.answer == word_answer(task, v["word"], v.get("letter"))


def test_word_chains():
    firsts = {task: forms[0] for task, forms in tasks_word.FORMS.items()}
    thens = {task: forms[1] for task, forms in tasks_word.FORMS.items()}
    for c in samples("word_chain"):
        form, v = first_slots(c.messages[0].content, *firsts.values())
        word, before = v["word"], form
        for user, reply in zip(c.messages[2::2], c.messages[3::2], strict=True):
            if before is phrases.REVERSE:
                assert slots(follow_ups.THEN_REVERSE_BACK, user.content) is not None
                word, task, v = word[::-1], "reverse", {}
            else:
                before, v = first_slots(user.content, *thens.values())
                task = next(t for t, form in thens.items() if form is before)
                before = firsts[task]
            assert extract_answer(reply.content) == word_answer(task, word, v.get("letter")), c


def test_number_chains():
    f = follow_ups
    for c in samples("number_chain"):
        value = arithmetic(c.messages[0].content)
        for user, reply in zip(c.messages[2::2], c.messages[3::2], strict=True):
            form, v = first_slots(user.content, f.TWICE, f.THEN_ADD, f.THEN_SUBTRACT, f.THEN_MULTIPLY, f.THEN_IS_MORE)
            if form is f.THEN_IS_MORE:
                assert extract_answer(reply.content) == ("Yes" if value > v["b"] else "No")
                break
            value = {
                id(f.TWICE): lambda x, b: 2 * x,
                id(f.THEN_ADD): lambda x, b: x + b,
                id(f.THEN_SUBTRACT): lambda x, b: x - b,
                id(f.THEN_MULTIPLY): lambda x, b: x * b,
            }[id(form)](value, v.get("b"))
            assert extract_answer(reply.content) == str(value), c


def test_dates():
    monday, day = datetime.date(2023, 1, 2), datetime.timedelta(days=1)
    p = phrases
    for c in samples("weekday"):
        form, v = first_slots(c.messages[0].content, p.DAY_AFTER, p.DAY_BEFORE)
        start = monday + day * p.WEEKDAYS.index(v["day"])
        assert c.answer == (start + day * v["n"] * (1 if form is p.DAY_AFTER else -1)).strftime("%A")
    for c in samples("date_after"):
        v = slots(p.DATE_AFTER, c.messages[0].content)
        end = datetime.date(2023, p.MONTHS.index(v["month"]) + 1, v["start"]) + day * v["n"]
        assert c.answer == f"{end:%B} {end.day}", c
    for c in samples("day_of_year"):
        v = slots(p.DAY_OF_YEAR, c.messages[0].content)
        assert c.answer == str(datetime.date(2023, p.MONTHS.index(v["month"]) + 1, v["n"]).timetuple().tm_yday)


def test_months():
    p = phrases
    for c in samples("month"):
        form, v = first_slots(c.messages[0].content, p.NEXT_MONTH, p.PREVIOUS_MONTH, p.MONTH_AFTER, p.MONTH_BEFORE)
        way = 1 if form in (p.NEXT_MONTH, p.MONTH_AFTER) else -1
        assert c.answer == p.MONTHS[(p.MONTHS.index(v["month"]) + way * v.get("n", 1)) % 12]
    lengths = dict(zip(p.MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))
    for c in samples("month_length"):
        _, v = first_slots(c.messages[0].content, p.TWO_MONTHS_LENGTH, p.MONTH_LENGTH)
        assert c.answer == str(sum(lengths[name] for name in v.values()))


def quoted_fact(conversation):
    """Name, attribute and value that the thinking of a recall quotes."""
    return re.fullmatch(r"(\w+)'s ([a-z ]+) is (\w+)\.", last(conversation)).groups()


def stating(name, attribute):
    """A regular expression for all ways to state the fact, with the value in group v or w."""
    return (
        rf"(?:{name}'s {attribute}|[Tt]he {attribute} of {name}) is (?P<v>\w+)\.|"
        rf"{name} has (?P<w>\w+) as (?:the )?{attribute}\."
    )


def sentences(conversation):
    users = " ".join(m.content for m in conversation.messages if m.role == "user")
    return re.split(r"(?<=[.?]) ", users)


@pytest.mark.parametrize("task", ["recall", "recall_twice"])
def test_recall_states_the_fact_once(task):
    for c in samples(task):
        name, attribute, value = quoted_fact(c)
        told = [m for sentence in sentences(c) for m in re.finditer(stating(name, attribute), sentence)]
        assert [m["v"] or m["w"] for m in told] == [value] == [c.answer], c
        assert name in c.messages[-2].content
        assert attribute in c.messages[-2].content


def test_missing_fact_was_not_told():
    for c in samples("missing_fact"):
        name, attribute = re.fullmatch(r"(\w+)'s (.*) was not told\.", last(c)).groups()
        assert not re.search(stating(name, attribute), " ".join(sentences(c)))


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task(task):
    for c in samples(task, 50):
        assert c.task == task
        assert c.answer == extract_answer(c.messages[-1].content) != ""
        assert [m.role for m in c.messages] == ["user", "assistant"] * (len(c.messages) // 2)
        assert all(m.thinking for m in c.messages if m.role == "assistant")
        assert not re.search(r"[{}]|  |\b1 (days|months|coins)", "".join(m.content for m in c.messages))


def test_extract_answer():
    cases = {
        "6912.": "6912",
        "The sum is -35.": "-35",
        "In order: 1, 20, 300.": "1, 20, 300",
        'Reversed: "tenalp".': "tenalp",
        "Date: April 4.": "April 4",
        "Yes.": "Yes",
        "<think>\n1+1\n</think>\n\nThe sum is 2.": "2",
        "Run this: `ring-mlx generate --model <folder or repo>`": "ring-mlx generate --model <folder or repo>",
        "": "",
    }
    assert {content: extract_answer(content) for content in cases} == cases


# The stream and the suite


def test_stream_is_deterministic_and_mixes_all(drawn):
    again = list(islice(stream(11), 500))
    assert again == drawn["train"][:500]
    assert list(islice(stream(12), 500)) != again
    assert {c.task for c in drawn["train"]} == set(TASK_WEIGHTS) == set(TASKS)
    assert {c.task for c in islice(stream(0, weights={"add": 1, "sort": 3}), 100)} == {"add", "sort"}
    assert any(c.messages[0].role == "system" for c in again)
    assert any(not last(c) for c in again)


def test_eval_suite(count_tokens):
    suite = eval_suite(3, 5, count_tokens, (300, 900), (700,))
    assert suite == eval_suite(3, 5, count_tokens, (300, 900), (700,))
    names = [*(t for t in TASKS if t != "recall"), "recall-300", "recall-900", "topic-700"]
    assert [c.task for c in suite] == [name for name in names for _ in range(3)]


@pytest.mark.parametrize("target", [256, 512, 1024, 2048, 4096])
def test_recall_lengths(target, count_tokens):
    rng = random.Random(target)
    for i in range(12):
        c = make_recall(rng, SPLITS[i % 2], target, count_tokens)
        assert abs(count_tokens(render(c)[0]) - target) <= 0.05 * target


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_recall_depth(depth, count_tokens):
    rng = random.Random(3)
    for split in SPLITS:
        c = make_recall(rng, split, 2000, count_tokens, depth=depth)
        told = sentences(c)
        expression = stating(*quoted_fact(c)[:2])
        [place] = [i for i, sentence in enumerate(told) if re.search(expression, sentence)]
        assert abs(place / len(told) - depth) < 0.04


def test_length_limits(drawn, count_tokens):
    limits = {
        "sort": 260,
        "mixed": 480,
        "recall": 400,
        "missing_fact": 220,
        "recall_twice": 280,
        "number_chain": 260,
        "word_chain": 220,
    }
    for c in drawn["train"][:4000] + drawn["test"][:2000]:
        assert count_tokens(render(c)[0]) <= limits.get(c.task, 190), c
    rng = random.Random(0)
    sums = [c for c in (make("add", rng, "train") for _ in range(2000)) if last(c).count("\n") == 4]
    assert max(count_tokens(last(c)) for c in sums) < 60
    assert sum(count_tokens(render(c)[0]) for c in sums) / len(sums) < 96
