"""A draft model in sessions, servers and the chat: the same answers, nothing read twice, within memory."""

from __future__ import annotations

import shutil
import threading

import pytest

from ring_mlx.checkpoint.loading import demo_model_path
from ring_mlx.cli import build_parser
from ring_mlx.cli.serve_command import make_settings
from ring_mlx.engine.events import End
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.model_drafts import ModelDrafts
from ring_mlx.engine.pressure import Watch
from ring_mlx.engine.request import Request
from ring_mlx.engine.scheduler import Scheduler
from ring_mlx.errors import NoFitError, OptionError, RingError
from ring_mlx.generation.draft_model import DraftModel
from ring_mlx.generation.draft_sources import PromptDrafts
from ring_mlx.generation.pace import Pace
from ring_mlx.model import memory
from ring_mlx.system import macos
from tests.serving import CHAT, metric, send, user
from tests.sessions import DirectSession, options
from tests.test_draft_model import Counted, swap, tokens_only
from tests.test_speculation_engine import QUESTIONS, answer, assert_same_state
from tests.tiny import make_model


@pytest.fixture(scope="module")
def small():
    return make_model(seed=3)


def drafting(chat, draft, **changes):
    """A session with a draft model that counts what it reads."""
    session = DirectSession.__new__(DirectSession)
    session.loaded = LoadedModel(*chat, options(**({"speculate": 3} | changes)), draft)
    session.scheduler = Scheduler(session.loaded, Metrics())
    session.reader = session.scheduler.reader
    return session


def asked(*texts):
    return [{"role": "user", "content": text} for text in texts]


def test_a_conversation_says_the_same_and_its_prefix_is_not_read_again(chat):
    counted = Counted(chat[0])  # which is always right, so that it reads each token once
    plain, drafted = DirectSession(*chat, options()), drafting(chat, counted)
    messages = []
    for text in QUESTIONS:
        messages += asked(text)
        expected = answer(plain, messages)
        before = counted.tokens
        assert answer(drafted, messages) == expected
        assert_same_state(drafted, plain)
        read = expected_read(plain)
        assert counted.tokens - before <= read + 16 + 8  # prompt tokens that are new, the answer, drafts at the end
        messages.append(expected[-1].message)
    assert drafted.loaded.drafts.pace.accepted > 20
    # An edit, and the other branch again
    for branch in ([*messages[:2], *asked("Another?")], [*messages[:4], *asked(QUESTIONS[2])]):
        before = counted.tokens
        expected = answer(plain, branch)
        assert answer(drafted, branch) == expected
        assert counted.tokens - before <= expected_read(plain) + 16 + 8 + 24


def expected_read(session):
    """Prompt tokens that the last request was new in."""
    total = session.counters.read_tokens
    new = total - getattr(session, "seen_tokens", 0)
    session.seen_tokens = total
    return new


def test_several_conversations_find_their_own(small):
    drafts = ModelDrafts(PromptDrafts(Pace(3, True), True), Counted(small), None, 1 << 24)
    one, two = [*range(1, 30)], [*range(40, 1, -1)]
    drafters = [drafts.drafter(text) for text in (one, two)]
    said = [d.draft(2).tokens for d in drafters]
    for d in drafters:
        drafts.take_back(d)
    before = drafts.model.tokens
    assert [drafts.drafter([*text, 7]).draft(2).tokens for text in (one, two)] == [
        DraftModel(small, [*text, 7]).draft(2).tokens for text in (one, two)
    ]
    assert drafts.model.tokens - before <= 2 * 3
    assert said == [DraftModel(small, text).draft(2).tokens for text in (one, two)]


def test_without_a_budget_it_reads_again_and_says_the_same(small):
    drafts = ModelDrafts(PromptDrafts(Pace(3, True)), small, None, 0)
    text = [*range(1, 40)]
    drafter = drafts.drafter(text)
    drafter.draft(2)
    drafts.take_back(drafter)
    assert len(drafts.tree) == 0
    assert drafts.drafter([*text, 5]).draft(3).tokens == DraftModel(small, [*text, 5]).draft(3).tokens


def test_drafts_that_did_not_come_are_not_kept(small):
    """An answer that ends in the middle of drafts leaves a snapshot of what came."""
    drafts = ModelDrafts(PromptDrafts(Pace(5, True)), small, None, 1 << 24)
    drafter = drafts.drafter([*range(1, 20)])
    drafter.draft(5)
    drafts.take_back(drafter)
    wrong = drafts.drafter([*range(1, 20), 3, 4])
    assert wrong.draft(4).tokens == DraftModel(small, [*range(1, 20), 3, 4]).draft(4).tokens


def test_a_draft_model_that_may_not_read_yet_leaves_the_lookup(small):
    pace, counted = Pace(), Counted(small)
    for _ in range(3):
        pace.took(1, 1.0)
    drafter = ModelDrafts(PromptDrafts(pace), counted, None, 1 << 24).drafter([n * 7 % 70 for n in range(300)])
    assert drafter.guess().length != -1  # its first 128 tokens would cost two plain steps
    assert counted.tokens == 0
    for _ in range(900):
        pace.took(1, 1.0)
        drafter.guess()
    assert counted.tokens >= 300


