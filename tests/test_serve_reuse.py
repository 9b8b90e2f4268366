"""What the server reuses within its memory budget, and how its rows draw."""

from __future__ import annotations

import mlx.core as mx
import pytest

from ring_mlx.engine.branches import Prepared, Prompt
from ring_mlx.engine.events import Sampling
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.row import Row
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.protocol import ApiRequest
from tests.serving import CHAT, GREEDY, TOOLS, send, user

SNAPSHOT_BYTES = 330_000  # of the toy after these chats


class Client:
    """Chats with a server and keeps the conversation."""

    def __init__(self, server, *before, **request):
        self.server, self.talk = server, list(before)
        self.request = GREEDY | {"thinking_budget": 2, "max_tokens": 12} | request

    def ask(self, text, keep=True):
        """How many tokens of the prompt were read."""
        messages = user(text, *self.talk)
        status, _, answer = send(self.server, "POST", CHAT, self.request | {"messages": messages})
        assert status == 200
        if keep:
            content = answer["choices"][0]["message"]["content"]
            self.talk = [*messages, {"role": "assistant", "content": content}]
        return answer["usage"]["prompt_tokens"] - answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize(
    "request_", [pytest.param({}, id="plain"), pytest.param({"tools": TOOLS}, id="tools", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:.cache. .* do not hold two snapshots")
def test_a_small_budget_reads_what_a_large_one_reads(serve, request_):
    """Two chats that take turns, and another last question, in which three snapshots more than chats fit."""
    few, many = serve(memory_budget_bytes=5 * SNAPSHOT_BYTES, store=False), serve(store=False)
    clients = [[Client(server, **request_) for _ in range(2)] for server in (few, many)]
    for n in range(3):
        for which in range(2):
            small, large = (pair[which].ask(f"What is {20 + n + which} + 35?") for pair in clients)
            assert small == large, f"turn {n} of chat {which}"
    small, large = (pair[1].ask("Which is larger, 41 or 17?", keep=False) for pair in clients)
    again, once = (pair[1].ask("Which is larger, 17 or 41?", keep=False) for pair in clients)
    assert (small, again) == (large, once)
    assert few.engine.gauges()["snapshot_bytes"] <= 5 * SNAPSHOT_BYTES < many.engine.gauges()["snapshot_bytes"]


def test_a_growing_chat_needs_no_budget(serve):
    few, many = serve(memory_budget_bytes=1, store=False), serve(store=False)

    def read(server):
        client = Client(server)
        found = [client.ask(f"What is {20 + n} + 35?") for n in range(3)]
        server.close()
        return found

    with pytest.warns(UserWarning, match=r"\[cache\] 1 bytes of memory do not hold two snapshots") as told:
        small = read(few)
    assert small == read(many)
    assert len(told) == 1


def test_each_token_of_a_row_is_drawn_anew(toy):
    """From a flat distribution one seed at every token would draw one token for ever; the same seed draws the same."""

    def drawn(seed):
        request = ApiRequest("x", Sampling(temp=1.0, seed=seed), is_text=True)
        loaded = LoadedModel(*toy, Settings("toy", "toy"))
        row = Row(request, Prepared(Prompt("x", [1, 2], None), None, 20), loaded)
        return [int(row.sampler(mx.zeros((1, 1000))).item()) for _ in range(20)]

    assert len(set(drawn(7))) > 15
    assert drawn(7) == drawn(7) != drawn(8)
