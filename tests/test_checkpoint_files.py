"""Files of a checkpoint that are no files, too long, or no JSON that Python can hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ring_mlx.convert.writer import read_manifest
from ring_mlx.errors import ConfigError, ConvertError, TokenizerError
from ring_mlx.system.regular_files import (
    MAX_VALUES,
    check_small_files,
    is_inside,
    open_regular,
    parse_object,
    read_bounded,
)
from tui.models import found_models


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 100_000, "too deeply"),
        (b'{"a":' * 100_000, "too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        (b'{"\\ud800": 1}', "surrogates"),
        (b'{"a": "\\udc00\\ud800"}', "surrogates"),
        (b"\xff\xfe{}", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[]", "holds a list"),
        (b"", "not valid JSON"),
        (b'{"a": [' + b"1," * MAX_VALUES + b"1]}", "more than"),
    ],
)
def test_json_that_is_refused(data, said):
    with pytest.raises(ConfigError, match=said):
        parse_object(data, "a file")


def test_json_that_is_read():
    given = {"a": [1.5, -7, None, True, "\U0001f600", 10**30], "b": {"a": {}}}
    assert parse_object(json.dumps(given).encode(), "a file") == given


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (("fifo", "a FIFO"), ("folder", "a folder"), ("loop", "symbolic links"), ("a\0b", "null byte")):
        with pytest.raises(ConfigError, match=said):
            open_regular(tmp_path / name)
    with pytest.raises(ConfigError, match="a device"):
        open_regular(tmp_path / "/dev/zero")
    with pytest.raises(ConfigError, match="too long"):
        open_regular(tmp_path / ("x" * 300))
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["environ", "pagemap", "mem"])
def test_what_the_system_makes_up_is_no_file(tmp_path, name):
    """Such files say that they are empty; some wait for ever, others have no end."""
    made_up = Path("/proc/self") / name
    if not made_up.exists():
        pytest.skip("no such folder here")
    (tmp_path / "special_tokens_map.json").symlink_to(made_up)
    for read in (
        lambda: read_bounded(made_up, 1 << 30, TokenizerError),
        lambda: check_small_files(tmp_path, TokenizerError),
    ):
        with pytest.raises(TokenizerError, match="is not a file"):
            read()


def test_an_empty_file_is_read(tmp_path):
    (tmp_path / "merges.txt").touch()
    assert read_bounded(tmp_path / "merges.txt", 1) == b""


def test_a_long_file_is_not_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(ConfigError, match="longer than 1 MiB"):
        read_bounded(tmp_path / "sparse", 1 << 20)
    (tmp_path / "sparse").rename(tmp_path / "vocab.json")
    with pytest.raises(TokenizerError, match="longer"):
        check_small_files(tmp_path, TokenizerError)


@pytest.mark.parametrize("name", ["model.safetensors", "a b.safetensors", "ä"])
def test_names_inside(name):
    assert is_inside(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/x", "a/b", "a/", "./a", "a\0", "x" * 300, "é" * 200, 1, None]
)
def test_names_outside(name):
    assert not is_inside(name)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"shards": {"../x": "a"}, "files": {}}', '{"shards": {"a": 1}, "files": {}}', "[1]"]
)
def test_a_hostile_manifest_of_a_conversion(tmp_path, text):
    (tmp_path / "conversion.json").write_text(text)
    with pytest.raises(ConvertError, match=r"conversion\.json is damaged"):
        read_manifest(tmp_path)


def test_the_list_of_models_passes_hostile_folders_by(tmp_path):
    for name, text in (("deep", "[" * 100_000), ("digits", '{"a": ' + "9" * 5000 + "}"), ("fifo", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        if text is None:
            os.mkfifo(tmp_path / name / "config.json")
        else:
            (tmp_path / name / "config.json").write_text(text)
    names = {m.name for m in found_models((str(tmp_path),))}
    assert not names & {"deep", "digits", "fifo"}
