"""Make the text that ``ring-mlx convert --report`` compares models on: ``python -m benchmarks.report_text FILE``.

Conversations are drawn from the demo's held-out split, so that the packaged toy is measured on what it was made for; the
prose below was written for this purpose.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from demo import data

SEED, CONVERSATIONS, LONGEST = 20_260_101, 48, 1500
PROSE = (
    (
        "The ferry left the harbour a little after six, when the light was still grey and the gulls had not made up their "
        "minds to follow it. On the upper deck a woman sold tea from a steel urn, and the passengers held the paper cups "
        "with both hands, more for the warmth than for the taste. By the time the island came into view the wind had "
        "turned, and the captain, who had made the crossing some nine thousand times, slowed the engines without being "
        "asked, because he knew what the water would do at the mouth of the bay."
    ),
    (
        "A bridge carries its load in one of three ways: it bends, it hangs, or it pushes. The beam bends, and so its lower "
        "edge is stretched while its upper edge is squeezed; the cable hangs, and every part of it is pulled; the arch "
        "pushes against the ground on either side, and every stone in it is pressed. An engineer who chooses between them "
        "looks first at the soil, then at the span, and last at the money, although the order in which they are discussed "
        "is usually the reverse."
    ),
    (
        "To make bread with little work, mix the flour, the salt and a small amount of yeast with cold water in the "
        "evening, cover the bowl and leave it. In the morning the dough has risen by itself and is full of bubbles. Fold it "
        "over twice, let it rest for an hour, and bake it in a closed pot that was heated in the oven beforehand. The lid "
        "keeps the steam in, which is what gives the crust its shine; take it off for the last quarter of an hour."
    ),
    (
        "def moving_average(values, width):\n    total = sum(values[:width])\n    averages = [total / width]\n    for old, "
        "new in zip(values, values[width:]):\n        total += new - old\n        averages.append(total / width)\n    return "
        "averages\n\nThe function keeps a running total, so that each step costs one addition and one subtraction however "
        "wide the window is. It assumes that there are at least as many values as the window is wide, and that rounding "
        "errors may add up over a long series."
    ),
    (
        "In the winter of that year the library was moved. It took four men and a borrowed cart eleven days, and when it "
        "was over they found that the catalogue no longer agreed with the shelves: some forty books had gone, and about a "
        "dozen had come that nobody remembered buying. The librarian wrote both facts down, in that order, and closed the "
        "ledger. What is lost, she used to say, is sometimes only early for an appointment somewhere else."
    ),
    (
        "Light from the Sun takes eight minutes and twenty seconds to reach the Earth, a little over four hours to reach "
        "Neptune, and four years and three months to reach the next star. These numbers are easy to repeat and hard to "
        "picture. If the Sun were the size of a cherry, the Earth would be a grain of dust two steps away, Neptune a "
        "poppy seed at the end of the street, and the next star another cherry in a city four hundred kilometres off."
    ),
)


def main() -> None:
    """Write the file named on the command line."""
    fitting = (
        c
        for c in data.stream(SEED, "test")
        if sum(len(m.content) + len(m.thinking or "") for m in c.messages) <= LONGEST
    )
    rows = [{"kind": "conversations", "messages": data.as_dicts(c)} for c in islice(fitting, CONVERSATIONS)]
    rows += [{"kind": "prose", "text": text} for text in PROSE]
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
