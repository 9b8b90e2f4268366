"""Every door answers alike, and a row of the batch as if it were alone, also while others come and go."""

from __future__ import annotations

import gc
import json
import weakref

import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache

from ring_mlx import Sampling, Session
from ring_mlx.cli import main
from ring_mlx.engine.events import Statistics
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.request import Request
from ring_mlx.engine.scheduler import Scheduler
from ring_mlx.generation.batch import Batch
from ring_mlx.generation.decoding import generate_step
from ring_mlx.serve.engine import Settings
from tests.serving import CHAT, send, user
from tests.sessions import DirectSession, Talk, options
from tests.tiny import make_model, tokens

QUESTION = "What is 27 + 35?"


def test_a_seed_gives_the_same_answer_at_every_door(serve, capsys):
    """Drawn hot, where any other draw or any other logit would show; a budget forces tokens in between."""
    budget, most, seed = 6, 24, 11
    server = serve()
    body = {"messages": user(QUESTION), "temperature": 1.5, "seed": seed, "max_tokens": most, "thinking_budget": budget}
    message = send(server, "POST", CHAT, body)[2]["choices"][0]["message"]
    found = [(message["reasoning_content"], message["content"])]
    with Session(store=False) as session:
        sampling = Sampling(temp=1.5, seed=seed)
        asked = {"sampling": sampling, "max_tokens": most, "thinking_budget": budget}
        *_, statistics, end = session.send(user(QUESTION), **asked)
    assert isinstance(statistics, Statistics)
    found.append((end.message["reasoning_content"], end.message["content"]))
    words = ["--temp", "1.5", "--seed", seed, "-m", most, "--thinking-budget", budget, "--no-store", "--json"]
    main(["generate", "--prompt", QUESTION, *map(str, words)])
    said = json.loads(capsys.readouterr().out)
    found.append((said["thinking"], said["answer"]))
    assert found[0] == found[1] == found[2]
    assert found[0][0]


def test_a_prompt_read_in_steps_is_the_whole_prompt(chat):
    text = "Tell me of ships and of the sea. " * 8
    said = []
    for step in (5, 64, 4096):
        statistics, message, _ = Talk(DirectSession(*chat, options(prefill_step_tokens=step))).ask(user(text))
        said.append((message, statistics.read_tokens))
    assert said[0] == said[1] == said[2]


@pytest.fixture(scope="module", params=["float32", "quantized experts"])
def model(request):
    made = make_model(hidden_size=64, moe_intermediate_size=64, intermediate_size=64)
    if request.param != "float32":
        nn.quantize(made, 32, 8, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.ndim == 3)
        assert any(hasattr(m, "bits") for m in made.modules())
    return made


def test_a_row_alone_joined_and_alone_again(model):
    """The lone row keeps its own cache, has one of its own again after the other has left, and never says otherwise."""
    first, second = (tokens(n, seed=n)[0].tolist() for n in (37, 12))
    alone = {
        n: [t for t, _ in generate_step(p, model, model.make_cache(), max_tokens=24)]
        for n, p in enumerate((first, second))
    }
    batch, cache, said = Batch(model), model.make_cache(), {0: [], 1: []}
    a, numbers = batch.add(first, cache=cache), {}
    numbers[a] = 0

    def run(steps):
        for _ in range(steps):
            for number, token in batch.step().items():
                said[numbers[number]].append(token)

    run(6)
    assert batch._rows[0].cache is cache
    b = batch.add(second)
    numbers[b] = 1
    run(7)
    assert batch._merged is not None
    left = batch.remove(b)
    assert (left.offset, batch._merged) == (12 + len(said[1]), None)
    run(7)
    assert said[0] == alone[0][: len(said[0])]
    assert said[1] == alone[1][: len(said[1])]
    assert len(said[0]) == 20
    assert len(said[1]) == 7
    own = batch.remove(a)
    assert own.offset == 37 + 20
    assert any(type(c) is KVCache for c in own)


def test_the_last_of_the_tokens_of_a_lone_row_is_not_fed(model):
    batch = Batch(model)
    number = batch.add([3, 4, 5], max_tokens=2)
    for _ in range(2):
        batch.step()
    assert batch.remove(number).offset == 3 + 1


def test_rows_that_run_together_hold_their_keys_and_values_once(chat):
    scheduler = Scheduler(LoadedModel(*chat, Settings("toy", "toy", store=False)), Metrics())
    caches = []
    for text in ("Hello.", "Hello there, it is me."):
        scheduler.admit(Request(user(text), Sampling(temp=0, logit_bias={1: -100.0}), max_tokens=20))
        caches.append(weakref.ref(scheduler._reading[-1].reader.live.cache))
    while len(scheduler._rows) < 2:
        scheduler.step()
    scheduler.step()
    gc.collect()
    assert [cache() for cache in caches] == [None, None]


@pytest.mark.parametrize("why", ["gone", "stopped", "failed"])
def test_a_prompt_that_is_not_read_to_its_end_leaves_no_keys_and_values(chat, why, monkeypatch):
    """At once, not when Python next collects garbage: they may be gigabytes, for which other requests wait."""
    options = Settings("toy", "toy", store=False, memory_budget_bytes=0, prefill_step_tokens=8)
    scheduler = Scheduler(LoadedModel(*chat, options), Metrics())
    request = Request(user("Hello there, it is me. " * 4), max_tokens=1)
    gc.collect()
    gc.disable()
    try:
        scheduler.admit(request)
        cache = weakref.ref(scheduler._reading[-1].reader.live.cache)
        scheduler.step()
        if why == "gone":
            request.drop()
            scheduler.drop()
        elif why == "stopped":
            request.stopped.set()
        else:
            monkeypatch.setattr("ring_mlx.engine.row.Row.read_step", lambda row: 1 // 0)
        while scheduler.busy:
            scheduler.step()
        while not request.events.empty():
            request.events.get()
        assert cache() is None
    finally:
        gc.enable()
