"""Prefill, decode, events, budgets, and mlx-lm driving the same model."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.generate import stream_generate as mlx_lm_stream
from mlx_lm.sample_utils import greedy_sampler, make_logits_processors, make_sampler

from ring_mlx import KVQuantization, generate, stream_generate
from ring_mlx.bench.dispatches import count_launches
from ring_mlx.errors import OptionError, PromptError
from ring_mlx.generation import decoding
from ring_mlx.generation.decoding import generate_step, prefill
from tests.compare import assert_close
from tests.tiny import make_model, tokens


def greedy(model, ids, n, **options):
    return [t for t, _ in generate_step(ids, model, model.make_cache(), max_tokens=n, **options)]


def plain_greedy(model, ids, n):
    """Recomputes everything for each token."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
    return ids[-n:]


@pytest.fixture(scope="module")
def model():
    return make_model()


PROMPT = tokens(75)[0].tolist()


@pytest.mark.parametrize("step", [1, 16, 37, 74, 75, 4096])
def test_any_prefill_step_gives_the_same_tokens(model, step):
    assert greedy(model, PROMPT, 12, prefill_step_size=step) == plain_greedy(model, PROMPT, 12)


def test_a_prompt_of_one_token(model):
    assert greedy(model, [5], 6) == plain_greedy(model, [5], 6)


def test_the_last_step_is_as_short_as_what_is_left():
    assert [decoding.step_sizes(total, 3) for total in (0, 2, 3, 7)] == [[], [2], [3], [3, 3, 1]]


def test_a_prompt_of_none(model):
    with pytest.raises(PromptError, match="the prompt is empty"):
        greedy(model, [], 6)


def test_the_cache_holds_what_was_fed(model):
    cache = model.make_cache()
    out = [t for t, _ in generate_step(PROMPT, model, cache, max_tokens=9)]
    assert cache.offset == 75 + 8
    more = [t for t, _ in generate_step([out[-1]], model, cache, max_tokens=5)]
    assert out + more == plain_greedy(model, PROMPT, 14)


def test_a_stopped_generator_leaves_a_usable_cache(model):
    cache = model.make_cache()
    steps = generate_step(PROMPT, model, cache, max_tokens=50)
    out = [next(steps)[0] for _ in range(4)]
    steps.close()
    fed = PROMPT + out
    assert cache.offset == len(fed)
    assert_close(model(mx.array([[7]]), cache), model(mx.array([[*fed, 7]]))[:, -1:], 1e-4)


def test_logprobs_are_normalised(model):
    for token, logprobs in generate_step(PROMPT, model, model.make_cache(), max_tokens=3):
        assert logprobs.shape == (70,)
        assert logprobs.dtype == mx.float32
        assert abs(float(mx.exp(logprobs).sum()) - 1) < 1e-5
        assert token == int(mx.argmax(logprobs))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_distributions_that_are_read_late_are_those_of_their_tokens(dtype):
    model = make_model()
    model.set_dtype(dtype)
    steps = list(generate_step(PROMPT, model, model.make_cache(), max_tokens=7, sampler=greedy_sampler))
    found = mx.stack([logprobs for _, logprobs in steps])
    assert found.dtype == mx.float32
    assert mx.argmax(found, axis=-1).tolist() == [token for token, _ in steps] == greedy(model, PROMPT, 7)
    sampled = list(generate_step(PROMPT, model, model.make_cache(), max_tokens=7, sampler=lambda p: mx.argmax(p, -1)))
    assert mx.array_equal(found, mx.stack([logprobs for _, logprobs in sampled]))


def test_a_greedy_choice_waits_for_no_distribution(model):
    """Nor does what a processor asks for: it sees logits in float32."""
    with count_launches() as counts:
        greedy(model, PROMPT, 4)
        assert all("LogSumExp" not in c for c in counts)
        assert sum("ArgReduce" in c for c in counts) == 4
        greedy(model, PROMPT, 2, sampler=make_sampler(0.7, top_p=0.9))
    assert sum("LogSumExp" in c for c in counts) == 2
    dtypes, half = [], make_model()
    half.set_dtype(mx.bfloat16)
    greedy(half, PROMPT, 3, logits_processors=[lambda ids, logits: dtypes.append(logits.dtype) or logits])
    assert dtypes == [mx.float32] * 3


