"""One model on several machines: its layers cut across ranks (tensor) or shared out in groups (pipeline).

`loading.load_sharded` gives a rank its part as an ordinary `ring_mlx.Model`. Rank 0 of a server (`leader`) sends its
steps to the others (`follower`). Runs on any backend of ``mx.distributed``, and starts none.
"""

from __future__ import annotations

TENSOR, PIPELINE, AUTO = "tensor", "pipeline", "auto"
CHOICES = (AUTO, TENSOR, PIPELINE)
