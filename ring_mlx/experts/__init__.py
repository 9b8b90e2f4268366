"""Routed experts on disk: the few that a token needs are read into a bounded number of slots in memory.

Modules, each using those above it:

    layout       where each expert lies in a checkpoint's files, and how the streamed layout puts it there
    policies     which expert makes room
    statistics   what was found, read and waited for
    slots        memory that files are read into and MLX computes with
    reader       reads on threads, held against checksums
    pool         experts in slots: found, read, replaced
    streamed     the mixture of experts over a pool, and a model made to use it
    recommend    how much memory to give
"""

from ring_mlx.experts.policies import DEFAULT_POLICY, POLICIES
from ring_mlx.experts.recommend import recommend_cache_bytes
from ring_mlx.experts.statistics import Counts, Statistics
from ring_mlx.experts.streamed import attach, needed_bytes

__all__ = [
    "DEFAULT_POLICY",
    "POLICIES",
    "Counts",
    "Statistics",
    "attach",
    "needed_bytes",
    "recommend_cache_bytes",
]
