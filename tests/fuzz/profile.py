"""How many examples hypothesis makes: the same few for every change, many at random for a long run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

TIMES = int(os.environ.get("RING_MLX_FUZZ", "1"))
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink) if TIMES > 1 else (Phase.explicit, Phase.generate)


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Settings of a test with so many examples; put above ``@given``."""
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )
