"""Routed experts on disk, read on demand into a bounded number of slots in memory.

Modules, each using those above it:

    layout       where each expert lies in a checkpoint's files, and how the streamed layout puts it there
    policies     which expert makes room for another
    statistics   what was found, read and waited for
    slots        memory that files are read into and MLX computes with
    reader       reads on threads, and checks checksums
    pool         experts in slots: found, read, evicted
    streamed     the mixture of experts over a pool; a model made to use it
"""

from ring_mlx.experts.policies import POLICIES
from ring_mlx.experts.statistics import ExpertStatistics
from ring_mlx.experts.streamed import attach, needed_bytes
from ring_mlx.model.memory import recommend_cache_bytes

__all__ = ["POLICIES", "ExpertStatistics", "attach", "needed_bytes", "recommend_cache_bytes"]
