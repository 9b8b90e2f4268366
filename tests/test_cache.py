"""HybridCache: copies, sizes, files."""

from __future__ import annotations

import os

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, KVCache, load_prompt_cache, save_prompt_cache

from ring_mlx.errors import CacheFileError
from ring_mlx.model.cache import HybridCache
from tests.compare import assert_close
from tests.tiny import make_model, tokens


@pytest.fixture(scope="module")
def model():
    return make_model()


def filled(model, T=40):
    cache = model.make_cache()
    model(tokens(T), cache)
    return cache


def test_layers_are_mlx_lms_caches(model):
    kinds = [type(c) for c in model.make_cache()]
    assert kinds == [ArraysCache, ArraysCache, KVCache, KVCache, KVCache]


def test_offset_and_state(model):
    cache = model.make_cache()
    assert cache.offset == 0
    assert cache.nbytes == 0
    model(tokens(7), cache)
    assert cache.offset == 7
    assert cache[0][0].shape == (1, 6, 16, 16)
    assert len(cache.state) == 5


def test_nbytes_is_true(model):
    cache = filled(model, 300)
    expected = 2 * 6 * 16 * 16 * 4 + 3 * 2 * 2 * 2 * cache[2].step * 16 * 4
    assert cache.nbytes == expected


def test_a_copy_goes_its_own_way(model):
    cache = filled(model)
    twin = cache.copy()
    a = model(tokens(5, seed=2), cache)
    b = model(tokens(5, seed=3), twin)
    again = filled(model)
    assert_close(b, model(tokens(5, seed=3), again), 1e-6)
    fresh = filled(model)
    assert_close(a, model(tokens(5, seed=2), fresh), 1e-6)
    # What the twin has written since lies in no buffer of the other's.
    assert_close(model(tokens(3, seed=4), cache), model(tokens(3, seed=4), fresh), 1e-6)
    assert twin.offset == cache.offset - 3 == 45


def test_a_batch_copy_goes_its_own_way(model):
    cache = model.make_cache(left_padding=[3, 0])
    model(tokens(10, B=2), cache)
    twin = cache.copy()
    model(tokens(4, B=2, seed=5), cache)
    expected = model.make_cache(left_padding=[3, 0])
    model(tokens(10, B=2), expected)
    x = tokens(2, B=2, seed=6)
    assert_close(model(x, twin), model(x, expected), 1e-6)


@settings(max_examples=10, deadline=None)
@given(parts=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_any_cut_of_the_prompt_gives_the_same(parts):
    model = make_model()
    x = tokens(sum(parts))
    cache, out, at = model.make_cache(), [], 0
    for n in parts:
        out.append(model(x[:, at : at + n], cache))
        at += n
    assert_close(mx.concatenate(out, axis=1), model(x), 1e-4)


def test_save_and_load_continue_the_same(model, tmp_path):
    cache, ids = filled(model), tokens(40)[0].tolist()
    path = tmp_path / "sub" / "long.cache"
    cache.save(path, ids, "mark", topic="moon")
    loaded, saved_ids, notes = HybridCache.load(path, "mark")
    assert (saved_ids, notes, loaded.offset) == (ids, {"topic": "moon"}, 40)
    x = tokens(6, seed=4)
    assert_close(model(x, loaded), model(x, cache), 1e-6)
    assert [p.name for p in path.parent.iterdir()] == ["long.cache"]


@pytest.mark.skipif(mx.cuda.is_available(), reason="MLX's CUDA backend has no product of float32 with quantized keys")
def test_save_and_load_quantized_keys_and_values(tmp_path):
    model = make_model(head_dim=64)
    cache = filled(model)
    cache[2:] = [c.to_quantized(group_size=32, bits=8) for c in cache[2:]]
    cache.save(tmp_path / "q.cache", tokens(40)[0].tolist(), "mark")
    loaded, _, _ = HybridCache.load(tmp_path / "q.cache", "mark")
    x = tokens(6, seed=4)
    assert_close(model(x, loaded), model(x, cache), 1e-6)


def test_an_empty_cache_can_be_saved(model, tmp_path):
    model.make_cache().save(tmp_path / "e.cache", [], "mark")
    loaded, ids, _ = HybridCache.load(tmp_path / "e.cache", "mark")
    assert (ids, loaded.offset) == ([], 0)
    x = tokens(9)
    assert_close(model(x, loaded), model(x), 1e-5)


def one_line(e):
    return str(e.value).startswith("[cache] ") and "\n" not in str(e.value)


def test_damaged_and_foreign_files_are_refused(model, tmp_path):
    path = tmp_path / "good.cache"
    filled(model).save(path, tokens(40)[0].tolist(), "mark")
    whole = path.read_bytes()
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "short": whole[:5],
        "empty": b"",
        "text": b"hello" * 99,
    }.items():
        bad = tmp_path / name
        bad.write_bytes(content)
        with pytest.raises(CacheFileError, match="damaged or not a cache") as e:
            HybridCache.load(bad, "mark")
        assert one_line(e)
    with pytest.raises(CacheFileError, match="another model"):
        HybridCache.load(path, "other")
    with pytest.raises(CacheFileError, match="no file"):
        HybridCache.load(tmp_path / "none", "mark")
    mx.save_safetensors(str(tmp_path / "foreign.safetensors"), {"x": mx.ones(3)}, {"format": "mlx"})
    with pytest.raises(CacheFileError, match="not a cache of this version"):
        HybridCache.load(tmp_path / "foreign.safetensors", "mark")


def test_a_missing_layer_in_the_file_is_damage(model, tmp_path):
    path = tmp_path / "c.cache"
    filled(model).save(path, tokens(40)[0].tolist(), "mark")
    arrays, header = mx.load(str(path), format="safetensors", return_metadata=True)
    del arrays["layers.3.keys"]
    mx.save_safetensors(str(tmp_path / "d.safetensors"), arrays, header)
    with pytest.raises(CacheFileError, match="damaged"):
        HybridCache.load(tmp_path / "d.safetensors", "mark")


def test_what_cannot_be_saved_is_said(model, tmp_path):
    with pytest.raises(CacheFileError, match="39 tokens do not match a cache at offset 40"):
        filled(model).save(tmp_path / "x", list(range(39)), "mark")
    with pytest.raises(CacheFileError, match="41 tokens do not match a cache at offset 40"):
        filled(model).save(tmp_path / "x", list(range(41)), "mark")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheFileError, match="could not be written"):
        filled(model).save(tmp_path / "file" / "x", tokens(40)[0].tolist(), "mark")


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "c.cache"
    filled(model).save(path, tokens(40)[0].tolist(), "mark")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CacheFileError, match="No space left"):
        filled(model, 50).save(path, tokens(50)[0].tolist(), "mark")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.cache"]


def test_mlx_lm_can_save_and_load_it(model, tmp_path):
    cache = filled(model)
    save_prompt_cache(str(tmp_path / "c.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "c.safetensors"))
    x = tokens(6, seed=4)
    assert_close(model(x, loaded), model(x, cache), 1e-6)
