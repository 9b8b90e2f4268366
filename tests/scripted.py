"""A model that says what a test gives for each request; everything but its choice of tokens is real."""

from __future__ import annotations

from collections.abc import Callable

from ring_mlx.engine.request import Request
from ring_mlx.engine.row import Row


def script(patch, say: Callable[[Request], str | None]) -> None:
    """Let ``say`` choose the text of each answer that is not a look-ahead; None leaves the answer to the model.

    ``patch`` is pytest's ``monkeypatch`` or anything else with its ``setattr``.
    """
    begin = Row.__init__

    def scripted(row, request, prepared, loaded, *more):
        begin(row, request, prepared, loaded, *more)
        text = None if request.aside else say(request)
        if text is not None:
            ids = iter([*loaded.tokenizer.encode(text, add_special_tokens=False), *loaded.tokenizer.eos_token_ids])
            row.next_forced = lambda: next(ids, None)

    patch.setattr(Row, "__init__", scripted)


def said(text: str, *calls: tuple[str, str], thought: str = "hm") -> str:
    """A thought, a text and calls (name, arguments as JSON) as a model writes them."""
    blocks = [f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in calls]
    return f"{thought}\n</think>\n\n" + "\n".join([text, *blocks] if text else blocks)


def results(request: Request) -> int:
    """How many results of tools a request has."""
    return sum(m["role"] == "tool" for m in request.prompt)
