"""Make the texts that ``ring-mlx convert`` packages: ``python -m benchmarks.report_text [--calibrate] FILE``.

What ``--report`` compares models on: conversations from the demo's held-out split, so that the packaged toy is measured on what it was
made for, and the prose below, which was written for this purpose. What ``--calibrate`` quantizes for: conversations from the
demo's training split, paragraphs of this project's documentation and pieces of its source. All has the project's license.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

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


ROOT = Path(__file__).parent.parent
CALIBRATED_CONVERSATIONS, PARAGRAPHS, PIECES, PIECE = 160, 60, 24, 1200


def conversations(split: str, count: int) -> list[dict[str, Any]]:
    """Rows of a split of the demo's data, none of them long."""
    fitting = (
        c
        for c in data.stream(SEED, split)
        if sum(len(m.content) + len(m.thinking or "") for m in c.messages) <= LONGEST
    )
    return [{"kind": "conversations", "messages": data.as_dicts(c)} for c in islice(fitting, count)]


def documents() -> list[dict[str, Any]]:
    """Paragraphs of the documentation, and beginnings of source files, spread evenly over all there are."""
    parts = [p for f in sorted(ROOT.glob("docs/*.md")) for p in f.read_text().split("\n\n")]
    prose = [p for p in parts if len(p) > 300 and not p.startswith(("|", " ", "#", "```"))]
    source = [f.read_text()[:PIECE] for f in sorted(ROOT.glob("ring_mlx/**/*.py")) if f.stat().st_size > PIECE]
    rows = [{"kind": "prose", "text": p} for p in prose[:: max(1, len(prose) // PARAGRAPHS)]]
    return rows + [{"kind": "source", "text": s} for s in source[:: max(1, len(source) // PIECES)]]


def main() -> None:
    """Write the file named on the command line."""
    if "--calibrate" in sys.argv:
        rows = conversations("train", CALIBRATED_CONVERSATIONS) + documents()
    else:
        rows = conversations("test", CONVERSATIONS) + [{"kind": "prose", "text": text} for text in PROSE]
    Path(sys.argv[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
