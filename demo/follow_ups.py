"""The phrasings of follow-up questions, train and held out; what they refer to is in the turn before."""

from __future__ import annotations

from demo.split import Phrasings

TWICE = Phrasings(
    train=(
        "And twice that?",
        "Now double it.",
        "What is twice that?",
        "Double that.",
        "And that doubled?",
        "Double it.",
        "What do you get for twice that?",
        "And when you double that?",
        "Two times that?",
        "That times two?",
        "What is it doubled?",
    ),
    test=("What do you get when you double it?", "Times two?"),
)
THEN_ADD = Phrasings(
    train=(
        "Now add {b}.",
        "Add {b} to that.",
        "And plus {b}?",
        "Plus {b}?",
        "What if you add {b}?",
        "And {b} more?",
        "Then add {b}.",
        "Then add {b} to that.",
        "Now add {b} to it.",
        "What is it plus {b}?",
        "What do you get plus {b}?",
    ),
    test=("Then add {b} to it.", "What is that plus {b}?"),
)
THEN_SUBTRACT = Phrasings(
    train=(
        "Now subtract {b}.",
        "Subtract {b} from that.",
        "And minus {b}?",
        "Minus {b}?",
        "Take away {b}.",
        "Then subtract {b}.",
        "Then take {b} away.",
        "Now take {b} off that.",
        "Take {b} off it.",
        "What is it minus {b}?",
        "What do you get minus {b}?",
    ),
    test=("Then take {b} off it.", "What is that minus {b}?"),
)
THEN_MULTIPLY = Phrasings(
    train=(
        "Now multiply it by {b}.",
        "And times {b}?",
        "Multiply that by {b}.",
        "Times {b}?",
        "And {b} times that?",
        "Then multiply that by {b}.",
        "Multiply by {b}.",
        "Now times {b}.",
        "What is it times {b}?",
        "What do you get times {b}?",
    ),
    test=("Then multiply by {b}.", "What is that times {b}?"),
)
THEN_IS_MORE = Phrasings(
    train=(
        "Is that more than {b}?",
        "Is it more than {b}?",
        "Is that above {b}?",
        "Is it larger than {b}?",
        "Does that go above {b}?",
        "Does it exceed {b}?",
        "Is that greater than {b}?",
        "Would that exceed {b}?",
    ),
    test=("Does that exceed {b}?",),
)
THEN_REVERSE = Phrasings(
    train=(
        "Reverse that word too.",
        "Now reverse it.",
        "And backwards?",
        "And reversed?",
        "Now write it backwards.",
        "Flip it.",
        "Now flip that word.",
        "Then reverse it.",
        "Then write it backwards.",
        "And how is that word backwards?",
        "How is it in reverse?",
    ),
    test=("Then flip it.", "And how is it backwards?"),
)
THEN_REVERSE_BACK = Phrasings(
    train=(
        "Now reverse that again.",
        "And reverse it back?",
        "Turn it around again.",
        "Now back again.",
        "Flip it again.",
        "Flip that back.",
        "Reverse it once more.",
        "Once more, back again.",
    ),
    test=("Flip that once more.",),
)
THEN_SPELL = Phrasings(
    train=(
        "Now spell it.",
        "And how is it spelled?",
        "Spell that word too.",
        "And the letters?",
        "Then spell it.",
        "Spell it out.",
        "Now spell that out.",
        "Then give me its letters.",
    ),
    test=("Then spell it out.",),
)
THEN_COUNT = Phrasings(
    train=(
        'And how many "{letter}" are in it?',
        "How many {letter}'s are in it?",
        "Now count the letter {letter} in it.",
        'How often is "{letter}" in that word?',
        'Then count "{letter}" in it.',
        'Find "{letter}" in it. How many?',
        'Now find "{letter}". How often is it there?',
        "Then how often is {letter} in it?",
    ),
    test=('Then find "{letter}" in it. How often?',),
)
THEN_LENGTH = Phrasings(
    train=(
        "And how long is it?",
        "How many letters does it have?",
        "Now count its letters.",
        "And its length?",
        "Tell me its length.",
        "Then count its letters.",
        "Then how long is it?",
        "Now tell me how long it is.",
    ),
    test=("Then tell me its length.",),
)
