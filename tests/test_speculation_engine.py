"""Several tokens a step in sessions and servers: events, snapshots and states are those of plain decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache

from ring_mlx.engine.events import AnswerText, End, PrefillProgress, Sampling, Statistics, ThinkingText, TokenLogprob
from ring_mlx.engine.request import Request
from ring_mlx.errors import OptionError
from ring_mlx.generation.draft_sources import KEPT_TOKENS, PromptDrafts
from ring_mlx.generation.drafts import Draft, PromptLookup
from ring_mlx.generation.pace import Pace
from ring_mlx.model.kv_quantization import KVQuantization
from tests.compare import assert_close
from tests.fuzz.profile import fuzz
from tests.sessions import DirectSession, Talk, options
from tests.tiny import make_model

QUESTIONS = ("Quiet rivers run deep.", "Why?", "Say it twice, say it twice.")
WAYS = (
    Sampling(temp=0, seed=1),
    Sampling(temp=1.2, seed=5, repetition_penalty=1.3, logit_bias={40: 1.0}),
)


class Told:
    """Drafts for a session that knows what it will say, but for some places; what is said outside it takes as it comes."""

    def __init__(self, is_spoiled=lambda at: False):
        self.pace, self.text, self.is_spoiled = Pace(always=True), [], is_spoiled
        self.seen = []

    def drafter(self, tokens):
        self.seen = list(tokens)
        return self

    def take_back(self, drafter):
        assert drafter is self

    def add(self, token):
        self.seen.append(token)

    def draft(self, most):
        at = len(self.seen)
        found = self.text[at : at + most] if self.seen == self.text[:at] else []
        return Draft([t + 1 if self.is_spoiled(at + n) else t for n, t in enumerate(found)], 1 if found else 0)


def drafting(chat, source, **changes):
    session = DirectSession(*chat, options(**changes))
    session.loaded.__dict__["drafts"] = source
    return session


def answer(session, messages, stop_after=None, **request):
    """What a request is told, without times: with a stop after so many pieces of text."""
    request = Request(list(messages), **({"sampling": WAYS[0], "max_tokens": 16, "thinking_budget": 4} | request))
    told, pieces = [], 0

    def emit(event):
        nonlocal pieces
        if isinstance(event, Statistics):
            event = event.seed, event.read_tokens, event.reused_tokens, event.generated_tokens, event.thinking_tokens
        if isinstance(event, (AnswerText, ThinkingText)):
            pieces += 1
        if pieces == stop_after:
            request.stopped.set()
        if isinstance(event, PrefillProgress):
            event = replace(event, eta_s=None)
        if isinstance(event, TokenLogprob):
            pairs = (event.token, event.logprob), *event.top
            event = event.offset, [(token, pytest.approx(logprob, abs=1e-4)) for token, logprob in pairs]
        told.append(event)

    session.answer(request, emit)
    return told


def state(session):
    """The tokens that the live cache has read, and the snapshots' places with their kinds."""
    kept = [(s.tokens.tolist(), s.kind) for s in session.scheduler._tree]
    return session.reader.live.tokens.tolist(), kept


def assert_same_state(mine, other):
    assert state(mine) == state(other)
    for a, b in zip(mine.reader.live.cache, other.reader.live.cache, strict=True):
        assert a.empty() == b.empty()
        for x, y in () if a.empty() else zip(arrays(a), arrays(b), strict=True):
            assert_close(x, y, 2e-6 if isinstance(a, KVCache) else 1e-6)


def arrays(c):
    return c.keys_and_values() if isinstance(c, KVCache) else [c[0]]


def both(plain, drafted, source, messages, **request):
    """Ask both sessions the same; returns the message."""
    expected = answer(plain, messages, **request)
    source.text = plain.reader.live.tokens.tolist() + [40] * 9
    found = answer(drafted, messages, **request)
    assert found == expected
    assert_same_state(drafted, plain)
    assert isinstance(found[-1], End)
    return found[-1].message


