"""Recall of facts told under headings, each about the person last named: who that was must be carried along.

"Now about Mia." may stand a thousand tokens before "The favourite drink is tea.", and others have been the topic before
her. Such a state, renewed by the latest and outliving the rest, is what a decaying memory is for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from demo.phrases import NAMES
from demo.render import render
from demo.split import Conversation, Phrasings, conversation, in_split
from demo.tasks_recall import (
    ANY_WORD,
    ATTRIBUTES,
    CountTokens,
    Fact,
    ask,
    filler_cost,
    sentence,
    state_then_ask,
    value_of,
)
from ring_mlx.evaluation.needles import filler

MOST_TOPICS, LEAST_TOKENS_A_TOPIC = 5, 100
TRIES = 60  # for a value of the split; small sets of values have none held out for some people

HEADING = Phrasings(
    train=(
        "Now about {name}.",
        "Now about {name}.",
        "Let me tell you about {name}.",
        "Next comes {name}.",
        "This is about {name}.",
        "Now to {name}.",
        "And now {name}.",
        "Here is what I know about {name}.",
    ),
    test=("Let us talk about {name}.", "Next is {name}."),
)
STATED = Phrasings(
    train=(
        "The {attribute} is {value}.",
        "The {attribute} is {value}.",
        "Remember that the {attribute} is {value}.",
        "Please note: the {attribute} is {value}.",
        "By the way, the {attribute} is {value}.",
        "I heard that the {attribute} is {value}.",
        "You know that the {attribute} is {value}.",
        "You should remember: the {attribute} is {value}.",
        "Know that the {attribute} is {value}.",
    ),
    test=("You should know that the {attribute} is {value}.", "I know that the {attribute} is {value}."),
)


def _value(rng: random.Random, split: str, name: str, attribute: str) -> str | None:
    """Draw a value of the split, or None if there seems to be none."""
    for _ in range(TRIES):
        value = value_of(rng, attribute)
        if in_split(split, name, attribute, value):
            return value
    return None


def _section(
    rng: random.Random, split: str, name: str, budget: int, count_tokens: CountTokens
) -> tuple[list[str], list[Fact]]:
    """Draw a heading, then facts of that person anywhere among filler, of about `budget` tokens; at least one fact."""
    attributes = [*ATTRIBUTES, *(ANY_WORD if split == "train" else ())]
    rng.shuffle(attributes)
    heading = sentence(HEADING, rng, split, name=name)
    budget -= count_tokens(f" {heading}")
    least_left = round(budget * rng.uniform(0.2, 0.8))
    facts: list[Fact] = []
    for attribute in attributes:
        value = _value(rng, split, name, attribute)
        if value is not None and (budget > least_left or not facts):
            facts.append(Fact(name, attribute, value, sentence(STATED, rng, split, attribute=attribute, value=value)))
            budget -= count_tokens(f" {facts[-1].stated}")
    sentences = [fact.stated for fact in facts]
    while budget > 0:
        sentences.append(filler(rng))
        budget -= filler_cost(count_tokens, sentences[-1])
    rng.shuffle(sentences)
    return [heading, *sentences], facts


def _parts(rng: random.Random, whole: int, count: int) -> Sequence[int]:
    """Split a number of tokens into uneven parts, the greatest at most about four times the least."""
    weights = [rng.uniform(0.25, 1.0) for _ in range(count)]
    return [round(whole * w / sum(weights)) for w in weights]


def make_topic_recall(
    rng: random.Random, split: str, target_tokens: int, count_tokens: CountTokens, questions: int
) -> tuple[Conversation, int]:
    """Draw a conversation of two to five topics that ends with questions about facts told under them.

    Args:
        rng: Source of every choice.
        split: ``train`` or ``test``; in train some attributes have any word as their value.
        target_tokens: Length of the rendered conversation, about.
        count_tokens: Number of tokens of a text.
        questions: How many facts are asked for, each once, in random order; fewer if fewer were told.

    Returns:
        The conversation, and the index of the first message that asks.
    """
    names = rng.sample(NAMES, rng.randint(2, max(2, min(MOST_TOPICS, target_tokens // LEAST_TOKENS_A_TOPIC))))
    sample = ask(rng, split, Fact(names[0], "favourite drink", "coffee", ""))
    asking = questions * count_tokens(render(conversation("topic", [sample]))[0])
    sentences, facts = [], []
    for name, budget in zip(names, _parts(rng, target_tokens - asking, len(names)), strict=True):
        told, known = _section(rng, split, name, budget, count_tokens)
        sentences, facts = sentences + told, facts + known
    turns = [ask(rng, split, fact) for fact in rng.sample(facts, min(questions, len(facts)))]
    return state_then_ask("topic", rng, sentences, turns)
