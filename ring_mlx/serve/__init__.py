"""``ring-mlx serve``: routes of OpenAI's and Anthropic's over models that answer several requests at once.

``fields`` and ``protocol`` check what a client sends, ``models`` loads what it asks for, ``engine`` prepares it for the model's
thread (`ring_mlx.engine`); ``replies`` are OpenAI's JSON, ``responses`` and ``messages`` two more protocols of the same
requests (``routes`` has all); ``wire``, ``handler`` and ``server`` are HTTP.
"""
