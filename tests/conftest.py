"""Fixtures that many tests share."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import uuid
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

import tui.chat
from demo.tokenizer import write_tokenizer
from ring_mlx import demo_model_path, load, mlx_lm_plugin
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.metrics import Metrics
from ring_mlx.serve.engine import Engine, Settings
from ring_mlx.serve.server import Server
from ring_mlx.system import macos
from tests.tiny import config, save_hf

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def pytest_configure(config):
    """Give each run a temporary folder of its own: those that pytest numbers are cleaned by all runs on a machine.

    Commands show no progress, which comes after some seconds: whether it comes would depend on the machine. What was seen
    of this machine is neither read nor kept, and nothing is timed at a load.
    """
    os.environ["RING_MLX_PROGRESS"] = "0"
    os.environ["RING_MLX_MACHINE"] = "off"
    os.environ["RING_MLX_TUNE"] = "off"
    if config.option.basetemp is None:
        folder = tempfile.TemporaryDirectory(prefix="ring-tests-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        config.option.basetemp = f"{folder.name}/t"


def pytest_collection_finish(session):
    """Collect garbage seldom, and never walk over what stays: it took a fifth of the time of a test of the chat."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_xdist_auto_num_workers(config):
    """Two workers more than there are cores: a tenth of the time tests wait for processes, time-outs and screens."""
    return (os.cpu_count() or 1) + 2


@pytest.fixture(autouse=True)
def calm(monkeypatch, tmp_path_factory):
    """No test finds another's snapshots; a Mac that is short of memory drops snapshots, which tests count.

    A chat in a test's process does not end that process where its model is slow to rest.
    """
    monkeypatch.setattr(tui.chat, "os", SimpleNamespace(_exit=lambda code: None))
    monkeypatch.setenv("RING_MLX_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"))
    if sys.platform == "darwin":
        monkeypatch.setattr(macos, "memory_pressure", lambda: None)


@pytest.fixture(scope="session")
def vocabulary():
    """Size of the demo tokenizer's vocabulary."""
    return 1024


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory, vocabulary):
    """A random checkpoint with the demo tokenizer: any output, real text handling."""
    folder = tmp_path_factory.mktemp("chat") / "ring-random"
    raw = config(vocab_size=vocabulary, eos_token_id=1, max_position_embeddings=2048)
    save_hf(folder, raw)
    for name in TOKENIZER_FILES:
        if (demo_model_path() / name).is_file():
            shutil.copy(demo_model_path() / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def chat(chat_folder):
    """The model and tokenizer of `chat_folder`."""
    return load(chat_folder)


@pytest.fixture
def registered():
    """mlx-lm knows our models meanwhile."""
    mlx_lm_plugin.register()
    yield
    mlx_lm_plugin.unregister()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """The demo's tokenizer, freshly trained."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def count_tokens(tokenizer):
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def toy():
    """The packaged model and its tokenizer."""
    return load(demo_model_path())


@pytest.fixture
def serve(tmp_path):
    """Starts servers on free ports."""
    made = []

    def start(api_key=None, max_body_bytes=100_000, **settings):
        options = {"model": demo_model_path(), "name": "toy", "store": tmp_path / "store", "read_ahead": False}
        server = Server(Settings(**(options | settings)), port=0, api_key=api_key, max_body_bytes=max_body_bytes)
        server.start()
        made.append(server)
        assert server.engine.wait_until_loaded(30)
        return server

    yield start
    for server in made:
        assert server.close()


@pytest.fixture
def engine(chat):
    """Makes engines, without a server, for the model of `chat`."""
    made = []

    def make(**settings):
        options = {"model": "toy", "name": "toy", "store": False, "read_ahead": False}
        made.append(
            Engine(Settings(**(options | settings)), Metrics(), lambda given, progress: LoadedModel(*chat, given))
        )
        assert made[-1].wait_until_loaded(30)
        return made[-1]

    yield make
    assert all(one.close() for one in made)


@pytest.fixture
def server(serve):
    """One with default settings."""
    return serve()
