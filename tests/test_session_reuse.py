"""Never read a token twice: whole conversations, counted, and compared with sessions that know nothing."""

from __future__ import annotations

import numpy as np
import pytest

from ring_mlx.engine.events import Sampling, Statistics
from ring_mlx.engine.request import Request
from tests.sessions import QUESTIONS, DirectSession, Recorder, Talk, fresh, options

SYSTEM = {"role": "system", "content": "You are terse."}
TOLERANCE = 1e-4


def user(text):
    return {"role": "user", "content": text}


class Twin(Talk):
    """A talk whose every answer is compared with a fresh session's, logit by logit."""

    def __init__(self, chat, worker, recorder, **request):
        super().__init__(worker, **request)
        self.chat, self.recorder = chat, recorder

    def ask(self, messages, **changes):
        found = super().ask(messages, **changes)
        ours = self.recorder.take()
        _, message, _ = fresh(self.chat, messages, **(self.request | changes))
        theirs = self.recorder.take()
        assert found[1] == message
        assert np.abs(ours - theirs).max() < TOLERANCE
        statistics, _, new = found
        assert statistics.read_tokens == new
        assert statistics.read_tokens + statistics.reused_tokens == statistics.prompt_tokens
        return found


def turn(talk, messages, text):
    """Ask the next question; returns the conversation with the answer."""
    messages = [*messages, user(text)]
    _, message, _ = talk.ask(messages)
    return [*messages, message]


def test_twelve_turns_with_edit_branch_regenerate_and_restart(chat, tmp_path, monkeypatch):
    """The proof of the issue: tokens read are those never seen, and every logit is a fresh session's."""
    recorder = Recorder(monkeypatch)
    settings = options(store=tmp_path)
    talk = Twin(chat, DirectSession(*chat, settings), recorder)
    messages = [SYSTEM]
    for n in range(6):
        messages = turn(talk, messages, f"{n + 2} {QUESTIONS[n]}")
    assert any("reasoning_content" in m for m in messages)
    statistics, _, new = talk.ask(messages[:-1])
    assert statistics.read_tokens == new == 0, "regenerating reads nothing"
    edited = turn(talk, messages[: 1 + 2 * 4], "Fifth, but otherwise.")
    messages = turn(talk, edited, "Go on from there.")
    branch = turn(talk, messages[: 1 + 2 * 2], "Other third question?")
    branch = turn(talk, branch, "More of that branch.")

    read = talk.session.counters.read_tokens
    talk.session.use_idle_time(lambda: False)
    assert talk.session.counters.read_tokens == read
    talk.session = DirectSession(*chat, settings)
    assert len(talk.session.reader.tree) == 0
    for n in range(7, 11):
        messages = turn(talk, messages, f"{n + 1} {QUESTIONS[n % 6]}")
    branch = turn(talk, branch, "Still there?")
    messages = turn(talk, messages, "Eleven done.")
    messages = turn(talk, messages, "Twelve done.")
    assert sum(m["role"] == "user" for m in messages) == 12


def test_only_the_rendered_answer_is_read_again(chat):
    """After an answer whose thought the template strips, the next turn reads the answer and the question."""
    talk = Talk(DirectSession(*chat, options()))
    messages = [user("What is a whale?")]
    first, message, _ = talk.ask(messages)
    assert "reasoning_content" in message
    second, _, _ = talk.ask([*messages, message, user("And a shark?")])
    tokenizer = chat[1]
    between = tokenizer.encode(message["content"] + "<|role_end|><role>HUMAN</role>And a shark?<|role_end|>")
    assert second.read_tokens <= len(between) + 12
    assert second.reused_tokens >= first.prompt_tokens - 3


