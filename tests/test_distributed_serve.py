"""`ring-mlx serve` in several processes on loopback answers as one process does, and all end together."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from ring_mlx import demo_model_path
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.model_thread import ModelLostError
from ring_mlx.errors import RingError
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.server import Server
from tests.conftest import TOKENIZER_FILES
from tests.serving import user
from tests.test_distributed import FOUR, ROOT, free_ports, ranks, running
from tests.tiny import config, save_hf

SUMS = ("What is 27 + 35?", "What is 8 + 9?", "Which is larger, 41 or 17?")
# Less than a tenth of what the questions leave behind, so that snapshots are dropped on the way.
FEW_BYTES = 100_000


def open_answer(port, **body):
    data = json.dumps({"temperature": 0, "max_tokens": 12} | body).encode()
    url = f"http://127.0.0.1:{port}/v1/{'chat/completions' if 'messages' in body else 'completions'}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def ask(port, **body):
    """What is said and why it ends, and how many tokens were known."""
    with open_answer(port, **body) as answer:
        found = json.load(answer)
    (choice,) = found["choices"]
    said = choice.get("message") or choice["text"]
    return (said, choice["finish_reason"]), found["usage"]["prompt_tokens_details"]["cached_tokens"]


def leave(port):
    """Ask for a long answer and go after its first words."""
    bias = dict.fromkeys(map(str, range(16)), -100)
    with open_answer(port, messages=user("Spell cat."), max_tokens=2000, stream=True, logit_bias=bias) as answer:
        for _ in range(6):
            answer.readline()


def talk(port):
    """Everything that a test asks for: one after the other, several at once, one that leaves, one from its cache."""
    found = []
    first, _ = ask(port, messages=user(SUMS[0]))
    turn = {"role": "assistant", "content": "The sum is 62."}
    again, known = ask(port, messages=user("And twice that?", user(SUMS[0])[0], turn))
    assert known > 0
    leaving = threading.Thread(target=leave, args=(port,))
    leaving.start()
    with ThreadPoolExecutor(3) as pool:
        found += pool.map(lambda text: ask(port, messages=user(text))[0], SUMS)
    leaving.join()
    found.append(ask(port, prompt="What is 3 + 4?", stop=["1"])[0])
    found.append(ask(port, messages=user(SUMS[1]), top_logprobs=1, logprobs=True, thinking_budget=3)[0])
    found.append(ask(port, messages=user("word " * 150), max_tokens=4)[0])
    return [first, again, *found]


def chatting(folder, vocabulary, **changes):
    """A random model that four ranks can share, with the toy's tokenizer."""
    sizes = FOUR | {"vocab_size": vocabulary, "eos_token_id": 1, "max_position_embeddings": 2048}
    save_hf(folder, config(**sizes | changes))
    for name in TOKENIZER_FILES:
        shutil.copy(demo_model_path() / name, folder / name)
    return folder


@contextlib.contextmanager
def serving(tmp_path, size, mode, *options):
    """Ranks that serve, the port, and rank 0's lines once it is ready."""
    (port,) = free_ports(1)
    words = ("serve", "--port", port, "--distributed", mode, "--prefill-step-size", 64, *options)
    with ranks(tmp_path, size, *words, module="ring_mlx", stdout=subprocess.PIPE) as processes:
        said = [processes[0].stdout.readline() for _ in range(2)]
        assert said[1:] == ["ready; Ctrl-C ends it\n"], (said, [p.stderr.read() for p in processes])
        yield processes, port


def last_event(answer):
    """What a stream says last, whether or not it ends as it should."""
    try:
        lines = answer.read().split(b"\n\n")
    except http.client.IncompleteRead as e:
        lines = e.partial.split(b"\n\n")
    return b"".join(lines[-3:])


def one_process(folder, asks):
    server = Server(Settings(folder, "toy", store=False, prefill_step_tokens=64), port=0)
    server.start()
    try:
        assert server.engine.wait_until_loaded(30)
        return asks(server.server_port)
    finally:
        server.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory, vocabulary):
    """A random model of few layers: each layer waits for all ranks, and where they wait they keep a core busy."""
    return chatting(tmp_path_factory.mktemp("small"), vocabulary, num_hidden_layers=4)


