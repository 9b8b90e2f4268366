"""A clock that only the runs of its ways move, for tests of timing."""

from __future__ import annotations

import itertools

SECRET = "a failure of the driver"


class Clock:
    """Seconds that only the runs of `way` spend."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self):
        return self.now

    def way(self, name, seconds, first=0.0, wobble=0.0):
        """A run of so many seconds; the first takes more, and each differs by the wobble, up and down."""
        spread = itertools.cycle([0.0, wobble, -wobble, wobble / 2, -wobble / 2])
        extra = [first]

        def run(times):
            self.order.append(name)
            self.now += times * (seconds + next(spread)) + (extra.pop() if extra else 0.0)

        return run

    def failing(self, name):
        def run(times):
            self.order.append(name)
            raise RuntimeError(SECRET)

        return run
