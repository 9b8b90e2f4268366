"""Several models of one server: loaded on demand, once, in turns, and let go."""

from __future__ import annotations

import shutil
import threading
import time

import pytest

from ring_mlx import demo_model_path
from ring_mlx.cli import build_parser
from ring_mlx.cli.serve_command import make_settings
from ring_mlx.cli.served_models import aliases_of, keep_s_of, served_models
from ring_mlx.errors import OptionError
from ring_mlx.model import memory
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.models import Served
from ring_mlx.serve.server import Server
from tests.serving import CHAT, endless, metric, send, start_stream, user, wait_until


@pytest.fixture
def folder(tmp_path):
    """Two toys of different names, and what is no model."""
    for name in ("one", "two", "org/three"):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(demo_model_path())
    (tmp_path / "models" / "empty").mkdir()
    (tmp_path / "models" / ".hidden").symlink_to(demo_model_path())
    return tmp_path / "models"


@pytest.fixture
def several(folder):
    """Starts servers of these models."""
    made = []

    def start(*names, aliases=None, keep_s=None, **more):
        settings = {"store": folder.parent / "store", "read_ahead": False, "max_tokens": 3, **more}
        served = [Served(Settings(model=folder / name, name=name, **settings)) for name in names or ("one", "two")]
        made.append(Server(served, port=0, aliases=aliases, keep_s=keep_s))
        made[-1].start()
        return made[-1]

    yield start
    for server in made:
        assert server.close()


def ask(server, model, text="What is 1 + 1?", **more):
    body = {"messages": user(text), "temperature": 0, "max_tokens": 3} | ({"model": model} if model else {}) | more
    return send(server, "POST", CHAT, body)


def loads(server, name):
    return metric(server, f'model_loads_total{{model="{name}"}}')


@pytest.fixture
def room_for_one(several, monkeypatch):
    """A server with memory for one of its models, which is loaded."""
    server = several("one", "two", "org/three")
    before = memory.active_bytes()
    assert ask(server, "one")[0] == 200
    engine = server.models.all["one"].engine
    room = before + engine.held_bytes + memory.extra_bytes(engine.loaded.model.config) + engine.loaded.weight_bytes // 2
    monkeypatch.setattr(memory, "budget_bytes", lambda: room)
    return server