def test_progress_counts_up_to_the_whole_prompt(model):
    seen = []
    greedy(model, PROMPT, 1, prefill_step_size=30, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 75), (30, 75), (60, 75), (75, 75)]


def test_a_seed_gives_the_same_text_whatever_the_prefill_step(model):
    runs = []
    for step in (10, 10, 2048):
        mx.random.seed(7)
        runs.append(greedy(model, PROMPT, 20, sampler=make_sampler(1.0), prefill_step_size=step))
    assert runs[0] == runs[1] == runs[2]
    mx.random.seed(8)
    assert greedy(model, PROMPT, 20, sampler=make_sampler(1.0)) != runs[0]


def test_logits_processors_see_every_token(model):
    seen = []

    def process(ids, logits):
        seen.append(ids.tolist())
        return logits

    out = greedy(model, PROMPT, 4, logits_processors=[process], prefill_step_size=20)
    assert seen == [PROMPT, *[PROMPT + out[:i] for i in range(1, 4)]]


def test_mlx_lms_processors_work(model):
    free = greedy(model, PROMPT, 8)
    banned = make_logits_processors(logit_bias={free[0]: -1e9})
    assert free[0] not in greedy(model, PROMPT, 8, logits_processors=banned)
    assert len(set(greedy(model, PROMPT, 8, logits_processors=make_logits_processors(repetition_penalty=50.0)))) == 8


@pytest.mark.skipif(mx.cuda.is_available(), reason="MLX 0.32.4 has no such float32 product on CUDA (1x76x64, 8 bits)")
def test_quantized_keys_and_values(model):
    big = make_model(head_dim=64)
    plain = greedy(big, PROMPT, 1)
    cache = big.make_cache()
    out = [t for t, _ in generate_step(PROMPT, big, cache, max_tokens=6, kv_quantization=KVQuantization(8, 32, 0))]
    assert type(cache[2]).__name__ == "QuantizedKVCache"
    assert out[:1] == plain
    with pytest.raises(OptionError, match="kv bits 3"):
        KVQuantization(3).check(64)
    with pytest.raises(OptionError, match="does not divide head_dim 16"):
        KVQuantization(8, 32).check(16)


# mlx-lm's own drivers on our model


def test_mlx_lm_stream_generate_gives_our_tokens(chat):
    model, tokenizer = chat
    ids = tokenizer.encode("Count the letters of this sentence, please.")
    ours = [e.token for e in stream_generate(model, tokenizer, ids, max_tokens=30)]
    for step in (7, 2048):
        theirs = [r.token for r in mlx_lm_stream(model, tokenizer, ids, max_tokens=30, prefill_step_size=step)]
        assert theirs == ours


def test_mlx_lm_batch_generator_gives_our_tokens(model):
    prompts = [tokens(n, seed=n)[0].tolist() for n in (5, 41, 17, 1, 29)]
    alone = [greedy(model, p, 14) for p in prompts]
    batch = BatchGenerator(model, max_tokens=14, prefill_batch_size=3, completion_batch_size=4, prefill_step_size=16)
    uids = batch.insert(prompts)
    found = {uid: [] for uid in uids}
    while responses := batch.next_generated():
        for r in responses:
            found[r.uid].append(r.token)
    batch.close()
    assert [found[uid] for uid in uids] == alone


# Events


def events(chat, text, **options):
    model, tokenizer = chat
    return list(stream_generate(model, tokenizer, text, **options))


def test_events_add_up(chat):
    found = events(chat, "hello there", max_tokens=25)
    assert [e.generation_tokens for e in found] == list(range(1, len(found) + 1))
    assert [e.finish_reason for e in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1].finish_reason in ("length", "stop")
    assert "".join(e.text for e in found) == generate(*chat, "hello there", max_tokens=25)
    for e in found:
        assert e.prompt_tokens == len(chat[1].encode("hello there"))
        assert e.time_to_first_token_s > 0
        assert e.peak_memory >= 0
        assert e.prompt_tps > 0