def test_its_memory_counts(chat, small, monkeypatch):
    with_draft, without = LoadedModel(*chat, options(), small), LoadedModel(*chat, options())
    assert with_draft.weight_bytes - without.weight_bytes == LoadedModel(small, chat[1], options()).weight_bytes
    assert (with_draft.draft_config, without.draft_config) == (small.config, None)
    budget = with_draft.budget_bytes()
    assert with_draft.tree().budget_bytes + with_draft.drafts.tree.budget_bytes == budget
    assert 0 < with_draft.drafts.tree.budget_bytes < budget
    monkeypatch.setattr(memory, "PLAIN_CONTEXT", 1)
    request = Request(asked(QUESTIONS[0]))
    tokens = without.check(request)
    needed = without.weight_bytes + memory.cache_bytes(chat[0].config, tokens) + memory.WORKSPACE_BYTES
    monkeypatch.setattr(memory, "budget_bytes", lambda: needed)
    assert without.check(request) == tokens
    with pytest.raises(NoFitError):
        with_draft.check(request)


def test_its_snapshots_go_first_where_macos_is_short_of_memory(chat, small, monkeypatch):
    session = drafting(chat, small)
    answer(session, asked(QUESTIONS[0]))
    spare = session.loaded.drafts.tree
    assert len(spare) > 0
    monkeypatch.setattr(macos, "memory_pressure", lambda: macos.WARNING)
    Watch(session.scheduler._tree, spare).look()
    assert len(spare) == 0
    assert len(session.scheduler._tree) > 0


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5, 8])
def test_a_stop_in_the_middle_of_drafts(chat, small, stop_after):
    plain, drafted = DirectSession(*chat, options()), drafting(chat, small)
    for _ in range(2):
        expected = answer(plain, asked(QUESTIONS[0]), stop_after=stop_after)
        assert answer(drafted, asked(QUESTIONS[0]), stop_after=stop_after) == expected
        assert_same_state(drafted, plain)


def test_a_draft_model_that_fails_fails_one_answer(chat, small):
    counted = Counted(small)
    session, plain = drafting(chat, counted), DirectSession(*chat, options())
    counted.fails = True
    with pytest.raises(MemoryError):
        answer(session, asked(QUESTIONS[0]))
    counted.fails = False
    assert answer(session, asked(QUESTIONS[0]))[-1] == answer(plain, asked(QUESTIONS[0]))[-1]


# Doors


def toy(**changes):
    return options(**({"model": str(demo_model_path()), "draft_model": str(demo_model_path())} | changes))


def test_a_session_loads_both_and_outlives_the_drafts_folder(tmp_path):
    folder = tmp_path / "draft"
    shutil.copytree(demo_model_path(), folder)
    session = DirectSession.__new__(DirectSession)
    session.loaded = LoadedModel.load(toy(draft_model=str(folder), speculate=3))
    shutil.rmtree(folder)
    session.scheduler = Scheduler(session.loaded, Metrics())
    told = answer(session, asked("Sort these numbers: 5 81 33"))
    assert isinstance(told[-1], End)
    assert session.loaded.drafts.pace.accepted > 0


def test_what_cannot_draft_is_refused_in_one_line(tmp_path):
    with pytest.raises(RingError, match=r"token 300 is .* in the draft model other"):
        LoadedModel.load(toy(draft_model=str(tokens_only(tmp_path / "other", swap))))
    damaged = tmp_path / "damaged"
    shutil.copytree(demo_model_path(), damaged)
    weights = next(damaged.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(RingError) as found:
        LoadedModel.load(toy(draft_model=str(damaged)))
    assert "\n" not in str(found.value)
    with pytest.raises(OptionError, match="a draft model does not go with speculate off; leave one of them out"):
        toy(speculate="off")


def parse(*words):
    return build_parser(words).parse_args(words)


def test_the_server_and_the_chat_take_it(capsys):
    assert make_settings(parse("serve", "--draft-model", "x")).draft_model == "x"
    assert make_settings(parse("serve")).draft_model is None
    assert parse("chat", "--plain", "--draft-model", "x").draft_model == "x"
    assert parse("chat", "--plain").draft_model is None


def test_three_clients_at_once(serve):
    texts = [f"Sort these numbers: {n} 81 33" for n in (5, 6, 7)]
    body = {"temperature": 0, "max_tokens": 24}
    plain, server, found = serve(), serve(draft_model=str(demo_model_path()), speculate=3), {}

    def ask(where, text):
        status, _, reply = send(where, "POST", CHAT, body | {"messages": user(text)})
        assert status == 200
        return reply["choices"][0]["message"]

    threads = [threading.Thread(target=lambda t=t: found.setdefault(t, ask(server, t))) for t in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {text: ask(plain, text) for text in texts}
    ask(server, texts[0])
    assert metric(server, "accepted_tokens_total") > 0
