"""``--decay-layer-offset``: it reaches the model through every door, and no state is used under another formula."""

from __future__ import annotations

import mlx.core as mx
import pytest

from ring_mlx import Session, load, load_model
from ring_mlx.cli import bench_command, build_parser, from_options, main, serve_command
from ring_mlx.cli.exit_codes import CUT_OFF
from ring_mlx.convert import Options, convert_plan
from ring_mlx.distributed.loading import load_sharded
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.errors import OptionError, RingError
from ring_mlx.model.config_values import DECAY_OFFSETS
from ring_mlx.model.decay import decay_rate
from tests.sessions import DirectSession, Talk
from tests.sessions import options as session_options
from tests.test_docs import leaves
from tests.tiny import config, save_hf, softmax_config
from tui import chat
from tui.answering import SessionSource
from tui.messages import ModelChoice


def is_under(model, offset):
    """Whether every linear layer forgets by the formula."""
    c = model.config
    rates = [decay_rate(c.num_attention_heads, i, c.num_hidden_layers, offset) for i in range(2)]
    found = [layer.attention.decay_rate for layer in model.layers[:2]]
    return all(map(mx.array_equal, found, rates)) and c.decay_layer_offset == offset


def test_every_command_that_loads_a_model_takes_it():
    commands = dict(leaves(build_parser()))
    loading = {path[0]: p for path, p in commands.items() if "--revision" in p._option_string_actions}
    assert set(loading) == {"generate", "chat", "serve", "eval", "bench", "cache-prompt", "convert", "doctor"}
    for parser in loading.values():
        said = [parser._option_string_actions["--decay-layer-offset"].type(text) for text in ("0", "-1", "clamped")]
        assert said == list(DECAY_OFFSETS)
        assert list(map(type, said)) == [int, int, str]


def test_a_value_that_is_none_of_them_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["generate", "--decay-layer-offset", "1"])
    assert "'1' is not 0 or -1 or clamped" in capsys.readouterr().err


def test_it_comes_before_the_key_at_every_door(chat_folder, tmp_path):
    save_hf(tmp_path, config(decay_layer_offset="clamped"))
    assert is_under(load_model(tmp_path), "clamped")
    for offset in DECAY_OFFSETS:
        assert is_under(load_model(tmp_path, decay_layer_offset=offset), offset)
    args = build_parser().parse_args(["bench", "--model", str(tmp_path), "--decay-layer-offset", "-1"])
    model, _, name = bench_command._checkpoint(args, None)
    assert is_under(model, -1)
    assert name.endswith(", decay_layer_offset -1")
    args = build_parser().parse_args(["bench", "--random", "golden", "--decay-layer-offset", "-1"])
    assert bench_command._random(args, None)[0].config.decay_layer_offset == -1
    args = build_parser().parse_args(["serve", "--model", str(chat_folder), "--decay-layer-offset", "-1"])
    assert is_under(LoadedModel.load(serve_command.make_settings(args)).model, -1)
    args = build_parser().parse_args(["eval", "--model", str(chat_folder), "--decay-layer-offset", "-1"])
    assert is_under(from_options.load_named(args)[0], -1)


def test_a_rank_takes_it(tmp_path):
    save_hf(tmp_path, config())
    alone = mx.distributed.init(strict=False)
    for mode in ("tensor", "pipeline"):
        assert is_under(load_sharded(tmp_path, alone, mode, decay_layer_offset=-1), -1)


def test_the_chat_hands_it_to_its_session(monkeypatch, chat_folder, tmp_path):
    monkeypatch.setenv("RING_MLX_CACHE", str(tmp_path))
    chosen = []

    class Source(Exception):
        pass

    def stop(choice):
        chosen.append(choice)
        raise Source

    monkeypatch.setattr("tui.chat.Engine", stop)
    monkeypatch.setattr("tui.paths.config_file", lambda: tmp_path / "config.toml")
    arguments = ["chat", "--plain", "--model", str(chat_folder), "--decay-layer-offset", "clamped"]
    with pytest.raises(Source):
        chat.run(build_parser().parse_args(arguments))
    assert chosen == [ModelChoice(str(chat_folder), thinking=chosen[0].thinking, decay_layer_offset="clamped")]
    marks = set()
    for choice in (*chosen, ModelChoice(str(chat_folder))):
        source = SessionSource(choice, lambda message: None)
        marks.add(source._session.wait_until_loaded().fingerprint)
        source.close()
    assert len(marks) == 2


def test_a_file_of_cache_prompt_is_refused_under_another_formula(capsys, chat_folder, tmp_path):
    file, model = str(tmp_path / "read.safetensors"), ["--model", str(chat_folder)]
    under = ["--decay-layer-offset", "-1"]
    assert main(["cache-prompt", *model, "--prompt", "Quiet.", "--prompt-cache-file", file, *under]) == 0
    ask = ["generate", *model, "--prompt-cache-file", file, "--prompt", "Why?", "--max-tokens", "2", "--seed", "0"]
    capsys.readouterr()
    for other in ([], ["--decay-layer-offset", "clamped"]):
        assert main([*ask, *other]) == 2
        assert "another model" in capsys.readouterr().err
    assert main([*ask, *under]) == CUT_OFF


def test_snapshots_on_disk_are_not_used_under_another_formula(chat_folder, tmp_path):
    reused = []
    for offset in (None, -1, "clamped", 0, -1):
        worker = DirectSession.load(session_options(model=chat_folder, store=tmp_path, decay_layer_offset=offset))
        statistics, *_ = Talk(worker, max_tokens=2).ask([{"role": "user", "content": "Tell me of 3 ships. " * 9}])
        reused.append(statistics.reused_tokens > 0)
        worker.save()
    assert reused == [False, False, False, True, True], "0 is what holds where nobody says anything"


def test_a_server_keeps_snapshots_of_each_formula_apart(chat_folder, tmp_path):
    folders = set()
    for offset in ("0", "-1", "clamped"):
        words = ["serve", "--model", str(chat_folder), "--cache-dir", str(tmp_path), "--decay-layer-offset", offset]
        parts = LoadedModel.load(serve_command.make_settings(build_parser().parse_args(words)))
        folders.add(parts.store().folder)
    assert len(folders) == 3


@pytest.mark.parametrize("value", [1, "0", True, -1.0, [], "Clamped"])
def test_what_is_no_formula_is_refused_in_words_for_an_option(chat_folder, value):
    for door in (load, load_model):
        with pytest.raises(OptionError, match=r"decay_layer_offset .* is not 0 or -1 or 'clamped'; choose one\."):
            door(chat_folder, decay_layer_offset=value)
    with (
        Session(chat_folder, store=False, decay_layer_offset=value) as session,
        pytest.raises(RingError, match="is not"),
    ):
        session.wait_until_loaded()


def test_a_model_without_linear_layers_has_no_formula_to_choose(tmp_path):
    save_hf(tmp_path, softmax_config())
    with pytest.raises(OptionError, match="'bailing_moe_v2' has none; leave it out"):
        load_model(tmp_path, decay_layer_offset=0)
    with pytest.raises(OptionError, match="'bailing_moe_v2' has none; leave it out"):
        convert_plan(tmp_path, Options(decay_layer_offset=-1))
