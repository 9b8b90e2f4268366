"""Chat templates in a process of their own: the same text as in this one, and an end whatever they do."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from ring_mlx import demo_model_path, templates
from ring_mlx.errors import TokenizerError
from ring_mlx.tokenizer import load_tokenizer, render_text

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
