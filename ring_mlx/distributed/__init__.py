"""One model on several machines: its layers cut across ranks (tensor) or shared out in groups (pipeline).

`loading.load_sharded` gives a rank its part as an ordinary `ring_mlx.Model`, `drawing.random_sharded` one with random
weights. A server's steps are told by rank 0 (`leader`) to the others (`follower`). Nothing outside this package and the
command line knows that there are other ranks; runs on any backend of ``mx.distributed``, and starts none.
"""
