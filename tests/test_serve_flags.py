"""The flags of mlx_lm.server reach the server, and what they stand for happens."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from ring_mlx.cli import build_parser, main, serve_command
from ring_mlx.cli.serve_options import LOG_LEVELS
from ring_mlx.engine.events import End, Sampling
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.scheduler import Scheduler
from ring_mlx.errors import OptionError
from ring_mlx.serve.protocol import parse_chat
from tests.serving import send, user
from tests.test_snapshots import snapshot


def parsed(*argv):
    return build_parser().parse_args(["serve", *argv])


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--decode-concurrency", "3"], "max_batch", 3),
        (["--prompt-concurrency", "2"], "max_reading", 2),
        (["--prompt-cache-size", "4"], "max_snapshots", 4),
        (["--prompt-cache-bytes", "1.5G"], "memory_budget_bytes", 1_500_000_000),
        (["--chat-template", "x"], "chat_template", "x"),
        (["--chat-template", ""], "chat_template", None),
        (["--chat-template-args", '{"a": 1}'], "template_options", {"a": 1}),
        (["--adapter-path", "a"], "adapter_path", "a"),
        (["--top-k", "5", "--min-p", "0.1"], "sampling", Sampling(top_k=5, min_p=0.1)),
        (
            ["--temperature", "0.2", "--repetition-penalty", "1.1", "--seed", "3"],
            "sampling",
            Sampling(temp=0.2, repetition_penalty=1.1, seed=3),
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_flag_is_a_setting(argv, name, value):
    assert getattr(serve_command.make_settings(parsed(*argv)), name) == value


@pytest.mark.parametrize(
    "argv", [["--prompt-concurrency", "0"], ["--prompt-cache-size", "-1"], ["--log-level", "LOUD"]]
)
def test_a_value_that_is_none(argv, capsys):
    with pytest.raises(SystemExit) as e:
        parsed(*argv)
    assert e.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_the_server_says_itself_is_no_template_option():
    with pytest.raises(OptionError, match="has 'messages', which the server itself says"):
        serve_command.make_settings(parsed("--chat-template-args", '{"messages": []}'))


def test_a_system_prompt_for_conversations_without_one(tmp_path, serve):
    file = tmp_path / "system.txt"
    file.write_text("Be brief.\n", encoding="utf-8")
    assert serve_command.make_settings(parsed("--system-prompt", str(file))).system_prompt == "Be brief."
    with pytest.raises(OptionError, match=r"no\.txt cannot be read"):
        serve_command.make_settings(parsed("--system-prompt", str(tmp_path / "no.txt")))
    server = serve(system_prompt="Be brief.")
    for before, expected in ([], "Be brief."), ([{"role": "system", "content": "Be long."}], "Be long."):
        request = parse_chat({"messages": [*before, *user("x")]}, Sampling())
        server.models.first.engine.prepare(request)
        assert request.prompt == [{"role": "system", "content": expected}, *user("x")]
    responses = {"input": "x", "instructions": "Be odd."}
    assert send(server, "POST", "/v1/responses", responses)[0] == 200


def test_log_levels(monkeypatch, capsys):
    def odd(args, key):
        warnings.warn("odd", stacklevel=2)
        return 0

    monkeypatch.setattr(serve_command, "_serve", odd)
    for level in LOG_LEVELS:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(["serve", "--log-level", level]) == 0
        assert ("odd" in capsys.readouterr().err) == (level not in ("ERROR", "CRITICAL"))
    made = []
    monkeypatch.setattr("ring_mlx.cli.serve_command.Server", lambda *_, **options: made.append(options["log_requests"]))
    for argv in ([], ["--log-requests"], *(["--log-level", level] for level in LOG_LEVELS)):
        serve_command.make_server(parsed(*argv), None)
    assert made == [False, True, True, True, False, False, False]


def test_a_template_and_its_options(serve):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}|{{ mode }}|{{ add_generation_prompt }}"
    engine = serve(chat_template=template, template_options={"mode": "calm"}).engine
    body = {"messages": user("hi")}
    assert engine.prepare(parse_chat(body, Sampling())).prepared.prompt.text == "hi|calm|True"
    body["chat_template_kwargs"] = {"mode": "loud"}
    assert engine.prepare(parse_chat(body, Sampling())).prepared.prompt.text == "hi|loud|True"


@pytest.mark.parametrize("template", ["{{", "{{ raise_exception('no') }}", "{{ messages[0].x.y }}"])
def test_a_template_that_cannot_be_used_ends_the_server_in_a_line(template, capsys):
    assert main(["serve", "--no-store", "--port", "0", "--chat-template", template]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "note:" not in line]
    assert line.startswith("ring-mlx: [tokenizer] the chat template")


def test_so_many_prompts_are_read_at_once(serve, monkeypatch):
    reading, admit = [], Scheduler.admit

    def noted(self, job):
        reading.append(len(self._reading))
        admit(self, job)

    monkeypatch.setattr(Scheduler, "admit", noted)
    for most, seen in ((1, {0}), (2, {0, 1})):
        reading.clear()
        engine = serve(max_reading=most, prefill_step_tokens=4, max_snapshots=3, store=False).engine
        body = {"messages": user("one two three four " * 9), "max_tokens": 1}
        jobs = [engine.prepare(parse_chat(body, Sampling(seed=n))) for n in range(4)]
        with engine._changed:  # all are there when the first is admitted
            for job in jobs:
                engine.submit(job)
        for job in jobs:
            while not isinstance(job.events.get(timeout=60), End):
                pass
        assert set(reading) == seen


def test_so_many_snapshots_are_kept(server):
    settings = replace(server.engine.settings, max_snapshots=2)
    tree = LoadedModel(server.engine.loaded.model, None, settings).tree()
    for i in range(5):
        tree.add(snapshot([i]))
    assert len(tree) == 2
