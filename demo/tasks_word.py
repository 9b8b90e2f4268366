"""Spelling, reversing, counting letters and follow-ups on words."""

from __future__ import annotations

import random
from itertools import pairwise

from demo import follow_ups, phrases, traces
from demo.split import TEST_WORDS, TRAIN_WORDS, Turn, word_held_out

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiouy"


def pseudo_word(rng: random.Random) -> str:
    """Draw 3-9 letters, one time in three any letters, else consonants and vowels in turn like a word's."""
    length = rng.randint(3, 9)
    if rng.random() < 0.33:
        return "".join(rng.choices(CONSONANTS + VOWELS, k=length))
    start = rng.randrange(2)
    return "".join(rng.choice(VOWELS if (i + start) % 2 else CONSONANTS) for i in range(length))


def draw_word(rng: random.Random, split: str) -> str:
    """Draw a word: a held-out listed one in test; a listed (half of the time) or made-up one in train."""
    if split == "test":
        return rng.choice(TEST_WORDS)
    if rng.random() < 0.5:
        return rng.choice(TRAIN_WORDS)
    word = pseudo_word(rng)
    while word_held_out(word):
        word = pseudo_word(rng)
    return word


def _shown(rng: random.Random, word: str) -> str:
    return f'"{word}"' if rng.random() < 0.5 else word


def _letter(rng: random.Random, word: str) -> str:
    return rng.choice(word) if rng.random() < 0.8 else rng.choice(CONSONANTS + VOWELS)


def _answer(kind: str, word: str, letter: str) -> tuple[str, str]:
    """Return thinking and reply."""
    if kind == "reverse":
        return traces.reversal_steps(word), f'Reversed: "{word[::-1]}".'
    if kind == "spell":
        return f"letters: {traces.numbered_letters(word)}", f"Spelled: {'-'.join(word)}."
    if kind == "count":
        return traces.count_steps(word, letter), f"The count is {word.count(letter)}."
    return f"letters: {traces.numbered_letters(word)}", f"The number of letters is {len(word)}."


FORMS = {
    "reverse": (phrases.REVERSE, follow_ups.THEN_REVERSE),
    "spell": (phrases.SPELL, follow_ups.THEN_SPELL),
    "count": (phrases.COUNT, follow_ups.THEN_COUNT),
    "length": (phrases.LENGTH, follow_ups.THEN_LENGTH),
}


def _ask(rng: random.Random, split: str, kind: str, word: str) -> Turn:
    letter = _letter(rng, word)
    form = FORMS[kind][0].pick(rng, split)
    return Turn(form.format(word=_shown(rng, word), letter=letter), *_answer(kind, word, letter))


def reverse(rng: random.Random, split: str) -> Turn:
    """Ask for a word backwards."""
    return _ask(rng, split, "reverse", draw_word(rng, split))


def spell(rng: random.Random, split: str) -> Turn:
    """Ask for the letters of a word."""
    return _ask(rng, split, "spell", draw_word(rng, split))


def count(rng: random.Random, split: str) -> Turn:
    """Ask how often a letter, present or not, occurs in a word."""
    return _ask(rng, split, "count", draw_word(rng, split))


def length(rng: random.Random, split: str) -> Turn:
    """Ask for the number of letters."""
    return _ask(rng, split, "length", draw_word(rng, split))


def word_chain(rng: random.Random, split: str) -> list[Turn]:
    """Ask one question about a word and then one or two more about the same word."""
    word = draw_word(rng, split)
    kinds = rng.sample(tuple(FORMS), rng.choice((2, 2, 3)))
    turns = [_ask(rng, split, kinds[0], word)]
    for before, kind in pairwise(kinds):
        if before == "reverse":  # "it" could be the word or its reverse: ask for the way back instead
            word = word[::-1]
            form, kind = follow_ups.THEN_REVERSE_BACK, "reverse"
        else:
            form = FORMS[kind][1]
        letter = _letter(rng, word)
        thinking, reply = _answer(kind, word, letter)
        user = form.pick(rng, split).format(letter=letter)
        turns.append(Turn(user, f'the word is "{word}"\n{thinking}', reply))
        if kind == "reverse":
            break
    return turns