def test_reading_ahead_leaves_only_the_question(chat):
    talk = Talk(DirectSession(*chat, options(read_ahead=True)))
    messages = [user("What is a whale?")]
    _, message, _ = talk.ask(messages)
    talk.session.use_idle_time(lambda: False)
    assert talk.session.counters.ahead_tokens > 0
    messages = [*messages, message, user("And a shark?")]
    statistics, answer, _ = talk.ask(messages)
    question = chat[1].encode("And a shark?<|role_end|><role>ASSISTANT</role><think>\n", add_special_tokens=False)
    assert statistics.read_tokens == len(question)
    assert answer == fresh(chat, messages)[1]
    opened = len(chat[1].encode("<think>\n", add_special_tokens=False))
    assert talk.session.counters.read_tokens == statistics.prompt_tokens + opened, "each token of the talk once"


def test_reading_ahead_gives_way(chat):
    talk = Talk(DirectSession(*chat, options(read_ahead=True)))
    talk.ask([user("What is a whale?")])
    talk.session.use_idle_time(lambda: True)
    assert talk.session.counters.ahead_tokens == 0


def test_a_new_chat_reuses_system_prompt_and_tools(chat):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    talk = Talk(DirectSession(*chat, options()), tools=tools)
    talk.ask([SYSTEM, user("Hello!")])
    statistics, answer, new = talk.ask([SYSTEM, user("Another matter.")])
    assert statistics.read_tokens == new < 25 < statistics.reused_tokens
    assert answer == fresh(chat, [SYSTEM, user("Another matter.")], tools=tools)[1]


def test_an_imported_conversation_can_be_edited_anywhere(chat):
    talk = Talk(DirectSession(*chat, options()))
    messages = []
    for n in range(4):
        messages += [user(f"{n} question"), {"role": "assistant", "content": f"It is {n}."}]
    talk.ask([*messages, user("Last")])
    for n in range(4):
        statistics, _, new = talk.ask([*messages[: 2 * n], user("Edited text")])
        assert statistics.read_tokens == new
        statistics, _, new = talk.ask([*messages[: 2 * n + 1], {"role": "assistant", "content": "No."}, user("So?")])
        assert statistics.read_tokens == new


def test_a_tool_result_continues_the_call(chat):
    """Where the template keeps the thought, the state after the answer is the one to go on from."""
    talk = Talk(DirectSession(*chat, options()))
    messages = [user("Look it up.")]
    first, message, _ = talk.ask(messages)
    statistics, answer, _ = talk.ask([*messages, message, {"role": "tool", "content": "42"}])
    assert statistics.reused_tokens >= first.prompt_tokens
    assert answer == fresh(chat, [*messages, message, {"role": "tool", "content": "42"}])[1]


def test_long_prompts_leave_snapshots_on_the_way(chat):
    talk = Talk(DirectSession(*chat, options(snapshot_every_tokens=100, prefill_step_tokens=30)))
    text = "word " * 300
    first, _, _ = talk.ask([user(text)])
    kinds = [s.kind for s in talk.session.reader.tree]
    assert kinds.count("long") >= 3
    statistics, answer, new = talk.ask([user(text[: len(text) // 2] + "another end")])
    assert new <= statistics.read_tokens < new + 100
    assert answer == fresh(chat, [user(text[: len(text) // 2] + "another end")])[1]
    assert first.prompt_tokens > 300


@pytest.mark.parametrize("budget", [0, 60_000, 300_000])
def test_a_small_budget_costs_time_and_nothing_else(chat, budget):
    talk = Talk(DirectSession(*chat, options(memory_budget_bytes=budget)))
    messages = []
    for text in QUESTIONS[:3]:
        messages = [*messages, user(text)]
        _, message, _ = talk.ask(messages)
        assert message == fresh(chat, messages)[1]
        tree = talk.session.reader.tree
        assert tree.nbytes <= budget or (budget and len(tree) == 1), "all but what the talk goes on from"
        messages.append(message)


def test_plain_text_is_continued(chat):
    talk = Talk(DirectSession(*chat, options()), thinking_budget=None)
    events = []
    text = "Once upon a time there was"
    talk.session.answer(Request(text, Sampling(temp=0), max_tokens=8), events.append)
    talk.session.answer(Request(text + " a king", Sampling(temp=0), max_tokens=8), events.append)
    first, second = (e for e in events if isinstance(e, Statistics))
    assert first.reused_tokens == 0
    assert second.reused_tokens == first.prompt_tokens
