"""The phrasings of follow-up questions, train and held out; what they refer to is in the turn before."""

from __future__ import annotations

from demo.split import Phrasings

TWICE = Phrasings(
    train=("And twice that?", "Now double it.", "What is twice that?", "Double that.", "And that doubled?"),
    test=("What do you get when you double it?", "Times two?"),
)
THEN_ADD = Phrasings(
    train=("Now add {b}.", "Add {b} to that.", "And plus {b}?", "Plus {b}?", "What if you add {b}?", "And {b} more?"),
    test=("Then add {b} to it.", "What is that plus {b}?"),
)
THEN_SUBTRACT = Phrasings(
    train=("Now subtract {b}.", "Subtract {b} from that.", "And minus {b}?", "Minus {b}?", "Take away {b}."),
    test=("Then take {b} off it.", "What is that minus {b}?"),
)
THEN_MULTIPLY = Phrasings(
    train=("Now multiply it by {b}.", "And times {b}?", "Multiply that by {b}.", "Times {b}?", "And {b} times that?"),
    test=("Then multiply by {b}.", "What is that times {b}?"),
)
THEN_IS_MORE = Phrasings(
    train=("Is that more than {b}?", "Is it more than {b}?", "Is that above {b}?", "Is it larger than {b}?"),
    test=("Does that exceed {b}?",),
)
THEN_REVERSE = Phrasings(
    train=("Reverse that word too.", "Now reverse it.", "And backwards?", "And reversed?", "Now write it backwards."),
    test=("Then flip it.", "And how is it backwards?"),
)
THEN_REVERSE_BACK = Phrasings(
    train=("Now reverse that again.", "And reverse it back?", "Turn it around again.", "Now back again."),
    test=("Flip that once more.",),
)
THEN_SPELL = Phrasings(
    train=("Now spell it.", "And how is it spelled?", "Spell that word too.", "And the letters?"),
    test=("Then spell it out.",),
)
THEN_COUNT = Phrasings(
    train=(
        'And how many "{letter}" are in it?',
        "How many {letter}'s are in it?",
        "Now count the letter {letter} in it.",
        'How often is "{letter}" in that word?',
    ),
    test=('Then find "{letter}" in it. How often?',),
)
THEN_LENGTH = Phrasings(
    train=("And how long is it?", "How many letters does it have?", "Now count its letters.", "And its length?"),
    test=("Then tell me its length.",),
)