def test_a_stop_token_ends_without_text(chat):
    _, tokenizer = chat
    first = events(chat, "hello there", max_tokens=6)
    before = tokenizer.eos_token_ids
    try:
        tokenizer.eos_token_ids = before | {first[3].token}
        cut = events(chat, "hello there", max_tokens=6)
    finally:
        tokenizer.eos_token_ids = before
    stop = next(i for i, e in enumerate(first) if e.token == first[3].token)
    assert [e.token for e in cut] == [e.token for e in first[: stop + 1]]
    assert cut[-1].finish_reason == "stop"
    # A letter cut in the middle of its bytes is not shown.
    whole = tokenizer.decode([e.token for e in first[:stop]]).rstrip("\ufffd")
    assert "".join(e.text for e in cut) == whole


class Scripted:
    """A stand-in for the model that says given ids, to test what is made of them."""

    def __init__(self, model, ids):
        self.config, self._ids, self._model = model.config, ids, model

    def make_cache(self):
        return self._model.make_cache()

    def __call__(self, x, cache, last_only=True):
        self._model(x, cache, last_only=True)
        said = cache.offset - self.start
        wanted = self._ids[min(max(said, 0), len(self._ids) - 1)]
        return mx.where(mx.arange(self.config.vocab_size) == wanted, 10.0, 0.0)[None, None]


def scripted(chat, text, prompt="<role>ASSISTANT</role>", **options):
    model, tokenizer = chat
    ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text
    stand_in = Scripted(model, [*ids, tokenizer.eos_token_id])
    stand_in.start = len(tokenizer.encode(prompt))
    return list(stream_generate(stand_in, tokenizer, prompt, **({"max_tokens": 400} | options)))


def joined(found, part):
    return "".join(getattr(e, part) for e in found)


def test_thought_and_answer_are_told_apart(chat):
    found = scripted(chat, "<think>\nTwo and two.\n</think>\n\nIt is 4.")
    assert joined(found, "text") == "<think>\nTwo and two.\n</think>\n\nIt is 4."
    assert joined(found, "thinking_text") == "\nTwo and two.\n"
    assert joined(found, "answer_text") == "\n\nIt is 4."
    assert found[0].thinking
    assert not found[-1].thinking
    assert found[-1].finish_reason == "stop"


def test_a_thought_that_the_prompt_opened(chat):
    found = scripted(chat, "Two.\n</think>\n\n4", prompt="<role>ASSISTANT</role><think>\n")
    assert joined(found, "thinking_text") == "Two.\n"
    assert joined(found, "answer_text") == "\n\n4"


def test_a_thinking_budget_closes_the_thought_and_the_answer_follows(chat):
    _, tokenizer = chat
    found = scripted(chat, "la " * 60, prompt="<role>ASSISTANT</role><think>\n", thinking_budget=10, max_tokens=40)
    text = joined(found, "text")
    assert text.count("</think>") == 1
    thought, _, answer = text.partition("\n</think>\n\n")
    assert tokenizer.encode(thought) == [e.token for e in found[:10]]
    assert answer.count("la") > 3
    assert sum(e.thinking for e in found) <= 10 + 3
    none = scripted(chat, "la " * 9, prompt="<role>ASSISTANT</role><think>\n", thinking_budget=0, max_tokens=20)
    assert joined(none, "text").startswith("\n</think>\n\n")


def test_half_a_character_is_never_shown(chat):
    _, tokenizer = chat
    ids = tokenizer.encode("caf\u00e9 \U0001f40d \u65e5\u672c", add_special_tokens=False)
    for n in range(1, len(ids) + 1):
        found = scripted(chat, ids, max_tokens=n)
        assert "\ufffd" not in joined(found, "text")
        assert all("\ufffd" not in e.text for e in found)
    assert joined(scripted(chat, ids), "text") == "caf\u00e9 \U0001f40d \u65e5\u672c"