def test_models_are_loaded_when_they_are_asked_for(several):
    server = several(aliases={"gpt-5": "two"})
    assert metric(server, "models_loaded") == 0
    listed = send(server, "GET", "/v1/models")[2]["data"]
    assert [m["id"] for m in listed] == ["one", "two", "gpt-5"]
    assert ask(server, None)[2]["model"] == "one"
    assert (loads(server, "one"), loads(server, "two")) == (1, 0)
    threads = [threading.Thread(target=ask, args=(server, "two")) for _ in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert ask(server, "gpt-5")[2]["model"] == "gpt-5"
    assert (loads(server, "two"), metric(server, "models_loaded")) == (1, 2)
    status, _, answer = ask(server, "three")
    assert status == 404
    assert "here are 'one', 'two', 'gpt-5'" in answer["error"]["message"]
    assert send(server, "GET", "/v1/models/gpt-5")[2]["id"] == "gpt-5"


def test_any_name_can_be_an_alias(several):
    server = several("one", "two", aliases={"*": "two"})
    assert ask(server, "claude-haiku")[2]["model"] == "two"
    assert ask(server, "one")[2]["model"] == "one"


def test_the_one_that_was_used_least_recently_makes_room(room_for_one):
    server = room_for_one
    assert ask(server, "two")[0] == 200
    assert server.models.all["one"].state == "unloaded"
    assert metric(server, "models_loaded") == 1
    again = ask(server, "one")[2]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0  # its snapshots were saved, and are its own
    assert loads(server, "one") == 2


def test_a_model_in_use_stays_and_others_take_turns(room_for_one, toy):
    server, order = room_for_one, []
    stream = start_stream(server, endless(toy) | {"model": "one"})
    wait_until(lambda: server.models.all["one"].users == 1)
    generated = metric(server, "generated_tokens_total")

    def wait_for(name):
        assert ask(server, name)[0] == 200
        order.append(name)

    threads = [threading.Thread(target=wait_for, args=("two",))]
    threads[0].start()
    wait_until(lambda: server.models.all["one"].leaving)
    threads.append(threading.Thread(target=wait_for, args=("one",)))
    threads[1].start()
    wait_until(lambda: metric(server, "generated_tokens_total") > generated + 10)
    assert (server.models.all["one"].users, order) == (1, [])
    stream.close()
    for t in threads:
        t.join(60)
    assert order == ["two", "one"]


def test_a_client_that_waits_for_a_model_can_leave(room_for_one, toy):
    server = room_for_one
    stream = start_stream(server, endless(toy) | {"model": "one"})
    wait_until(lambda: server.models.all["one"].users == 1)
    waits = start_stream(server, endless(toy) | {"model": "two"})
    wait_until(lambda: server.models.all["one"].leaving)
    waits.close()
    wait_until(lambda: server.models.all["two"].engine is None)
    wait_until(lambda: not server.models.all["one"].leaving)
    assert ask(server, "one")[0] == 200
    stream.close()
    assert loads(server, "two") == 0


def test_many_clients_that_switch_models_are_all_answered(room_for_one):
    server, found = room_for_one, []

    def client(number):
        for n in range(2):
            name = ("one", "two", "org/three")[(number + n) % 3]
            status, _, answer = ask(server, name, f"What is {number} + 1?")
            found.append((status, answer.get("model") == name))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [(200, True)] * 32
    assert sum(loads(server, name) for name in server.models.all) < 16
    assert metric(server, "models_loaded") == 1


def test_a_checkpoint_that_is_broken_ends_nothing(several, folder, capfd):
    (folder / "two").unlink()
    shutil.copytree(demo_model_path(), folder / "two")
    weights = folder / "two" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    server = several()
    for _ in range(2):
        status, _, answer = ask(server, "two")
        assert status == 500
        assert "'two' cannot be loaded: [weights]" in answer["error"]["message"]
    assert ask(server, "one")[0] == 200
    assert "[serve] two cannot be loaded: [weights]" in capfd.readouterr().err
    weights.write_bytes(whole)
    assert ask(server, "two")[0] == 200


def test_a_model_that_cannot_fit_says_so_in_numbers(several, monkeypatch):
    server = several()
    monkeypatch.setattr(memory, "budget_bytes", lambda: 100_000_000)
    status, _, answer = ask(server, "two")
    assert (status, answer["error"]["code"]) == (400, "model_does_not_fit")
    assert "this machine can give 0.1 GB" in answer["error"]["message"]


def test_a_model_that_nobody_uses_is_let_go(several):
    server = several("one", keep_s=0.2)
    assert ask(server, "one")[0] == 200
    wait_until(lambda: metric(server, "models_loaded") == 0, 10)
    assert ask(server, None)[0] == 200
    assert loads(server, "one") == 2


def test_threads_are_used_again(several):
    server = several("one", keep_s=0.0)
    for _ in range(3):
        assert ask(server, "one")[0] == 200
        wait_until(lambda: server.models.all["one"].engine is None, 10)
    names = [t.name for t in threading.enumerate()]
    before = names.count("ring-mlx model")
    assert ask(server, "one")[0] == 200
    assert [t.name for t in threading.enumerate()].count("ring-mlx model") == before


def test_a_server_that_closes_while_a_model_is_loaded(several, monkeypatch):
    server, found = several(), []
    monkeypatch.setattr("ring_mlx.serve.models.LoadedModel.load", lambda o, progress, claim: stuck(progress))

    def stuck(progress):
        while True:
            progress(0, 0)
            time.sleep(0.01)

    t = threading.Thread(target=lambda: found.append(ask(server, "one")[0]))
    t.start()
    wait_until(lambda: server.models.all["one"].state == "loading")
    assert server.models.close()
    t.join(10)
    assert found == [503]


def options(*argv):
    args = build_parser().parse_args(["serve", *map(str, argv)])
    served = served_models(args, make_settings(args))
    return served, aliases_of(args, served), keep_s_of(args, served)


def test_a_folder_of_models(folder, capsys):
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    served, aliases, keep_s = options("--model", folder, "--alias", "gpt-5=one")
    assert [one.name for one in served] == ["one", "org/three", "two"]
    assert served[0].context_tokens == 8192
    assert (aliases, keep_s) == ({"gpt-5": "one"}, 300)
    assert "broken is left out: [config]" in capsys.readouterr().err


def test_one_model_stays_as_it_is_called():
    served, aliases, keep_s = options()
    assert ([one.name for one in served], aliases, keep_s) == (["ring-nano"], {}, None)
    assert options("--keep", "5m", "--model", "owner/name")[2] == 300
    assert options("--keep", "-1", "--model", "a/b", "--model", "c/d")[2] is None


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--model", "other/../one", "--model", "one"], "are both called 'one'; give --model-name once for each"),
        (["--model", "one", "--model-name", "a", "--model-name", "b"], "2 times for 1 models"),
        (["--model", "one", "--alias", "a=b", "--alias", "b=a"], "no model is called 'b'; give one of one"),
        (["--model", "one", "--model", "two", "--alias", "one=two"], "'one' stands for another model already"),
        (["--model", "one", "--model", "two", "--alias", "x=two", "--alias", "x=one"], "'x' stands for another"),
        (["--model", "one", "--alias", "x"], "is not ALIAS=MODEL, such as gpt-5=one"),
        (["--model", "one", "--model", "two", "--revision", "x"], "--revision belongs to one model"),
        (["--model", "empties"], "no folder in .* has a checkpoint"),
    ],
)
def test_names_that_do_not_go_together(more, match, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "other").mkdir()
    (folder / "empties" / "x").mkdir(parents=True)
    (folder / "empties" / "x" / "config.json").write_text("[]")
    with pytest.raises(OptionError, match=match):
        options(*more)


@pytest.mark.parametrize("text", ["", "5 days", "-2", "m"])
def test_what_is_no_duration(text, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--keep", text])
    assert "duration" in capsys.readouterr().err
