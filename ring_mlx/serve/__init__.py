"""``ring-mlx serve``: routes of OpenAI's and Anthropic's over a model that answers several requests at once.

``fields`` and ``protocol`` check what a client sends, ``engine`` prepares it for the model's thread (`ring_mlx.engine`);
``replies`` are OpenAI's JSON, ``responses`` and ``messages`` two more protocols of the same requests (``routes`` has
all); ``wire``, ``handler`` and ``server`` are HTTP.
"""
