"""Chat templates in a process of their own: the same text as in this one, and an end whatever they do."""

from __future__ import annotations

import os
import random
import signal
import threading

import pytest

from ring_mlx import demo_model_path
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.errors import TokenizerError
from ring_mlx.generation import templates
from ring_mlx.generation.templates import render_text

USER = [{"role": "user", "content": "hi"}]
TALKS = [
    USER,
    [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "why"},
        {"role": "user", "content": "c"},
    ],
    [*USER, {"role": "assistant", "content": "half an answer  "}],
    [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"é": 1}}}]},
        {"role": "tool", "content": "r"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "go on "}]}],
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"ü": 1}}}]
# What transformers offers beside Jinja.
OFFERED = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ m | tojson(indent=2, sort_keys=true) }}{{ dict(a=1) }}{% endfor %}\n"
    "{% generation %}{{ ns.n }}{% endgeneration %}{{ bos_token }}{{ strftime_now('%%') }}{{ tools is none }}\n"
    "{{ documents is none }}{{ '%s' % 1 }}{{ 3 * 'x' }}{{ 2 ** 8 }}"
)


@pytest.fixture(scope="module")
def own():
    return load_tokenizer(demo_model_path())


def theirs(tokenizer, messages, tools, options, continue_last):
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            tools=tools,
            add_generation_prompt=not continue_last,
            continue_final_message=continue_last,
            **options,
        )
    except ValueError:
        return None


def ours(tokenizer, *args):
    try:
        return render_text(tokenizer, *args)
    except TokenizerError:
        return None


@pytest.mark.parametrize("template", [None, OFFERED])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("continue_last", [False, True])
def test_the_text_is_that_of_transformers(own, monkeypatch, template, talk, continue_last):
    if template:
        monkeypatch.setattr(own._tokenizer, "chat_template", template)
    for tools in (None, TOOLS):
        for options in ({}, {"enable_thinking": False}):
            given = talk, tools, options, continue_last
            assert ours(own, *given) == theirs(own, *given)


def test_a_named_template_is_found(own, monkeypatch):
    monkeypatch.setattr(own._tokenizer, "chat_template", {"default": "plain", "tool_use": "tools"})
    assert render_text(own, USER) == "plain"
    assert render_text(own, USER, TOOLS) == "tools"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too long"),
        ("{{ 'x' * 10**11 }}", "MiB"),
        ("{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}", "MiB"),
        (
            "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
            "MiB|too long",
        ),
        ("{{ 9**9**9 }}", "large numbers"),
        ("{{ '%1000000000d' % 1 }}", "MiB|longer"),
        ("{{ '{:1000000000}'.format(1) }}", "MiB|longer"),
        ("{{ 'x' | center(10000000000) }}", "MiB"),
        ("{{ ('x' * 1000) | indent(10**9) }}{{ ('\n' * 1000) | indent(10**9) }}", "MiB"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "longer"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deeply"),
        ("{% if 1 %}" * 5000 + "x" + "{% endif %}" * 5000, "deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "deeply"),
        ("{% for %}", "Expected"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{% import 'os' as os %}", "loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('true').read() }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "name like"),
        ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('no') }}", r"\(no\)"),
        ("{{ 1 / 0 }}", "zero"),
        ("x" * (2 << 20), "too long"),
    ],
)
def test_a_template_ends_whatever_it_does(own, monkeypatch, template, said):
    monkeypatch.setattr(own._tokenizer, "chat_template", template)
    with pytest.raises(TokenizerError, match=said):
        render_text(own, USER)
    monkeypatch.undo()
    assert "hi" in render_text(own, USER), "the next one does not suffer"


def test_a_conversation_that_changes_anywhere_is_rendered_as_it_is_now(own, monkeypatch):
    """Whatever was rendered before it, refused, changed in place or lost."""
    chance, content = random.Random(0), [{"type": "text", "text": "x"}]
    kinds = ["a", "bb", "bb ", 1, 1.0, True, None, "\ud800", "é\n", content]
    talk = []
    for n in range(300):
        step = chance.choice(["add", "add", "add", "cut", "change", "mutate", "lose"])
        at = chance.randrange(len(talk)) if talk else 0
        message = {"role": chance.choice(["user", "assistant"]), "content": chance.choice(kinds), "n": n % 3}
        if step == "cut":
            talk = talk[:at]
        elif step == "change":
            talk = [*talk[:at], message, *talk[at + 1 :]]
        elif step == "mutate":
            content[0]["text"] += "y"
        elif step == "lose":
            templates._worker._process.kill()
            templates._worker._process.wait()
        else:
            talk = [*talk, message]
        refused = chance.random() < 0.2
        template = "{{ raise_exception('no') }}" if refused else "{% for m in messages %}{{ m }}|{% endfor %}"
        monkeypatch.setattr(own._tokenizer, "chat_template", template)
        asked = [message] if refused else talk
        said = [{k: v for k, v in m.items() if v is not None} for m in asked]
        assert ours(own, asked) == (None if refused or not asked else "".join(f"{m}|" for m in said))


def test_what_is_the_same_crosses_the_pipe_once(own, monkeypatch):
    talk = [{"role": "user", "content": "word " * 2000}] * 30
    render_text(own, talk)
    process, crossed = templates._worker._process, []
    with monkeypatch.context() as patch:
        patch.setattr(process, "stdin", Counted(process.stdin, crossed))
        patch.setattr(process, "stdout", Counted(process.stdout, crossed))
        for n in range(10):
            text = render_text(own, [*talk[: 30 - n], {"role": "user", "content": "else"}])
            assert len(text) > 10_000 * (30 - n)
    assert len(crossed) == 20
    assert sum(crossed) < 10 * (2000 + len(own.chat_template) * 2)


class Counted:
    """A pipe, which notes how much crosses it."""

    def __init__(self, pipe, crossed):
        self.pipe, self.crossed = pipe, crossed

    def write(self, text):
        self.crossed.append(len(text)) if text != "\n" else None
        return self.pipe.write(text)

    def readline(self):
        text = self.pipe.readline()
        self.crossed.append(len(text))
        return text

    def flush(self):
        self.pipe.flush()


def test_reserved_names_are_no_options(own):
    with pytest.raises(TokenizerError, match="messages is no option"):
        render_text(own, USER, template_options={"messages": []})


def test_a_lost_process_is_started_again(own):
    wanted = render_text(own, USER)
    templates._worker._process.send_signal(signal.SIGKILL)
    templates._worker._process.wait()
    assert render_text(own, USER) == wanted


def test_an_interruption_leaves_no_answer_for_the_next(own, monkeypatch):
    wanted = render_text(own, USER)

    class Interrupted:
        """Standard output of the process, whose reader is interrupted."""

        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            pass

    with monkeypatch.context() as patch, templates._worker._process.stdout:
        patch.setattr(templates._worker._process, "stdout", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            render_text(own, [{"role": "user", "content": "other"}])
    assert render_text(own, USER) == wanted


def test_a_fork_starts_its_own(own):
    wanted, parent = render_text(own, USER), templates._worker._process.pid
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            same = render_text(own, USER) == wanted and templates._worker._process.pid != parent
            os.write(writer, b"1" if same else b"0")
        finally:
            templates._worker._process.kill()
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    os.close(reader)
    os.close(writer)
    assert render_text(own, USER) == wanted


def test_many_threads_get_their_own_answers(own):
    found = {}

    def ask(n):
        found[n] = render_text(own, [{"role": "user", "content": f"number {n}."}])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"number {n}." in text for n, text in found.items())
    assert len(found) == 8
