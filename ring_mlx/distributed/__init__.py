"""One model on several machines: its layers cut across ranks (tensor) or shared out in groups (pipeline).

`loading.load_sharded` gives a rank its part as an ordinary `ring_mlx.Model`; nothing outside this package and the
command line knows that there are other ranks. Runs on any backend of ``mx.distributed``; starts none.
"""
