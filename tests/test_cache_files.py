"""Prompt cache files: one changed byte, or arrays that the model could not have made, are refused in one line."""

from __future__ import annotations

import json
import os
import stat

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache

from ring_mlx.cli import main
from ring_mlx.cli.exit_codes import CUT_OFF
from ring_mlx.errors import CacheFileError
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.cache_files import UNSEALED, array_checksum, seal
from tests.compare import assert_close
from tests.test_files import STRANGE, make_strange
from tests.tiny import make_model, tokens

COUNT = 5


@pytest.fixture(scope="module")
def model():
    return make_model(head_dim=32)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A file of each form."""
    folder = tmp_path_factory.mktemp("whole")
    cache = model.make_cache()
    model(tokens(COUNT), cache)
    cache.save(folder / "plain", tokens(COUNT)[0].tolist(), "mark", model="tiny")
    cache[2:] = [c.to_quantized(group_size=32, bits=8) for c in cache[2:]]
    cache.save(folder / "quantized", tokens(COUNT)[0].tolist(), "mark", model="tiny")
    return folder


def load(path, model):
    return HybridCache.load(path, "mark", model.cache_shapes)


def refused(path, model):
    with pytest.raises(CacheFileError) as e:
        load(path, model)
    assert str(e.value).startswith("[cache] ")
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)
    return str(e.value)


def rewritten(path, target, change, version="3"):
    """A file of a version whose checksum is right, though its content was changed."""
    arrays, header = mx.load(str(path), format="safetensors", return_metadata=True)
    header["version"] = version
    layers = json.loads(header["layers"])
    change(arrays, layers, header)
    if "layers" in header:
        header["layers"] = header["layers"] if isinstance(layers, str) else json.dumps(layers)
    header.pop("checksum")
    if version != "1":
        header["checksum"] = UNSEALED if version == "3" else array_checksum(arrays)
    target = target.with_suffix(".safetensors")
    mx.save_safetensors(str(target), arrays, header)
    if version == "3":
        seal(target)
    return target


def nothing(*_):
    pass


@pytest.mark.parametrize("form", ["plain", "quantized"])
@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_every_version_continues_the_same(whole, model, tmp_path, form, version):
    cache, ids, notes = load(rewritten(whole / form, tmp_path / "x", nothing, version), model)
    now = load(whole / form, model)[0]
    assert (cache.offset, len(ids), notes) == (COUNT, COUNT, {"model": "tiny"})
    x = tokens(3, seed=4)
    assert_close(model(x, cache), model(x, now), 1e-6)
    assert any(isinstance(c, QuantizedKVCache) for c in cache) == (form == "quantized")


def test_a_file_with_any_byte_changed_is_refused(whole, model, tmp_path):
    data = (whole / "plain").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = {*range(0, header, 3), *range(header - 16, header), *range(header, len(data), 307), len(data) - 1}
    for word in (b'"version"', b"offset", b'"checksum"', b'"fingerprint"', b"group_size"):
        places |= set(range(data.find(word), data.find(word) + len(word) + 8))
    path = tmp_path / "x"
    for at in sorted(places):
        flipped = 9 if data[at] == ord(" ") else data[at] ^ 1 << at % 8
        path.write_bytes(data[:at] + bytes([flipped]) + data[at + 1 :])
        refused(path, model)
    for spoilt in (data + b"\0", data[:-1], data[:header], data[:7], b"", data * 2):
        path.write_bytes(spoilt)
        refused(path, model)


def an_offset(arrays, layers, header):
    layers[3]["offset"] += 1


def other_offsets_everywhere(arrays, layers, header):
    for layer in layers[2:]:
        layer["offset"] = 4


def a_negative_offset(arrays, layers, header):
    layers[4]["offset"] = -COUNT


def no_offset(arrays, layers, header):
    del layers[4]["offset"]


def fewer_tokens(arrays, layers, header):
    arrays["tokens"] = arrays["tokens"][:4]


def tokens_beyond_the_vocabulary(arrays, layers, header):
    arrays["tokens"] = arrays["tokens"] + 1000


def tokens_of_a_batch(arrays, layers, header):
    arrays["tokens"] = arrays["tokens"][None]


def fractions_for_tokens(arrays, layers, header):
    arrays["tokens"] = arrays["tokens"].astype(mx.float32)


def another_order_of_axes(arrays, layers, header):
    arrays["layers.2.keys"] = arrays["layers.2.keys"].transpose(0, 2, 1, 3)


def another_dtype(arrays, layers, header):
    arrays["layers.2.values"] = arrays["layers.2.values"].astype(mx.bfloat16)


def a_narrow_state(arrays, layers, header):
    arrays["layers.0.state"] = arrays["layers.0.state"].astype(mx.float16)


def fewer_heads(arrays, layers, header):
    for name in ("keys", "values"):
        arrays[f"layers.3.{name}"] = arrays[f"layers.3.{name}"][:, :1]


def a_flat_state(arrays, layers, header):
    arrays["layers.1.state"] = arrays["layers.1.state"].reshape(-1)


def an_empty_state(arrays, layers, header):
    arrays["layers.1.state"] = mx.zeros((1, 0, 32, 32))


def a_missing_array(arrays, layers, header):
    del arrays["layers.2.values"]


def one_array_more(arrays, layers, header):
    arrays["layers.2.extra"] = mx.zeros(1)


def an_array_of_no_layer(arrays, layers, header):
    arrays["layers.99.keys"] = mx.zeros(1)


def a_strange_array(arrays, layers, header):
    arrays["x"] = mx.zeros(1)


def one_layer_less(arrays, layers, header):
    layers.pop()
    del arrays["layers.4.keys"], arrays["layers.4.values"]


def no_layers(arrays, layers, header):
    layers.clear()


def layers_in_another_order(arrays, layers, header):
    layers[1], layers[2] = layers[2], layers[1]
    for name in ("keys", "values"):
        arrays[f"layers.1.{name}"] = arrays.pop(f"layers.2.{name}")
    arrays["layers.2.state"] = arrays.pop("layers.1.state")


def an_unknown_kind(arrays, layers, header):
    layers[2]["kind"] = "rotating"


def a_list_for_a_kind(arrays, layers, header):
    layers[2]["kind"] = []


def no_object_for_a_layer(arrays, layers, header):
    layers[2] = 7


def deep_layers(arrays, layers, header):
    header["layers"] = "[" * 100_000


def a_number_for_layers(arrays, layers, header):
    header["layers"] = "9" * 10_000


def no_header_of_layers(arrays, layers, header):
    del header["layers"]


def a_list_of_notes(arrays, layers, header):
    header["notes"] = "[]"


CHANGES = [
    an_offset,
    other_offsets_everywhere,
    a_negative_offset,
    no_offset,
    fewer_tokens,
    tokens_beyond_the_vocabulary,
    tokens_of_a_batch,
    fractions_for_tokens,
    another_order_of_axes,
    another_dtype,
    a_narrow_state,
    fewer_heads,
    a_flat_state,
    an_empty_state,
    a_missing_array,
    one_array_more,
    an_array_of_no_layer,
    a_strange_array,
    one_layer_less,
    no_layers,
    layers_in_another_order,
    an_unknown_kind,
    a_list_for_a_kind,
    no_object_for_a_layer,
    no_header_of_layers,
    a_list_of_notes,
]


@pytest.mark.parametrize("version", ["1", "2", "3"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_the_model_cannot_have_made_is_refused_in_every_version(whole, model, tmp_path, change, version):
    refused(rewritten(whole / "plain", tmp_path / "x", change, version), model)


@pytest.mark.parametrize("layers", ["[" * 100_000, "9" * 10_000, "{}", "null", "[[]]", '"linear"', "[NaN]"])
def test_layers_that_are_none_are_refused(whole, model, tmp_path, layers):
    arrays, header = mx.load(str(whole / "plain"), format="safetensors", return_metadata=True)
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), arrays, header | {"layers": layers, "checksum": UNSEALED})
    seal(path)
    refused(path, model)


@pytest.mark.parametrize(
    ("name", "value"), [("bits", 4), ("bits", 7), ("bits", "8"), ("group_size", 64), ("offset", 4)]
)
def test_a_quantized_form_is_held_against_its_arrays(whole, model, tmp_path, name, value):
    def change(arrays, layers, header):
        layers[3][name] = value

    for version in ("1", "2", "3"):
        refused(rewritten(whole / "quantized", tmp_path / "x", change, version), model)


def test_a_version_cannot_be_lowered_to_lose_the_checksum(whole, model, tmp_path):
    data = (whole / "plain").read_bytes()
    for version in (b"1", b"2"):
        (tmp_path / "x").write_bytes(data.replace(b'"version":"3"', b'"version":"%s"' % version))
        assert "damaged" in refused(tmp_path / "x", model)


@pytest.mark.parametrize("kind", [k for k in STRANGE if k != "link"])
def test_what_is_no_file_is_named_at_once(model, tmp_path, kind):
    make_strange(tmp_path / "x", kind)
    assert "is not a file" in refused(tmp_path / "x", model)
    cache = model.make_cache()
    with pytest.raises(CacheFileError, match="it is there and not a file"):
        cache.save(tmp_path / "x", [], "mark")
    assert {p.name for p in tmp_path.iterdir()} == {"x"}


def test_a_link_stays_a_link_and_a_file_is_private(model, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").write_text("old")
    (tmp_path / "disk" / "file").chmod(0o644)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    model.make_cache().save(tmp_path / "link", [], "mark")
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "link", model)[1] == []
    assert stat.S_IMODE((tmp_path / "disk" / "file").stat().st_mode) == 0o600


def test_a_file_that_may_not_be_read_is_named(whole, model, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "x"
    path.write_bytes((whole / "plain").read_bytes())
    path.chmod(0)
    refused(path, model)


def test_the_command_names_a_damaged_file_in_one_line(tmp_path, capsys):
    path = tmp_path / "p.cache"
    assert main(["cache-prompt", "--prompt", "The moon is", "--prompt-cache-file", str(path)]) == 0
    ask = ["generate", "--prompt", "What?", "--max-tokens", "2", "--prompt-cache-file", str(path)]
    assert main(ask) == CUT_OFF
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert path.read_bytes() != data
    capsys.readouterr()
    assert main(ask) == 2
    err = capsys.readouterr().err
    assert err.endswith(f"ring-mlx: [cache] {path} is damaged (it does not match its checksum); make it again.\n")
    assert err.count("\n") == 2, "the note on the toy, and the error"


def test_a_place_that_cannot_be_written_is_named_before_the_prompt_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "p.cache"):
        assert main(["cache-prompt", "--prompt", "x", "--model", "no/model", "--prompt-cache-file", str(path)]) == 2
        err = capsys.readouterr().err
        assert str(path) in err
        assert err.count("\n") == 1


def test_a_huge_header_is_not_read(model, tmp_path):
    size = 90 << 20
    (tmp_path / "x").write_bytes(size.to_bytes(8, "little") + b"{" + b" " * (size - 2) + b"}")
    assert "its header is larger than" in refused(tmp_path / "x", model)


@pytest.mark.parametrize("name", ["x" * 300, "loop", "loop/x", "none/x", "empty/../x"])
def test_a_name_that_leads_nowhere_takes_one_line(model, tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refused(tmp_path / name, model)


def test_what_the_model_cannot_have_made_is_refused_before_it_is_read(whole, model, tmp_path, monkeypatch):
    """A file may have holes: terabytes of nothing."""

    def more_tokens(arrays, layers, header):
        arrays["tokens"] = mx.zeros(64, dtype=mx.int32)

    path = rewritten(whole / "plain", tmp_path / "x", more_tokens)
    monkeypatch.setattr("ring_mlx.model.cache._check_sum", lambda *_: pytest.fail("it was read"))
    assert "for 64 tokens" in refused(path, model)


def test_more_tokens_than_the_context_are_not_read_though_every_shape_fits(whole, model, tmp_path):
    """34 GB and more of nothing, whose checksum alone would take a minute or hours."""
    arrays, header = mx.load(str(whole / "plain"), format="safetensors", return_metadata=True)
    count, at, entries = 1 << 28, 0, {}
    for name, a in arrays.items():
        shape = [count if n == COUNT else n for n in a.shape]
        size = a.nbytes // COUNT * count if shape != list(a.shape) else a.nbytes
        kind = "I32" if name == "tokens" else "F32"
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header["layers"] = header["layers"].replace(f'"offset": {COUNT}', f'"offset": {count}')
    raw = json.dumps({"__metadata__": header | {"checksum": UNSEALED}, **entries}).encode()
    path = tmp_path / "x"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + at)
    assert f"{count} tokens, more than the {model.config.context_tokens} of the model's context" in refused(path, model)


def test_a_file_too_large_to_map_takes_one_line(whole, model, monkeypatch):
    def refuse(*_, **__):
        raise MemoryError

    monkeypatch.setattr("ring_mlx.model.cache_files.safe_open", refuse)
    assert "Cannot allocate memory" in refused(whole / "plain", model)
