"""Several answers to one request, and log-probabilities of prompts, as lm-eval's multiple choice asks for them."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from ring_mlx.engine.events import Sampling
from ring_mlx.serve.completions import parse_completion
from ring_mlx.serve.failures import ApiError
from tests.serving import CHAT, PLAIN, SUMS, client_of, metric, send, start_stream, user, wait_until

COMPLETIONS = "/v1/completions"
ECHO = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
TEXT = "<role>HUMAN</role>What is 27 + 35?<|role_end|><role>ASSISTANT</role>The sum is 62."


def complete(server, **body):
    status, _, answer = send(server, "POST", COMPLETIONS, body)
    assert status == 200, answer
    return answer


def scored(toy, ids):
    """What the model gives each of the tokens after the first, and its likeliest, in one forward."""
    model, _ = toy
    logits = model(mx.array([ids]), model.make_cache())[0].astype(mx.float32)
    logprobs = np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return [float(logprobs[n, i]) for n, i in enumerate(ids[1:])], logprobs[:-1].max(axis=-1)


def check_prompt(toy, choice, ids, text):
    """That a choice's log-probabilities up to its generated token are those of the model."""
    told, (expected, best) = choice["logprobs"], scored(toy, ids)
    assert choice["text"].startswith(text)
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    np.testing.assert_allclose(told["token_logprobs"][1 : len(ids)], expected, atol=2e-4)
    np.testing.assert_allclose([max(top.values()) for top in told["top_logprobs"][1 : len(ids)]], best, atol=2e-4)
    assert len({len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
    assert "".join(told["tokens"][: len(ids)]) == text
    pieces = zip(told["text_offset"], told["tokens"], strict=True)
    assert all(choice["text"][at:].startswith(token) for at, token in pieces)


def test_log_probabilities_of_a_prompt_are_the_models(server, toy):
    ids = toy[1].encode(TEXT, add_special_tokens=False)
    (choice,) = complete(server, prompt=TEXT, **ECHO)["choices"]
    check_prompt(toy, choice, ids, TEXT)
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1
    before = metric(server, "read_tokens_total")
    (again,) = complete(server, prompt=ids, **ECHO)["choices"]  # though all of it is known, it is read again
    assert metric(server, "read_tokens_total") == before + len(ids) - 1
    check_prompt(toy, again, ids, TEXT)
    assert again["logprobs"] == choice["logprobs"]
    longer = f"{TEXT} And more?"
    check_prompt(toy, complete(server, prompt=longer, **ECHO)["choices"][0], toy[1].encode(longer, add_special_tokens=False), longer)  # fmt: skip
    plain = complete(server, prompt=longer, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert plain > 0


@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_a_prompt_alone(server, toy, logprobs):
    answer = complete(server, prompt=TEXT, echo=True, max_tokens=0, logprobs=logprobs)
    (choice,), ids = answer["choices"], toy[1].encode(TEXT, add_special_tokens=False)
    assert (choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]) == (TEXT, "length", 0)
    if logprobs is None:
        assert choice["logprobs"] is None
        return
    told = choice["logprobs"]
    np.testing.assert_allclose(told["token_logprobs"][1:], scored(toy, ids)[0], atol=2e-4)
    if logprobs:
        assert all(len(top) == logprobs for top in told["top_logprobs"][1:])
    else:
        assert told["top_logprobs"] is None


def test_a_prompt_of_many_steps_and_of_one_token(server, toy):
    text = "12 + 7 = 19. " * 24
    ids = toy[1].encode(text, add_special_tokens=False)
    assert len(ids) > 2 * 128
    check_prompt(toy, complete(server, prompt=ids, **ECHO)["choices"][0], ids, text)
    (choice,) = complete(server, prompt=[ids[0]], **ECHO)["choices"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == 2


def test_a_stream_with_its_prompt_is_the_whole_in_pieces(server):
    asked = {"prompt": ["3 + 4", "5"], "echo": True, "logprobs": 2, "temperature": 0, "max_tokens": 5, "n": 2}
    whole = complete(server, **asked)
    with client_of(server) as client:
        pieces = list(
            client.completions.create(model="toy", stream=True, stream_options={"include_usage": True}, **asked)
        )
    *pieces, last = pieces
    assert last.usage.total_tokens == whole["usage"]["total_tokens"]
    for choice in whole["choices"]:
        mine = [p.choices[0] for p in pieces if p.choices[0].index == choice["index"]]
        assert "".join(p.text for p in mine) == choice["text"]
        assert [token for p in mine if p.logprobs for token in p.logprobs.tokens] == choice["logprobs"]["tokens"]
        assert mine[-1].finish_reason == choice["finish_reason"]
    assert len({p.id for p in pieces}) == 1


# Several


def test_several_prompts_are_answered_as_each_alone(server, toy):
    prompts = [PLAIN, toy[1].encode(PLAIN.replace("3 + 4", "8 + 9")), "<role>HUMAN</role>Hi"]
    asked = {"temperature": 0, "max_tokens": 30}
    together = complete(server, prompt=prompts, n=2, **asked)
    alone = [complete(server, prompt=p, **asked) for p in prompts]
    assert [c["index"] for c in together["choices"]] == list(range(6))
    assert [c["text"] for c in together["choices"]] == [a["choices"][0]["text"] for a in alone for _ in range(2)]
    usage = together["usage"]
    assert usage["prompt_tokens"] == sum(a["usage"]["prompt_tokens"] for a in alone)
    assert usage["completion_tokens"] == 2 * sum(a["usage"]["completion_tokens"] for a in alone)


def test_several_answers_differ_and_a_seed_repeats_them(server):
    asked = {"messages": user(SUMS[0]), "n": 3, "temperature": 5, "seed": 5, "max_tokens": 40}
    first, again = (send(server, "POST", CHAT, asked)[2] for _ in range(2))
    texts = [json.dumps(c["message"]) for c in first["choices"]]
    assert texts == [json.dumps(c["message"]) for c in again["choices"]]
    assert len(set(texts)) > 1
    alone = send(server, "POST", CHAT, asked | {"n": 1, "seed": 6})[2]["choices"][0]
    assert first["choices"][1] == alone | {"index": 1}


def test_a_prompt_of_several_answers_is_read_once(server):
    asked = {"messages": user("Which is larger, 41 or 17? " * 20), "n": 4, "max_tokens": 2}
    answer = send(server, "POST", CHAT, asked)[2]
    assert metric(server, "read_tokens_total") < 1.5 * answer["usage"]["prompt_tokens"]


def test_more_answers_than_run_at_once(serve):
    server = serve(max_batch=2, max_queue=1)
    answer = complete(server, prompt=["a", "b", "c"], n=3, max_tokens=2)
    assert [c["index"] for c in answer["choices"]] == list(range(9))


def test_the_best_is_the_likeliest(server):
    asked = {"prompt": PLAIN, "temperature": 1.5, "seed": 3, "max_tokens": 20}
    every = complete(server, n=4, logprobs=0, **asked)["choices"]
    mean = lambda choice: np.mean(choice["logprobs"]["token_logprobs"])
    best = sorted(every, key=mean, reverse=True)
    (one,) = complete(server, best_of=4, **asked)["choices"]
    assert (one["text"], one["logprobs"], one["index"]) == (best[0]["text"], None, 0)
    two = complete(server, best_of=4, n=2, **asked)
    assert [c["text"] for c in two["choices"]] == [c["text"] for c in best[:2]]


def test_a_client_that_leaves_frees_all_its_answers(server, toy):
    banned = {str(i): -100 for i in toy[1].eos_token_ids}
    body = {"messages": user("1 + 1?"), "n": 3, "max_tokens": 1900, "logit_bias": banned, "stream": True}
    s = start_stream(server, body)
    wait_until(lambda: metric(server, "batch_size") == 3)
    s.close()
    wait_until(lambda: metric(server, "batch_size") == metric(server, "reading") == metric(server, "queue_length") == 0)
    assert complete(server, prompt="a", max_tokens=1)["choices"]


def test_a_server_that_closes_between_two_answers_says_so(serve):
    made = serve(max_batch=1)
    engine, submit = made.engine, made.engine.submit

    def closing(request):
        if request.index:
            engine.close(0)
        submit(request)

    engine.submit = closing
    status, _, answer = send(made, "POST", COMPLETIONS, {"prompt": "a", "n": 2, "max_tokens": 2})
    assert (status, answer["error"]["message"]) == (503, "the server is closing.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "not empty"),
        ({"prompt": ["a", ""]}, "not empty"),
        ({"prompt": [[1], []]}, "not empty"),
        ({"prompt": [[1], "a", 2]}, "not empty"),
        ({"prompt": ["a"] * 129}, "129 answers are more than 128"),
        ({"prompt": ["a"] * 2, "n": 65}, "130 answers are more than 128"),
        ({"n": 0}, "n is 0"),
        ({"n": 1e400}, "n is Infinity"),
        ({"n": 129}, "n is 129"),
        ({"n": True}, "n is true"),
        ({"best_of": 1, "n": 2}, "best_of is 1"),
        ({"best_of": 2, "stream": True}, "must not be above n in a stream"),
        ({"echo": "yes"}, "echo is"),
        ({"max_tokens": 0}, "max_tokens 0 is not"),
        ({"max_tokens": False, "echo": True}, "max_tokens false is not"),
        ({"logprobs": 21}, "logprobs is 21"),
    ],
)  # fmt: skip
def test_what_is_wrong(change, words):
    with pytest.raises(ApiError, match=words):
        parse_completion({"prompt": "a"} | change, Sampling())
