"""``ring-mlx serve``: OpenAI's routes over a model that answers several requests at once.

``fields`` and ``protocol`` check what a client sends; ``engine`` has the queue and the model's thread, ``work`` what is
done there with what ``parts`` makes; ``reading`` and ``row`` are one request before and after its first token;
``replies`` are OpenAI's JSON; ``wire``, ``handler`` and ``server`` are HTTP; ``metrics`` counts. Only ``parts``,
``work``, ``reading`` and ``row`` know MLX.
"""
