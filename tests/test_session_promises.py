"""What a session promises beside answers: whose state survives an error, who is stopped, and which store is whose."""

from __future__ import annotations

import pytest

from ring_mlx import Session
from ring_mlx.engine.events import End, PrefillProgress, Sampling, SessionOptions
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.model_thread import ModelThread
from ring_mlx.engine.request import Request
from ring_mlx.engine.scheduler import Scheduler
from ring_mlx.model.kv_quantization import KVQuantization
from ring_mlx.serve.engine import Settings
from tests.sessions import DirectSession, Talk, options

GREEDY = {"sampling": Sampling(temp=0), "max_tokens": 6, "thinking_budget": 2}
ENDLESS = {"sampling": Sampling(temp=0, logit_bias={1: -1e9}), "max_tokens": 300}


def user(text):
    return [{"role": "user", "content": text}]


def test_stop_ends_the_oldest_request_and_no_other(chat_folder):
    with Session(chat_folder, store=False) as session:
        first, second = session.send(user("One"), **ENDLESS), session.send(user("Two"), **GREEDY)
        third = session.send(user("Three"), **GREEDY)
        session.stop()
        assert [list(r)[-1].reason == "stopped" for r in (first, second, third)] == [True, False, False]


def test_stop_ends_what_runs_and_not_what_has_ended(chat_folder):
    with Session(chat_folder, store=False) as session:
        list(session.send(user("One"), **GREEDY))
        running = session.send(user("Two"), **ENDLESS)
        session.stop()
        assert list(running)[-1].reason == "stopped"


class _Stops:
    """Stops a request once so much of its prompt has been read, between two steps."""

    def __init__(self, request, at):
        self._request, self._at = request, at

    def put(self, event):
        if isinstance(event, PrefillProgress) and event.done >= self._at:
            self._request.stopped.set()


@pytest.mark.parametrize("kind", [SessionOptions, Settings])
def test_a_prompt_that_is_stopped_between_two_steps_keeps_what_was_read(chat, kind):
    given = {"name": "toy"} if kind is Settings else {}
    loaded = LoadedModel(*chat, kind(model="toy", store=False, read_ahead=False, prefill_step_tokens=16, **given))
    scheduler = Scheduler(loaded, Metrics())
    request = Request(prompt=user("stop while reading " * 30), max_tokens=1)
    request.events = _Stops(request, 40)
    scheduler.admit(request)
    while scheduler.busy:
        scheduler.step()
    again = Request(prompt=request.prompt, max_tokens=1)
    scheduler.admit(again)
    assert again.events.get().reused >= 40


def test_closing_waits_for_no_client_that_left_while_its_prompt_was_read(chat_folder):
    thread = ModelThread(Settings(model=chat_folder, name="toy", store=False, prefill_step_tokens=8))
    request = Request(prompt="3 + 4, " * 60, is_text=True, max_tokens=1)
    thread.submit(request)
    while not (isinstance(event := request.events.get(timeout=30), PrefillProgress) and event.done):
        pass
    request.drop()
    assert thread.close(20)


def test_a_prompt_that_is_changed_after_sending_is_answered_as_it_was(chat_folder):
    with Session(chat_folder, store=False) as session:
        blocker = session.send(user("Wait"), **ENDLESS)
        messages = user("Which?")
        reply = session.send(messages, **GREEDY)
        messages[0]["content"] = "Changed to something much longer than it was. " * 5
        messages.append({"role": "assistant", "content": "No."})
        blocker.stop()
        list(blocker)
        total = next(e.total for e in reply if isinstance(e, PrefillProgress))
        assert total == next(e.total for e in session.send(user("Which?"), **GREEDY) if isinstance(e, PrefillProgress))


def test_nor_do_its_tools_options_and_biases_change(chat_folder):
    def given():
        return {
            "tools": [{"type": "function", "function": {"name": "look"}}],
            "template_options": {"enable_thinking": True},
            "sampling": Sampling(temp=0, logit_bias={5: 1e3}),
        }

    def total_and_end(reply):
        events = list(reply)
        return next(e.total for e in events if isinstance(e, PrefillProgress)), events[-1]

    with Session(chat_folder, store=False) as session:
        blocker, changed = session.send(user("Wait"), **ENDLESS), given()
        reply = session.send(user("Which?"), max_tokens=6, **changed)
        changed["tools"][0]["function"]["name"] = "look at all that there is"
        changed["template_options"]["enable_thinking"] = False
        changed["sampling"].logit_bias.clear()
        blocker.stop()
        list(blocker)
        assert total_and_end(reply) == total_and_end(session.send(user("Which?"), max_tokens=6, **given()))


def test_after_an_error_the_live_cache_is_not_believed(chat, monkeypatch):
    """A step that failed half-way has written keys and values which no snapshot may point to."""
    talk = Talk(DirectSession(*chat, options()))
    messages = user("What is a whale?")
    _, message, _ = talk.ask(messages)
    reader, seen = talk.session.reader, []

    def half(prompt, model, cache, *_, **__):
        model(prompt[None, :3], cache=cache)
        raise MemoryError("no room")
        yield

    with monkeypatch.context() as patch:
        patch.setattr("ring_mlx.engine.reading.prefill", half)
        messages = [*messages, message, *user("And a shark, or something as long as a shark?")]
        with pytest.raises(MemoryError):
            talk.session.answer(Request(messages, **GREEDY), seen.append)
    assert not any(isinstance(e, End) for e in seen)
    assert (len(reader.live.tokens), reader.live.cache[0].empty()) == (0, True)
    fresh = Talk(DirectSession(*chat, options()))
    assert talk.ask(messages)[1] == fresh.ask(messages)[1]


FORMS = [
    {},
    {"kv_quantization": KVQuantization(8, 32, start=0)},
    {"kv_quantization": KVQuantization(4, 32, start=0)},
    {"kv_quantization": KVQuantization(8, 32, start=64)},
    {"store_kv_bits": 8},
    {"store_kv_bits": 4},
]


def test_each_form_of_keys_and_values_has_a_store_of_its_own(wide_chat, tmp_path):
    """What one form has saved is nothing to the others, and is found again by its own."""
    text = user("A tale of whales that is read again and again. " * 4)
    for restarted in (False, True):
        for form in FORMS:
            talk = Talk(DirectSession(*wide_chat, options(store=tmp_path, **form)), max_tokens=2)
            statistics, _, _ = talk.ask(text)
            assert (statistics.reused_tokens > 0) is restarted
            talk.session.use_idle_time(lambda: False)
    assert len(list(tmp_path.glob("v1/*"))) == len(FORMS)


@pytest.fixture
def wide_chat(chat_folder, chat, tmp_path_factory, vocabulary):
    """As `chat`, with heads that groups of 32 divide."""
    from ring_mlx import load
    from tests.conftest import TOKENIZER_FILES
    from tests.tiny import config, save_hf

    folder = tmp_path_factory.mktemp("wide") / "ring-wide"
    save_hf(folder, config(vocab_size=vocabulary, eos_token_id=1, max_position_embeddings=2048, head_dim=32))
    for name in TOKENIZER_FILES:
        if (chat_folder / name).is_file():
            (folder / name).write_bytes((chat_folder / name).read_bytes())
    return load(folder)
