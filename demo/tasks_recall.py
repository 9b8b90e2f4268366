"""Recall of one stated fact among many, at any length and depth."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from demo.phrases import MONTHS, NAMES
from demo.render import ROLE_END, render, role
from demo.split import TRAIN_WORDS, Conversation, Phrasings, Turn, conversation, draw, listed
from ring_mlx.evaluation.needles import filler

CountTokens = Callable[[str], int]

VALUES: dict[str, tuple[str, ...]] = {
    "favourite animal": listed("badger bear camel cat crow deer dog donkey fox goat hare horse lion otter owl"),
    "favourite colour": listed("black blue brown gold green grey orange pink purple red silver white yellow"),
    "favourite drink": listed("cider cocoa coffee juice lemonade milk soda tea water"),
    "favourite fruit": listed("apple apricot banana cherry fig grape lemon mango melon olive peach pear plum"),
    "favourite month": MONTHS,
    "favourite sport": listed("boxing chess cricket cycling golf hockey rowing rugby running skiing tennis"),
    "home town": listed("Arden Brill Calder Dorn Elmar Farrow Galt Hollin Ister Kelso Lund Marlow Norby Orso"),
    "instrument": listed("banjo bassoon cello clarinet drum flute guitar harp horn oboe organ piano viola"),
}
NUMBERS = {"locker code": 4, "door code": 4, "lucky number": 2, "seat number": 2, "room number": 3, "bus line": 2}
ATTRIBUTES = (*VALUES, *NUMBERS)
# Values that are any word. Where a kind of thing has values of its own, a model learns to look for those and to guess
# among the names; here only name and attribute together lead to the value.
ANY_WORD = ("code word", "password", "nickname", "secret word", "user name", "team name")
ANY_WORD_SHARE = 0.5
MOST_FACTS = len(NAMES) * len(ATTRIBUTES) // 2

FACT = Phrasings(
    train=(
        "{name}'s {attribute} is {value}.",
        "{name}'s {attribute} is {value}.",
        "The {attribute} of {name} is {value}.",
        "Remember that {name}'s {attribute} is {value}.",
        "Please note: {name}'s {attribute} is {value}.",
        "By the way, {name}'s {attribute} is {value}.",
        "I heard that {name}'s {attribute} is {value}.",
        "You know that {name}'s {attribute} is {value}.",
        "{name} has {value} as the {attribute}.",
        "You should remember: {name}'s {attribute} is {value}.",
        "Know that the {attribute} of {name} is {value}.",
    ),
    test=("You should know that {name}'s {attribute} is {value}.", "{name} has {value} as {attribute}."),
)
QUESTION = Phrasings(
    train=(
        "What is {name}'s {attribute}?",
        "What's {name}'s {attribute}?",
        "What is the {attribute} of {name}?",
        "Tell me {name}'s {attribute}.",
        "Do you remember {name}'s {attribute}?",
        "What did I say {name}'s {attribute} is?",
        "Which is {name}'s {attribute}?",
        "Now, what is {name}'s {attribute}?",
        "Can you tell me {name}'s {attribute}?",
        "So what is {name}'s {attribute}?",
        "I forgot {name}'s {attribute}. What is it?",
        "Please give me {name}'s {attribute}.",
        "Can you recall {name}'s {attribute}?",
        "Please recall the {attribute} of {name}.",
        "Remind me: what is {name}'s {attribute}?",
        "Remind me of the {attribute} of {name}.",
        "And what was {name}'s {attribute} again?",
        "What was the {attribute} of {name}?",
        "{name}'s {attribute} was what?",
    ),
    test=("Recall {name}'s {attribute}.", "Remind me of {name}'s {attribute}.", "And {name}'s {attribute} was?"),
)
NOTED = "Noted."
NOTE_THINKING = "facts to remember, no question"


class Fact(NamedTuple):
    """What is true of a person, and the sentence that states it."""

    name: str
    attribute: str
    value: str
    stated: str


def value_of(rng: random.Random, attribute: str) -> str:
    """Draw a value that the attribute may have."""
    if attribute in ANY_WORD:
        return rng.choice(TRAIN_WORDS)
    digits = NUMBERS.get(attribute)
    return str(rng.randrange(10 ** (digits - 1), 10**digits)) if digits else rng.choice(VALUES[attribute])


def _triple(rng: random.Random) -> tuple[str, str, str]:
    attribute = rng.choice(ATTRIBUTES)
    value = value_of(rng, attribute)
    return rng.choice(NAMES), attribute, value


def _any_word(rng: random.Random) -> tuple[str, str, str]:
    name, attribute = rng.choice(NAMES), rng.choice(ANY_WORD)
    return name, attribute, value_of(rng, attribute)


def sentence(form: Phrasings, rng: random.Random, split: str, **slots: str) -> str:
    """Draw a phrasing of the form, filled and closed by a full stop."""
    text = form.pick(rng, split).format(**slots)
    return text if text.endswith(".") else f"{text}."


def _fact(rng: random.Random, split: str, known: set[tuple[str, str]], any_word: float = 0.0) -> Fact:
    """Draw a fact of the split about something not yet known, a share of them of any word, and add it to `known`."""
    sample = _any_word if any_word and rng.random() < any_word else _triple
    name, attribute, value = draw(lambda: sample(rng), split)
    while (name, attribute) in known:
        name, attribute, value = draw(lambda: sample(rng), split)
    known.add((name, attribute))
    return Fact(name, attribute, value, sentence(FACT, rng, split, name=name, attribute=attribute, value=value))


@lru_cache(maxsize=4096)
def filler_cost(count_tokens: CountTokens, sentence: str) -> int:
    """Tokens of a sentence of filler within a text."""
    return count_tokens(f" {sentence}")


def _sentences(
    rng: random.Random,
    split: str,
    budget: int,
    count_tokens: CountTokens,
    known: set[tuple[str, str]],
    any_word: float = 0.0,
) -> list[str]:
    """Draw facts and filler that take about `budget` tokens."""
    share = rng.uniform(0.2, 0.8)
    sentences: list[str] = []
    misses = 0
    while misses < 8:
        if misses == 0 and len(known) < MOST_FACTS and rng.random() < share:
            told = _fact(rng, split, known, any_word).stated
            cost = count_tokens(f" {told}")
        else:
            told = filler(rng)
            cost = filler_cost(count_tokens, told)
        if cost <= budget:
            sentences.append(told)
            budget -= cost
        else:
            misses += 1
    return sentences


def _turns(rng: random.Random, sentences: list[str], breaks: int, question: Turn) -> list[Turn]:
    """Spread the sentences over `breaks` noted turns and the one that ends with the question, at times that alone."""
    cuts = sorted(rng.sample(range(1, len(sentences) + 1), min(breaks, len(sentences))))
    if cuts and rng.random() < 0.4:
        cuts[-1] = len(sentences)
    parts = [sentences[i:j] for i, j in zip([0, *cuts], [*cuts, len(sentences)], strict=True)]
    turns = [Turn(" ".join(part), NOTE_THINKING, NOTED) for part in parts[:-1]]
    return [*turns, question._replace(user=" ".join([*parts[-1], question.user]).strip())]


def state_then_ask(
    task: str, rng: random.Random, sentences: list[str], questions: list[Turn]
) -> tuple[Conversation, int]:
    """Build the conversation that notes the sentences in up to four turns and then asks.

    Returns:
        The conversation, and the index of the first message that asks.
    """
    stating = _turns(rng, sentences, rng.choice((0, 1, 2, 3)), Turn("", NOTE_THINKING, NOTED))
    stating = [turn for turn in stating if turn.user]
    return conversation(task, [*stating, *questions]), 2 * len(stating)


def ask(rng: random.Random, split: str, fact: Fact) -> Turn:
    """Ask for the value of a fact."""
    user = QUESTION.pick(rng, split).format(name=fact.name, attribute=fact.attribute)
    return Turn(user, f"{fact.name}'s {fact.attribute} is {fact.value}.", f"It is {fact.value}.")


def make_recall(
    rng: random.Random,
    split: str,
    target_tokens: int,
    count_tokens: CountTokens,
    depth: float | None = None,
) -> Conversation:
    """Draw a conversation in which facts are stated, among small talk, and one is asked for.

    Args:
        rng: Source of every choice.
        split: ``train`` or ``test``.
        target_tokens: Length of the rendered conversation, thinking and answer included, to aim for.
        count_tokens: Number of tokens of a text.
        depth: Where the asked-for fact is among the sentences, 0 first to 1 last; random by default.
    """
    known: set[tuple[str, str]] = set()
    asked = _fact(rng, split, known)
    question = ask(rng, split, asked)
    breaks = rng.choice((0, 0, 1, 2, 3, 5)) if target_tokens > 150 else rng.choice((0, 0, 1))
    frame, _ = render(conversation("recall", [question]))
    turn_break = f"{ROLE_END}{role('ASSISTANT')}{NOTED}{ROLE_END}{role('HUMAN')}"
    fixed = count_tokens(frame) + count_tokens(f" {asked.stated}") + breaks * count_tokens(turn_break)
    sentences = _sentences(rng, split, target_tokens - fixed, count_tokens, known)
    place = rng.random() if depth is None else depth
    sentences.insert(round(place * len(sentences)), asked.stated)
    return conversation("recall", _turns(rng, sentences, breaks, question))


def make_many_recall(
    rng: random.Random, split: str, target_tokens: int, count_tokens: CountTokens, questions: int
) -> tuple[Conversation, int]:
    """Draw a conversation that ends with several questions, so that one reading trains many recalls.

    In train half of the facts have any word as their value (`ANY_WORD`).

    Args:
        rng: Source of every choice.
        split: ``train`` or ``test``.
        target_tokens: Length of the rendered conversation, about.
        count_tokens: Number of tokens of a text.
        questions: How many facts are asked for, each once, in random order.

    Returns:
        The conversation, and the index of the first message that asks.
    """
    known: set[tuple[str, str]] = set()
    any_word = ANY_WORD_SHARE if split == "train" else 0.0
    asked = [_fact(rng, split, known, any_word) for _ in range(questions)]
    turns = [ask(rng, split, fact) for fact in asked]
    fixed = sum(count_tokens(f" {fact.stated}") for fact in asked)
    fixed += sum(count_tokens(render(conversation("recall", [turn]))[0]) for turn in turns)
    sentences = _sentences(rng, split, target_tokens - fixed, count_tokens, known, any_word)
    for fact in asked:
        sentences.insert(rng.randint(0, len(sentences)), fact.stated)
    rng.shuffle(turns)
    return state_then_ask("recall", rng, sentences, turns)


def approximate_tokens(text: str) -> int:
    """Return a rough token count of English text for when no tokenizer is at hand."""
    return len(text) * 2 // 5


def recall(rng: random.Random, split: str) -> Conversation:
    """Draw a short recall conversation."""
    return make_recall(rng, split, rng.randint(60, 300), approximate_tokens)


def recall_twice(rng: random.Random, split: str) -> list[Turn]:
    """Ask for one fact and then for another."""
    known: set[tuple[str, str]] = set()
    facts = [_fact(rng, split, known) for _ in range(rng.randint(2, 8))]
    first, second = rng.sample(facts, 2)
    turns = _turns(rng, [fact.stated for fact in facts], rng.choice((0, 0, 1)), ask(rng, split, first))
    return [*turns, ask(rng, split, second)]


def missing_fact(rng: random.Random, split: str) -> list[Turn]:
    """Ask for a fact that was not stated, though others were about the same person or the same thing."""
    known: set[tuple[str, str]] = set()
    facts = [_fact(rng, split, known) for _ in range(rng.randint(1, 6))]
    name = rng.choice((rng.choice(facts).name, rng.choice(NAMES)))
    attribute = rng.choice((rng.choice(facts).attribute, rng.choice(ATTRIBUTES)))
    while (name, attribute) in known:
        name, attribute = rng.choice(NAMES), rng.choice(ATTRIBUTES)
    user = QUESTION.pick(rng, split).format(name=name, attribute=attribute)
    reply = "I cannot know that: you did not tell me."
    question = Turn(user, f"{name}'s {attribute} was not told.", reply)
    return _turns(rng, [fact.stated for fact in facts], rng.choice((0, 0, 1)), question)


def note(rng: random.Random, split: str) -> list[Turn]:
    """State facts or small talk without asking."""
    known: set[tuple[str, str]] = set()
    sentences = [_fact(rng, split, known).stated for _ in range(rng.randint(1, 5))]
    sentences += [filler(rng) for _ in range(rng.randint(0, 3))]
    rng.shuffle(sentences)
    last = Turn(sentences.pop(), NOTE_THINKING, NOTED)
    return _turns(rng, sentences, rng.choice((0, 0, 1)), last) if sentences else [last]