def test_the_context_ends_generation(chat):
    model, tokenizer = chat
    ids = [5] * 2046
    found = scripted(chat, [6] * 50, max_tokens=50)
    assert len(found) == 50
    found = list(stream_generate(model, tokenizer, ids, max_tokens=50))
    assert len(found) == 3
    assert found[-1].finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("prompt", "options", "error", "match"),
    [
        ([], {}, PromptError, "the prompt is empty"),
        ([5] * 2049, {}, PromptError, "2049 tokens exceed the context of 2048"),
        ([5], {"max_tokens": 0}, OptionError, "max_tokens 0"),
        ([5], {"max_tokens": -3}, OptionError, "max_tokens -3"),
        ([5], {"prefill_step_size": 0}, OptionError, "prefill step size 0"),
        ([5], {"thinking_budget": -1}, OptionError, "thinking_budget -1"),
        ([5], {"kv_quantization": KVQuantization(4, 64, 0)}, OptionError, "does not divide head_dim 16"),
    ],
)
def test_bad_requests(chat, prompt, options, error, match):
    with pytest.raises(error, match=match):
        events(chat, prompt, **options)


def test_continuing_a_cache_counts_what_it_held(chat):
    model, tokenizer = chat
    cache = model.make_cache()
    model(mx.array([[5, 6, 7]]), cache)
    found = list(stream_generate(model, tokenizer, [8, 9], cache=cache, max_tokens=3))
    assert (found[0].cached_tokens, found[0].prompt_tokens) == (3, 2)
    assert [e.token for e in found] == [e.token for e in events(chat, [5, 6, 7, 8, 9], max_tokens=3)]


@pytest.mark.parametrize(("device", "step"), [(mx.cpu, 128), (mx.gpu, 2048)])
def test_the_default_step_is_the_devices(monkeypatch, device, step):
    monkeypatch.setattr(decoding.mx, "default_device", lambda: device)
    seen = []

    def model(tokens, cache, last_only):
        seen.append(tokens.shape[1])
        return mx.zeros((1, 1, 4))

    list(decoding.generate_step(list(range(4100)), model, [], max_tokens=1))
    assert seen[:-1] == [step] * (len(seen) - 1)
    assert sum(seen) == 4100


def test_each_step_of_a_prompt_is_computed_and_freed_before_the_next(model, monkeypatch):
    """Else one graph of the whole prompt would be held, and what it needed kept for reuse."""
    order, cache = [], model.make_cache()
    forward, evaluate, clear = type(model).__call__, mx.eval, mx.clear_cache

    def recording_eval(*trees):
        flat = [a for _, a in tree_flatten(list(trees))]
        held = [a for _, a in tree_flatten([c.state for c in cache])]
        if held and all(any(a is b for b in flat) for a in held):
            order.append("eval")
        evaluate(*trees)

    monkeypatch.setattr(type(model), "__call__", lambda *a, **k: (order.append("forward"), forward(*a, **k))[1])
    monkeypatch.setattr(mx, "eval", recording_eval)
    monkeypatch.setattr(mx, "clear_cache", lambda: (order.append("clear"), clear())[1])
    for _ in prefill(tokens(9)[0], model, cache, [4, 4, 1]):
        order.append("step")
    assert order == ["forward", "eval", "clear", "step"] * 3


def test_what_decoding_leaves_is_freed_now_and_then(model, monkeypatch):
    order, clear = [], mx.clear_cache
    monkeypatch.setattr(decoding, "CLEAR_EVERY_TOKENS", 3)
    monkeypatch.setattr(mx, "clear_cache", lambda: (order.append("clear"), clear())[1])
    for _ in decoding.decode(mx.zeros((1, 4)), model, model.make_cache(), tokens(1)[0], max_tokens=8):
        order.append("token")
    assert order == ["token", "token", "token", "clear"] * 2 + ["token", "token"]
