"""Branch points are found in any template, and with any kind of tokenizer."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from ring_mlx import KVQuantization
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.engine.branches import Prompt, Renderer, branch_points, next_turn
from ring_mlx.generation.templates import render_chat
from tests.sessions import QUESTIONS, DirectSession, Recorder, Talk, common, options
from tests.tiny import make_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEEPS_THOUGHTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
COUNTS_AT_THE_START = (
    "{{ messages | length }} messages\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {"chatml": CHATML, "keeps": KEEPS_THOUGHTS, "counts": COUNTS_AT_THE_START, "own": None}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, chat_folder):
    loaded = load_tokenizer(chat_folder)
    if TEMPLATES[request.param]:
        loaded.chat_template = TEMPLATES[request.param]
    return loaded


TALK = [
    {"role": "system", "content": "Be brief."},
    user("What is a whale?"),
    assistant("A mammal."),
    user("And a cod?"),
]


@pytest.mark.parametrize("fast", [True, False])
def test_points_are_where_other_prompts_part(tokenizer, fast):
    """Compared with whole renders of conversations that do go on differently."""
    renderer = Renderer(tokenizer)
    prompt = renderer.prompt(TALK)
    assert prompt.ids == render_chat(tokenizer, TALK)
    if not fast:
        prompt = Prompt(prompt.text, prompt.ids, None)
    points = branch_points(renderer, TALK, prompt, 0)
    others = {
        "other question": [*TALK[:3], user("Never mind.")],
        "other answer": [*TALK[:2], assistant("Some fish."), user("Why?")],
        "other start": [TALK[0], user("Hello!")],
        "next turn": [*TALK, assistant("Some fish."), user("Why?")],
    }
    for name, messages in others.items():
        shared = common(prompt.ids, render_chat(tokenizer, messages))
        assert shared in points or shared == 0, name
    assert branch_points(renderer, TALK, prompt, max(points)) == {}


def test_the_next_turn_starts_with_the_answer(tokenizer):
    renderer = Renderer(tokenizer)
    ahead = next_turn(renderer, TALK, {**assistant("Some fish."), "reasoning_content": "hm"})
    after = [*TALK, {**assistant("Some fish."), "reasoning_content": "hm"}]
    for text in ("So?", "Why is that?"):
        assert common(ahead.ids, render_chat(tokenizer, [*after, user(text)])) == len(ahead.ids)
    assert len(ahead.ids) > len(render_chat(tokenizer, TALK)) - 10 or len(ahead.ids) == 0


def test_a_template_that_refuses_costs_only_its_points(chat_folder):
    tokenizer = load_tokenizer(chat_folder)
    tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}>{{ messages[0].content }}\n"
    )
    renderer = Renderer(tokenizer)
    prompt = renderer.prompt([user("Hello")])
    assert set(branch_points(renderer, [user("Hello")], prompt, 0).values()) <= {"system", "user"}
    assert next_turn(renderer, [user("Hello")], assistant("Hi")) is None


def test_every_template_gives_right_answers(chat, tokenizer, monkeypatch):
    """Three turns, an edit and a new answer, compared with sessions that know nothing."""
    recorder = Recorder(monkeypatch)
    model = chat[0]
    talk = Talk(DirectSession(model, tokenizer, options(read_ahead=True)), thinking_budget=None, max_tokens=8)
    messages = [TALK[0]]
    for n, text in enumerate([*QUESTIONS[:3], "edited"]):
        messages = [*(messages if text != "edited" else messages[:3]), user(text)]
        statistics, message, _ = talk.ask(messages)
        ours = recorder.take()
        _, expected, _ = Talk(DirectSession(model, tokenizer, options()), thinking_budget=None, max_tokens=8).ask(
            messages
        )
        assert message == expected
        assert np.abs(ours - recorder.take()).max() < 1e-4
        assert statistics.reused_tokens > 0 or n == 0 or tokenizer.chat_template == COUNTS_AT_THE_START
        messages.append(message)
        talk.session.use_idle_time(lambda: False)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_keys_and_values_in_a_session(chat_folder, tmp_path, monkeypatch, bits):
    """From the first token on, so that what is reused is what would be read; through a restart."""
    recorder = Recorder(monkeypatch)
    model = make_model(head_dim=32, vocab_size=1024, max_position_embeddings=2048, eos_token_id=1)
    model.fingerprint = "random"
    tokenizer = load_tokenizer(chat_folder)
    settings = options(store=tmp_path, kv_quantization=KVQuantization(bits, 32, 0), read_ahead=True)
    talk, messages = Talk(DirectSession(model, tokenizer, settings)), []
    for text in QUESTIONS[:3]:
        messages = [*messages, user(text)]
        statistics, message, _ = talk.ask(messages)
        ours = recorder.take()
        alone = copy.copy(settings)
        object.__setattr__(alone, "store", False)
        _, expected, _ = Talk(DirectSession(model, tokenizer, alone)).ask(messages)
        assert np.abs(ours - recorder.take()).max() < 1e-3
        assert message == expected
        assert statistics.kv_quantization == f"{bits} bits, groups of 32"
        messages.append(message)
        talk.session.use_idle_time(lambda: False)
        assert len(list(talk.session.reader.store.manifests())) > 0
        talk.session = DirectSession(model, tokenizer, settings)
    assert statistics.reused_tokens > 30