@fuzz(4)
@given(data=st.data())
def test_a_conversation_goes_as_without(chat, data):
    """With edits, branches, answers that go on, stops at any token, stop texts, log-probabilities: and what is kept is the same."""
    spoiled = data.draw(st.sets(st.integers(0, 200), max_size=60))
    source = Told(lambda at: at % 200 in spoiled)
    plain, drafted = DirectSession(*chat, options()), drafting(chat, source)
    messages = []
    for _ in range(data.draw(st.integers(2, 5))):
        kept = 2 * data.draw(st.integers(0, len(messages) // 2))
        request = {
            "sampling": data.draw(st.sampled_from(WAYS)),
            "stop_after": data.draw(st.none() | st.integers(1, 12)),
            "stop": data.draw(st.sampled_from([(), ("e",)])),
            "thinking_budget": data.draw(st.integers(0, 6)),
            "top_logprobs": data.draw(st.sampled_from([None, 2])),
        }
        if kept and data.draw(st.booleans()):
            both(plain, drafted, source, messages[:kept], continue_last=True, **request)
        asked = [*messages[:kept], {"role": "user", "content": data.draw(st.sampled_from(QUESTIONS))}]
        message = both(plain, drafted, source, asked, **request)
        messages = [*asked, message] if message.get("content") else messages[:kept]


@pytest.mark.parametrize("stop_after", range(1, 16))
def test_a_stop_at_every_token_files_what_was_told(chat, stop_after):
    source = Told(lambda at: at % 5 == 0)
    plain, drafted = DirectSession(*chat, options()), drafting(chat, source)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    both(plain, drafted, source, messages, stop_after=stop_after)
    assert source.pace.accepted > 0 or stop_after < 3
    both(plain, drafted, source, messages)


def test_what_was_drafted_is_counted(chat):
    source = Told()
    plain, drafted = DirectSession(*chat, options()), drafting(chat, source)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    both(plain, drafted, source, messages)
    source.text = plain.reader.live.tokens.tolist()
    statistics, _, _ = Talk(drafted, max_tokens=16, thinking_budget=4).ask(messages)
    assert 0 < statistics.accepted_tokens <= statistics.drafted_tokens
    assert statistics.tokens_a_step == statistics.generated_tokens / (
        statistics.generated_tokens - statistics.accepted_tokens
    )
    text = drafted.scheduler.metrics.text({})
    assert f"ring_mlx_drafted_tokens_total {source.pace.drafted}\n" in text
    assert f"ring_mlx_accepted_tokens_total {source.pace.accepted}\n" in text


def test_what_is_asked_aside_drafts_nothing_and_is_no_source(chat):
    session = DirectSession(*chat, options(speculate=4))
    messages = [{"role": "user", "content": QUESTIONS[2]}]
    answer(session, messages)
    (lookup,) = session.loaded.drafts._ended
    before = len(lookup)
    assert before > 0
    answer(session, [{"role": "user", "content": "A title?"}], aside=True)
    assert len(lookup) == before
    assert list(session.loaded.drafts._ended) == [lookup]


def test_a_conversation_is_looked_through_once(chat, monkeypatch):
    read = []
    monkeypatch.setattr(
        PromptLookup, "_read", lambda lookup, token, act=PromptLookup._read: (read.append(token), act(lookup, token))
    )
    session, messages = DirectSession(*chat, options(speculate=4)), []
    for text in QUESTIONS * 2:
        messages.append({"role": "user", "content": text})
        messages.append(answer(session, messages)[-1].message)
    assert len(read) < 2 * len(session.reader.live.tokens) + 200


def test_a_source_goes_on_where_a_sequence_does():
    """From a thought that the next prompt leaves out drafts come too; text of others only to those who have all before it."""
    first, thought, said, more = [1, 2, 3, 4, 5, 6, 7], [20, 21, 22, 23], [30, 31], [40, 41, 20, 21]

    def after(*prompt, is_shared):
        drafts = PromptDrafts(Pace(), is_shared)
        lookup = drafts.drafter(first)
        for token in (*thought, *said):
            lookup.add(token)
        beside = drafts.drafter([*first, *thought])
        assert beside is not lookup  # which is in use
        for ended in (beside, lookup):
            drafts.take_back(ended)
        found = drafts.drafter(prompt)
        assert (found is lookup) == (len(lookup) > len([*first, *thought, *said]))
        return found.draft(2).tokens

    for is_shared in (False, True):
        assert after(*first, *thought, *said, *more, is_shared=is_shared) == [22, 23]
        assert after(*first, *said, *more, is_shared=is_shared) == [22, 23]
    assert after(*first[:6], 9, *more, is_shared=False) == [22, 23]
    assert after(*first[:6], 9, *more, is_shared=True) == []  # somebody else's
    drafts = PromptDrafts(Pace())
    drafts.take_back(drafts.drafter(range(100, 100 + KEPT_TOKENS)))
    drafts.take_back(drafts.drafter([1, 2, 3]))
    drafts.take_back(found := drafts.drafter([1, 2, 3, 4]))
    assert len(found) > KEPT_TOKENS
    assert len(drafts.drafter([9])) == 1  # nothing grows without end


def test_only_what_is_said_again_is_looked_through_after_an_edit():
    drafts = PromptDrafts(Pace())
    lookup = drafts.drafter([*range(50), 7, 8])
    drafts.take_back(lookup)
    assert drafts.drafter([*range(50), 1, 2]) is lookup
    assert lookup.sequence == [*range(50), 1, 2]
    assert lookup.draft(3) == Draft([3, 4, 5], 2)
    assert len(lookup) == 52 + 6 + 2


@pytest.mark.parametrize("value", [0, 8, -1, True, 2.5, "on", None, "4"])
def test_other_numbers_are_refused(value):
    with pytest.raises(OptionError, match="is not off, auto or a whole number from 1 to 7; give one of them"):
        options(speculate=value)


def test_quantized_keys_and_values_stay_plain():
    model, kv = make_model(head_dim=32), KVQuantization(8, 32, 0)
    with pytest.raises(OptionError, match="speculate 4 does not go with quantized keys and values"):
        DirectSession(model, None, options(speculate=4, kv_quantization=kv))
    assert DirectSession(model, None, options(speculate="auto", kv_quantization=kv)).loaded.drafts is None
    assert DirectSession(model, None, options(speculate="auto")).loaded.drafts.pace.most == 7
    assert DirectSession(model, None, options(speculate=2)).loaded.drafts.pace.most == 2
