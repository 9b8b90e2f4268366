"""The session from outside: threads, events, stopping, errors."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest

from ring_mlx import RingError, Session
from ring_mlx.engine.events import (
    AnswerText,
    End,
    Loading,
    PrefillProgress,
    Sampling,
    Statistics,
    ThinkingText,
    ToolCall,
)
from ring_mlx.errors import OptionError
from ring_mlx.generation.message import MessageBuilder
from ring_mlx.generation.tool_calls import ToolCallSplitter

GREEDY = {"sampling": Sampling(temp=0), "max_tokens": 16, "thinking_budget": 4}


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def session(chat_folder):
    with Session(chat_folder, store=False, prefill_step_tokens=16) as made:
        yield made


def collect(reply, seen):
    for e in reply:
        seen.append(e)


def text_of(events, kind):
    return "".join(e.text for e in events if isinstance(e, kind))


def test_events_come_in_order(chat_folder):
    with Session(chat_folder, store=False) as session:
        events = list(session.send(user("Hello there"), **GREEDY))
        order = [Loading, PrefillProgress, ThinkingText, AnswerText, Statistics, End]
        kinds = [type(e) for e in events]
        assert [k for n, k in enumerate(kinds) if k not in kinds[:n]] == order
        info = session.wait_until_loaded()
    loading = [e for e in events if isinstance(e, Loading)]
    assert (loading[0].done, loading[0].total) == (0, 0)
    assert loading[-1].done == loading[-1].total > 1
    assert (info.context_tokens, info.quantization, info.kv_quantization) == (2048, "none (float32)", "none")
    end = events[-1]
    assert end.reason in ("stop", "length")
    assert end.message["content"] == text_of(events, AnswerText)
    assert end.message["reasoning_content"] == text_of(events, ThinkingText).strip("\n")


def test_loading_is_told_part_by_part_to_who_asks(chat_folder):
    told = []
    with Session(chat_folder, store=False, on_loading=told.append) as session:
        session.wait_until_loaded()
    assert [(e.done, e.total) for e in told[:2]] == [(0, 0), (1, 6)]
    assert (told[-1].done, told[-1].total) == (6, 6)


def test_progress_tells_what_is_left(session):
    events = list(session.send(user("A long question. " * 12), **GREEDY))
    progress = [e for e in events if isinstance(e, PrefillProgress)]
    assert progress[0].done == progress[0].reused
    assert progress[-1].done == progress[-1].total
    assert progress[-1].eta_s == 0
    assert [p.done for p in progress] == sorted(p.done for p in progress)
    assert all(b.done - a.done <= 16 for a, b in pairwise(progress[1:]))
    assert all(p.eta_s > 0 for p in progress[1:-1])
    (s,) = (e for e in events if isinstance(e, Statistics))
    assert s.prompt_tokens == progress[-1].total
    assert s.read_tokens == s.prompt_tokens - progress[0].reused
    assert s.time_to_first_token_s > 0
    assert s.prompt_tps > 0
    assert 0 < s.thinking_tokens < s.generated_tokens <= 16
    assert s.generation_tps > 0


def test_a_seed_repeats_and_is_told(session):
    hot = {"sampling": Sampling(temp=1.0), "max_tokens": 12}
    events = list(session.send(user("Anything"), **hot))
    (seed,) = (e.seed for e in events if isinstance(e, Statistics))
    again = list(session.send(user("Anything"), sampling=Sampling(temp=1.0, seed=seed), max_tokens=12))
    assert again[-1] == events[-1]
    other = list(session.send(user("Anything"), sampling=Sampling(temp=1.0, seed=seed + 1), max_tokens=12))
    assert other[-1].message != events[-1].message


def test_stop_while_generating_keeps_a_usable_state(session):
    reply = session.send(user("Stop me"), sampling=Sampling(temp=0, logit_bias={1: -1e9}), max_tokens=1500)
    seen = []
    for e in reply:
        seen.append(e)
        if isinstance(e, ThinkingText):
            session.stop()
    assert seen[-1].reason == "stopped"
    (s,) = (e for e in seen if isinstance(e, Statistics))
    assert s.generated_tokens < 200
    events = list(session.send(user("Stop me"), **GREEDY))
    assert next(e for e in events if isinstance(e, Statistics)).read_tokens == 0
    assert events[-1].reason in ("stop", "length")


def test_stop_while_reading_keeps_what_was_read(session):
    text = "stop while reading " * 60
    reply, seen = session.send(user(text), **GREEDY), []
    for e in reply:
        seen.append(e)
        if isinstance(e, PrefillProgress) and e.done > 60:
            reply.stop()
    assert [type(e) for e in seen[-2:]] == [PrefillProgress, End]
    assert seen[-1].reason == "stopped"
    assert seen[-1].message == {}
    done = seen[-2].done
    assert done < seen[-2].total
    events = list(session.send(user(text), **GREEDY))
    assert events[0].reused >= done
    assert events[-1].reason in ("stop", "length")


def test_many_threads_are_served_in_order(session):
    replies = [session.send(user(f"{n} asks"), **GREEDY) for n in range(3)]
    ends: dict[int, float] = {}

    def read(n):
        assert list(replies[n])[-1].reason in ("stop", "length")
        ends[n] = time.perf_counter()

    threads = [threading.Thread(target=read, args=(n,)) for n in (2, 0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert sorted(ends, key=ends.get) == [0, 1, 2]


def test_stopping_a_queued_request_leaves_the_others(session):
    first = session.send(user("first"), sampling=Sampling(temp=0, logit_bias={1: -1e9}), max_tokens=40)
    second = session.send(user("second, never seen before"), **GREEDY)
    second.stop()
    assert list(first)[-1].reason == "length"
    assert list(second)[-1].reason == "stopped"


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        ([], {}, r"\[tokenizer\] the chat template refused"),
        ("", {}, r"\[prompt\] the prompt is empty"),
        ("x " * 5000, {}, r"\[prompt\] .* exceed the context of 2048"),
        (user("x"), {"max_tokens": 0}, r"\[option\] max_tokens 0"),
        (user("x"), {"thinking_budget": -1}, r"\[option\] thinking_budget -1"),
        (user("x"), {"sampling": Sampling(top_k=5000)}, r"\[option\] top_k 5000"),
        (user("x"), {"sampling": Sampling(logit_bias={9999: 1.0})}, r"\[option\] logit bias"),
        (user("x"), {"sampling": Sampling(temp="hot")}, r"\[option\] temp 'hot' is not a number"),
        (user("x"), {"sampling": Sampling(temp=float("nan"))}, r"\[option\] temp NaN is not a number from 0 to 100"),
        (user("x"), {"sampling": Sampling(seed=1 << 64)}, r"\[option\] seed 18446744073709551616"),
        (user("x"), {"sampling": Sampling(repetition_penalty=-1.0)}, r"\[option\] repetition_penalty"),
    ],
)
def test_errors_are_ring_errors_and_the_session_goes_on(session, prompt, options, match):
    reply, seen = session.send(prompt, **(GREEDY | options)), []
    with pytest.raises(RingError, match=match):
        collect(reply, seen)
    assert isinstance(seen[-1], End)
    assert seen[-1].reason == "error"
    assert list(reply) == []
    assert list(session.send(user("Still there?"), **GREEDY))[-1].reason in ("stop", "length")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("store_kv_bits", 7),
        ("snapshot_every_tokens", 0),
        ("prefill_step_tokens", 0),
        ("memory_budget_bytes", -1),
        ("store_budget_bytes", -1),
    ],
)
def test_a_session_is_not_made_with_what_cannot_work(option, value):
    with pytest.raises(OptionError, match=f"{option} {value} "):
        Session(**{option: value})


def test_a_model_that_is_not_there(tmp_path):
    session = Session(tmp_path / "none", store=False)
    with pytest.raises(RingError, match=r"\[hub\]"):
        list(session.send("hello"))
    with pytest.raises(RingError, match=r"\[hub\]"):
        session.wait_until_loaded()
    assert session.close()


def test_a_closed_session_says_so(chat_folder):
    session = Session(chat_folder, store=False)
    reply = session.send(user("x"), sampling=Sampling(temp=0, logit_bias={1: -1e9}), max_tokens=1500)
    assert session.close()
    assert list(reply)[-1].reason == "stopped"
    with pytest.raises(RingError, match=r"\[session\] the session is closed"):
        session.send("x")


def test_a_closed_session_is_resumed(chat_folder, tmp_path):
    """A restart reads files, not the prompt."""
    messages = user("A long tale of whales. " * 12)
    with Session(chat_folder, store=tmp_path) as session:
        end = list(session.send(messages, **GREEDY))[-1]
    messages = [*messages, end.message, *user("Go on.")]
    with Session(chat_folder, store=tmp_path) as session:
        events = list(session.send(messages, **GREEDY))
        read = session.counters.read_tokens
    (s,) = (e for e in events if isinstance(e, Statistics))
    assert s.reused_tokens > 80
    assert s.read_tokens == read < 60
    with Session(chat_folder, store=False) as session:
        assert list(session.send(messages, **GREEDY))[-1] == events[-1]


def two_answers(folder, store):
    with Session(folder, store=store) as session:
        return [list(session.send(user(text), **GREEDY))[-1].reason for text in ("Hello", "Hello again")]


def test_a_disk_that_cannot_be_written_costs_one_warning(chat_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"\[cache\] .* could not be written") as told:
        reasons = two_answers(chat_folder, tmp_path / "file")
    assert set(reasons) <= {"stop", "length"}
    assert len(told) == 1


def test_closing_while_loading_ends_the_loading(chat_folder):
    session = Session(chat_folder, store=False)
    reply = session.send("hello", **GREEDY)
    assert session.close()
    assert list(reply)[-1].reason == "stopped"


def test_continuing_an_answer(session):
    talk = [*user("Hello"), {"role": "assistant", "content": "Well, I"}]
    end = list(session.send(talk, continue_last=True, **GREEDY))[-1]
    assert end.message["content"].startswith("Well, I")


def test_importing_the_session_is_light():
    code = "import sys; from ring_mlx import Session, Sampling, End; print('mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# Tool calls


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_a_message_keeps_its_calls():
    builder = MessageBuilder({"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo: "})
    pieces = list(builder._say("42 ")) + [e for p in ToolCallSplitter().feed(CALL) for e in builder._say(p)]
    assert pieces == [AnswerText("42 "), ToolCall("add", {"a": 1})]
    assert builder.message() == {
        "role": "assistant",
        "content": "\n\nSo: 42 ",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    }
