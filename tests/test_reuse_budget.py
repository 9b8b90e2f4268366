"""Never read a token twice, as far as a budget allows: lives of a reader on a made-up model, and sessions on a small one.

The made-up model has one linear layer and costs nothing, so that a budget is a number of snapshots and a life is counted
token by token beside a twin whose budget has no end.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache

from ring_mlx.engine import reading
from ring_mlx.engine.reading import PromptReader
from ring_mlx.engine.snapshots import SnapshotTree, Store
from ring_mlx.model.cache import HybridCache
from tests.fuzz.profile import fuzz
from tests.sessions import DirectSession, Talk, options

STATE_BYTES, SNAPSHOT_BYTES = 256, 260
USER, ASSISTANT, THINK, END = 1, 2, 3, 4
BIG = 1 << 40


class MadeUp:
    """What a reader needs of a model: a state that says which tokens it has seen."""

    config = SimpleNamespace(context_tokens=1 << 20)

    def make_cache(self):
        return HybridCache([ArraysCache(1)])


def prefill(prompt, model, cache, sizes, kv_quantization=None, every_position=False):
    """As `ring_mlx.generation.decoding.prefill`, for the made-up model."""
    tokens, done = prompt.tolist(), 0
    for size in sizes:
        before = 0.0 if cache[0][0] is None else cache[0][0][0].item()
        cache[0][0] = mx.full(STATE_BYTES // 4, before + sum(tokens[done : done + size]) % 997)
        done += size
        yield done, mx.zeros((1, 1))


class Person:
    """Talks to a reader in conversations of token lists, as a session does, thought dropped from old answers.

    Args:
        budget: Snapshots in memory.
        store: On disk, or None.
        thinks: Whether answers begin with a thought.
        ahead: Whether there is time to read ahead between turns.
    """

    def __init__(self, budget, store=None, thinks=True, ahead=True):
        self.reader = PromptReader(
            MadeUp(), SnapshotTree(budget * SNAPSHOT_BYTES), store, step_tokens=50, every_tokens=1 << 20
        )
        if store is not None:
            self.reader.tree.save_first = store.save_dropped
        self.thinks, self.ahead = thinks, ahead

    def ask(self, talk, question, answer):
        """Add a turn to a talk; returns how many tokens were read for it."""
        turns, open_tokens = [*talk, (question, None)], [THINK] if self.thinks else []
        ids, points = render(turns)
        before, known = self.reader.read_tokens, self.reader.start(ids + open_tokens)
        if known < len(ids + open_tokens):
            points = {at: kind for at, kind in points.items() if known < at}
            list(self.reader.read(ids + open_tokens, points, lambda: False))
        read = self.reader.read_tokens - before
        thought = [THINK, 7, 8, 9] if self.thinks else []
        fed = np.array(ids + thought + answer + [END], dtype=np.int32)
        self.reader.live.advance(fed)
        ahead = render([*talk, (question, answer)])[0] + [USER]
        self.reader.settle(ahead, self.reader.live.snapshot("generated", durable=False))
        self.idle(ahead)
        tree = self.reader.tree
        assert tree.nbytes <= tree.budget_bytes or len(tree) == 1
        return read

    def idle(self, ahead):
        if self.ahead:
            if self.reader.start(ahead) < len(ahead):
                list(self.reader.read(ahead, {len(ahead): "user"}, lambda: False))
            self.reader.settle(ahead)
        self.reader.save()


def render(turns):
    """The tokens of a conversation up to its open answer, and its places."""
    ids, points = [5, 6, 5, USER], {4: "system"}
    for n, (question, answer) in enumerate(turns):
        ids += [USER] if n else []
        points.setdefault(len(ids), "user")
        ids += [*question, END, ASSISTANT]
        points[len(ids)] = "answer"
        ids += [*answer, END] if answer is not None else []
    return ids, points


@pytest.fixture(autouse=True)
def made_up(request, monkeypatch):
    if "chat" not in request.fixturenames:
        monkeypatch.setattr(reading, "prefill", prefill)
        monkeypatch.setattr("ring_mlx.system.files.os.fsync", lambda _: None)


def words(n, count):
    """A text that no other begins like."""
    return [100 + n, *range(10, 10 + count)]


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 17])
def test_a_growing_chat_reads_what_is_new(budget, thinks, ahead):
    person, twin, talk = Person(budget, None, thinks, ahead), Person(BIG, None, thinks, ahead), []
    for n in range(30):
        question, answer = words(2 * n, 3), words(2 * n + 1, 4)
        assert person.ask(talk, question, answer) == twin.ask(talk, question, answer) < 20
        talk.append((question, answer))


STEPS = st.lists(
    st.tuples(st.sampled_from(["go on", "go on", "other", "edit", "again", "further back"]), st.integers(0, 9)),
    min_size=2,
    max_size=7,
)


def lead_a_life(person, twin, steps, enough_for):
    """Two conversations that take turns, with edits, branches and other answers, beside a twin that forgets nothing.

    Args:
        person, twin: Who talk.
        steps: What happens, and where.
        enough_for: Whether the budget should do for a step, from its kind and how many ends conversations have.
    """
    talks, now, ends = [[], []], 0, 0
    for n, (step, where) in enumerate(steps):
        now = 1 - now if step == "other" and talks[0] else now
        talk, question = talks[now], words(2 * n, 2 + where)
        if step in ("edit", "again") and talk:
            question = talk[-1][0] if step == "again" else question
            talk = talk[:-1]
        elif step == "further back" and talk:
            talk = talk[: where % len(talk)]
        goes_on = bool(talk) and len(talk) == len(talks[now])
        ends += not goes_on
        turn = (question, words(2 * n + 1, 3))
        read, best = person.ask(talk, *turn), twin.ask(talk, *turn)
        if enough_for("go on" if goes_on else step, ends):
            assert read <= best + (step == "again"), "the end of a prompt is not worth a snapshot"
        talks[now] = [*talk, turn]


@fuzz(60)
@given(STEPS, st.integers(2, 14), st.booleans(), st.booleans())
def test_what_is_read_is_what_the_best_snapshots_of_the_budget_leave(steps, budget, thinks, ahead):
    """With a snapshot for each end of a conversation and one for their start, each goes on and reads what is new; with
    two more another last question or answer does as well, and with three a new chat."""
    needed = {"go on": 1, "edit": 3, "again": 3, "other": 4}
    lead_a_life(
        Person(budget, None, thinks, ahead),
        Person(BIG, None, thinks, ahead),
        steps,
        lambda step, ends: step in needed and budget >= ends + needed[step],
    )


@fuzz(15)
@example([("go on", 0), ("other", 0), ("edit", 0), ("go on", 0), ("edit", 0)], 4, False, False)
@given(STEPS, st.integers(4, 6), st.booleans(), st.booleans())
def test_with_a_store_whatever_was_said_is_read_once(steps, budget, thinks, ahead):
    """Memory need only hold the places of one turn, wherever an edit goes back to."""
    with tempfile.TemporaryDirectory() as folder:
        person = Person(budget, Store(Path(folder), "mark", BIG), thinks, ahead)
        lead_a_life(person, Person(BIG, None, thinks, ahead), steps, lambda *_: True)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_two_conversations_take_turns(budget):
    """As many snapshots as conversations do; with fewer, the one that waits is read again and the budget kept."""
    person, twin, talks = Person(budget), Person(BIG), [[], []]
    for n in range(16):
        talk, turn = talks[n % 2], (words(2 * n, 3), words(2 * n + 1, 4))
        read, best = person.ask(talk, *turn), twin.ask(talk, *turn)
        assert read == best or n == 1 or budget < 2
        talk.append(turn)


def test_over_200_turns_no_more_is_held_than_what_the_next_goes_on_from():
    """Where one snapshot alone exceeds the budget, as with the keys and values of a long text."""
    person, talk = Person(1), []
    person.reader.tree.budget_bytes = SNAPSHOT_BYTES // 2
    for n in range(200):
        turn = words(2 * n, 1), words(2 * n + 1, 1)
        assert person.ask(talk, *turn) == (5 if n else 9)
        assert person.reader.tree.nbytes == SNAPSHOT_BYTES
        talk.append(turn)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("extra", ["plain", "tools", "system"])
@pytest.mark.parametrize("budget", [30_000, 300_000])
@pytest.mark.filterwarnings("ignore:.cache. .* do not hold two snapshots")
def test_sessions_read_what_is_new(chat, budget, extra, thinking):
    request = (
        {"tools": [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]} if extra == "tools" else {}
    )
    request |= {
        "thinking_budget": 4 if thinking else None,
        "template_options": {"enable_thinking": thinking},
        "max_tokens": 9,
    }
    talk = Talk(DirectSession(*chat, options(memory_budget_bytes=budget, read_ahead=True)), **request)
    twin = Talk(DirectSession(*chat, options(read_ahead=True)), **request)
    messages = [{"role": "system", "content": "Be brief."}] if extra == "system" else []
    for n in range(4):
        messages = [*messages, {"role": "user", "content": f"{n} more?"}]
        (found, message, _), (best, other, _) = talk.ask(messages), twin.ask(messages)
        assert (found.read_tokens, message) == (best.read_tokens, other)
        messages.append(message)
        for worker in (talk.session, twin.session):
            worker.use_idle_time(lambda: False)


def test_a_budget_too_small_for_two_snapshots_is_told_once_with_what_would_do(chat):
    def told(budget):
        talk = Talk(DirectSession(*chat, options(memory_budget_bytes=budget)), max_tokens=4, thinking_budget=None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for n in range(3):
                talk.ask([{"role": "user", "content": f"{n}? " * (1 + 40 * n)}])
                talk.session.use_idle_time(lambda: False)
        return [str(w.message) for w in caught]

    (line,) = told(30_000)
    assert line.startswith("[cache] 30,000 bytes of memory do not hold two snapshots of this conversation")
    enough = int(re.search(r"give (\d+) ", line)[1])
    assert told(enough) == []
    assert told(0) == []


def test_a_disk_that_is_left_gets_nothing_that_memory_drops(tmp_path):
    """Neither after it could not be written, nor where a prompt of another form is gone on from."""
    for leaves in (False, True):
        store = Store(tmp_path / str(leaves), "mark", BIG)
        person, talk = Person(4, store, thinks=False, ahead=False), []
        person.reader.save = lambda: None  # only what is dropped is saved
        if leaves:
            person.reader.leave_disk()
        for n in range(8):
            turn = words(2 * n, 3), words(2 * n + 1, 4)
            person.ask(talk, *turn)
            talk.append(turn)
        assert bool(list((tmp_path / str(leaves)).rglob("*.json"))) != leaves
