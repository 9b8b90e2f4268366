"""What an answer's settings may be: the same values and the same words at every door, and what the ends of a range do."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ring_mlx.checkpoint.loading import demo_model_path, load
from ring_mlx.cli import generate_options
from ring_mlx.engine.events import Sampling
from ring_mlx.errors import OptionError
from ring_mlx.generation.sampling import start_sampling
from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.generation.stream import check_lengths, stream_generate
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.fields import read_object
from ring_mlx.serve.generation_fields import NUMBERS, SENT_AS
from ring_mlx.serve.protocol import parse_chat
from tui import command
from tui.commands import SETTINGS
from tui.config import checked

VOCABULARY = 1024
BODY = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def toy():
    return load(demo_model_path())


def _flag(options, name, text):
    """What an option makes of a text."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add(parser)
    return getattr(parser.parse_args([f"--{name.replace('_', '-')}={text}"]), name)


def _request(name, value):
    sent = SENT_AS.get(name, name)
    asked = parse_chat(read_object(json.dumps(BODY | {sent: value}).encode()), Sampling())
    return getattr(asked if name in ("max_tokens", "thinking_budget") else asked.sampling, name)


def _in_python(model, tokenizer, name, value):
    if name in NUMBERS:
        start_sampling(Sampling(**{name: value}), VOCABULARY, tokenizer)
    else:
        check_lengths(model, 1, 0, **{"max_tokens": 1, "prefill_step_size": None, "thinking_budget": None, name: value})
    return value


def _doors(toy, name, value):
    """The doors that know a setting, each as a call."""
    text = json.dumps(value)
    yield "option", lambda: _flag(generate_options, name, text)
    yield "request", lambda: _request(name, value)
    yield "python", lambda: _in_python(*toy, name, value)
    if name in SETTINGS:
        yield "chat's option", lambda: _flag(command, name, text)
        yield "chat's file", lambda: checked(name, value)
        yield "/set", lambda: checked(name, text)


VALUES = st.one_of(
    st.integers(-3, 130),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-3, 130),
    st.integers(),
    st.sampled_from([0, -0.0, 1.0, 2.5, 0.5, -1, 1 << 24, 1 << 53, 1 << 64, -(1 << 63), 1e30, 1e300, True]),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([n for n in RANGES if n != "logit_bias"]), VALUES)
@example("top_p", 0)
@example("top_k", 5.0)
@example("max_tokens", -1)
@example("temp", 2.5)
def test_every_door_takes_and_refuses_the_same_in_the_same_words(toy, name, value):
    found = {}
    for door, call in _doors(toy, name, value):
        try:
            found[door] = call()
        except (ApiError, OptionError, ValueError, argparse.ArgumentError) as e:
            if "is not below the vocabulary" in str(e):
                continue  # which only one door knows
            words = str(e).replace(SENT_AS.get(name, name), name)
            kind = "a whole number" if RANGES[name].is_whole else "a number"
            found[door] = words[words.index(f"is not {kind}") :].split(";")[0]
    assert len({repr(v) if isinstance(v, str) else float(v) for v in found.values()}) == 1, found
    assert len({type(v) for door, v in found.items() if door != "python"}) == 1, found


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "", "hot", "1e999", "0x1", "1,5", "none\x1b[31m", "9" * 5000])
def test_what_is_no_number_is_refused_in_one_line(text):
    for name, r in RANGES.items():
        with pytest.raises(ValueError, match=rf"^{name} .* is not {re.escape(r.words)}$") as e:
            r.read(text)
        assert "\x1b" not in str(e.value)


def test_the_words_of_a_refusal_exclude_what_was_refused():
    for name, value, words in (
        ("seed", 1 << 64, "a whole number from -9223372036854775808 to 18446744073709551615"),
        ("logit_bias", 1e31, "a number from -1e+30 to 1e+30"),
        ("top_k", -1, "a whole number from 0 up"),
    ):
        with pytest.raises(ValueError, match=f"is not {re.escape(words)}$"):
            RANGES[name].check(value)


def test_both_ends_of_the_penalties_leave_finite_logits_and_all_tokens_may_be_kept(toy):
    logits = mx.random.normal((1, VOCABULARY), key=mx.random.key(0))
    penalties = [name for name in NUMBERS if name.endswith("_penalty")]
    for name in (*penalties, *(n.replace("penalty", "context_size") for n in penalties)):
        for value in (RANGES[name].least, RANGES[name].greatest):
            given = dict.fromkeys(penalties, 1.5) | {name: value}
            _, processors, _ = start_sampling(Sampling(**given), VOCABULARY, toy[1])
            changed = logits
            for process in processors:
                changed = process(mx.arange(30), changed)
            assert len(processors) == 3
            assert bool(mx.isfinite(changed).all())
    most = int(RANGES["min_tokens_to_keep"].greatest)
    sampler, _, _ = start_sampling(Sampling(min_p=1.0, min_tokens_to_keep=most, temp=1.0), VOCABULARY, toy[1])
    assert 0 <= sampler(logits - mx.logsumexp(logits)).item() < VOCABULARY


def test_a_top_p_or_temperature_of_next_to_zero_is_the_likeliest_token(toy):
    model, tokenizer = toy
    texts = set()
    greedy = [(0, 1), (2, 0), (100, 0.0), (2, 1e-10), (2, 1e-300), (1e-40, 1), (5e-324, 1), (1e-9, 1)]
    for seed, (temp, top_p) in enumerate([*greedy, (2, 1)]):
        given = Sampling(temp=temp, top_p=top_p, seed=seed, xtc_probability=0.0)
        sampler, processors, _ = start_sampling(given, VOCABULARY, tokenizer)
        events = stream_generate(
            model, tokenizer, "Tell me", max_tokens=8, sampler=sampler, logits_processors=processors
        )
        texts.add("".join(e.text for e in events))
        assert len(texts) == (1 if seed < len(greedy) else 2), (temp, top_p)


def test_an_answer_of_all_that_the_context_holds(toy, monkeypatch):
    model, tokenizer = toy
    monkeypatch.setattr(model, "config", replace(model.config, max_position_embeddings=12))
    for most, count in ((-1, 4), (3, 3), (1 << 53, 4)):
        # Without the token that stops.
        processors = [lambda _, logits: logits.at[:, sorted(tokenizer.eos_token_ids)].add(-1e9)]
        *_, last = stream_generate(model, tokenizer, [5] * 9, max_tokens=most, logits_processors=processors)
        assert (last.finish_reason, last.generation_tokens) == ("length", count)