@pytest.fixture(scope="module")
def alone(small):
    """What one process says."""
    return one_process(small, talk)


@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_two_processes_answer_as_one(tmp_path, small, alone, mode):
    with serving(tmp_path, 2, mode, "--model", small, "--cache-memory", FEW_BYTES) as (processes, port):
        assert talk(port) == alone
        processes[0].send_signal(signal.SIGTERM)
        said = [p.communicate(timeout=20) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert said[1] == ("", "")


def test_a_pipeline_of_four_answers_as_one(tmp_path, vocabulary):
    folder = chatting(tmp_path / "four", vocabulary)

    def asks(port):
        with ThreadPoolExecutor(2) as pool:
            return [a for a, _ in pool.map(lambda text: ask(port, messages=user(text), max_tokens=6), SUMS[:2])]

    with serving(tmp_path, 4, "pipeline", "--model", folder) as (_, port):
        assert asks(port) == one_process(folder, asks)


@pytest.mark.parametrize(
    ("victim", "how"),
    [(0, "answering"), (1, "answering"), pytest.param(1, "frozen", marks=pytest.mark.slow), (1, "idle")],
)
def test_a_lost_rank_ends_the_others(tmp_path, small, victim, how):
    with serving(tmp_path, 2, "tensor", "--model", small) as (processes, port), contextlib.ExitStack() as stack:
        if how != "idle":
            bias = dict.fromkeys(map(str, range(16)), -100)
            body = {"messages": user("Spell cat."), "max_tokens": 1900, "stream": True, "logit_bias": bias}
            answer = stack.enter_context(open_answer(port, **body))
            assert answer.readline()
        processes[victim].send_signal(signal.SIGSTOP if how == "frozen" else signal.SIGKILL)
        started = time.monotonic()
        if victim and how != "idle":
            assert b'"error"' in last_event(answer)
        _, said = processes[1 - victim].communicate(timeout=30)
        assert time.monotonic() - started < 10
        assert processes[1 - victim].returncode not in (0, None)
    assert f"[distributed] rank {victim} (" in said
    assert ("is silent" if how == "frozen" else "is gone") in said
    assert "Traceback" not in said


def test_ending_the_launcher_ends_all():
    port, first, _ = free_ports(3)
    launch = ("launch", "-n", "2", "--starting-port", str(first), "--no-check")
    command = [sys.executable, "-m", "ring_mlx", *launch, "serve", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert [p.stdout.readline() for _ in range(2)][1] == "ready; Ctrl-C ends it\n"
        p.terminate()
        _, said = p.communicate(timeout=20)
    assert p.returncode == 130
    assert [line for line in said.splitlines() if " note: " not in line] == []
    assert not [text for _, text in running() if f"serve --port {port}" in text]


def test_a_model_that_is_lost_is_no_failure_of_one_request():
    lost = RingError("all ranks end")

    class Broken(LoadedModel):
        def batch(self):
            batch = super().batch()
            batch.step = self.fail
            return batch

        def fail(self):
            raise ModelLostError(lost)

    server = Server(Settings(demo_model_path(), "toy", store=False), port=0, load=Broken.load)
    server.start()
    assert server.engine.wait_until_loaded(30)
    with pytest.raises(urllib.error.HTTPError) as e:
        ask(server.server_port, messages=user(SUMS[0]))
    assert e.value.code == 503
    e.value.close()
    assert server.engine.failure is lost
    assert server.close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--cache-dir", "x"), "--cache-dir does not work in several processes: snapshots are kept in memory only"),
        (("--expert-cache-bytes", "1MB"), "--expert-cache-bytes does not work in several processes"),
        (("--host", "192.0.2.1"), "192.0.2.1:0 cannot be listened on"),
    ],
)
def test_what_does_not_work_is_said_by_rank_0_alone(tmp_path, options, why):
    with ranks(tmp_path, 2, "serve", "--port", 0, *options, module="ring_mlx") as processes:
        said = [p.communicate(timeout=30)[1] for p in processes]
    assert processes[0].returncode == 2
    assert processes[1].returncode != 0
    lines = [line for line in said[0].splitlines() if " note: " not in line]
    assert len(lines) == 1
    assert why in lines[0]
    assert "Traceback" not in said[1]
