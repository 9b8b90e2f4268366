"""``ring-mlx serve``: OpenAI's routes over a model that answers several requests at once.

``fields`` and ``protocol`` check what a client sends, ``encoding`` and ``engine`` prepare it for the model's thread
(`ring_mlx.engine`); ``replies`` are OpenAI's JSON; ``wire``, ``handler`` and ``server`` are HTTP.
"""
