"""Snapshots on disk and prompt caches, changed with and without a right checksum: right, absent or refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_mlx.engine.snapshots import Store
from ring_mlx.engine.stored.manifest import _text
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.cache_files import UNSEALED, seal
from tests.fuzz.profile import fuzz
from tests.fuzz.server import attempt
from tests.fuzz.store_doors import LENGTHS, SHAPES, make

DOORS = "tests.fuzz.store_doors:"

DIGESTS = st.sampled_from(["a" * 64, "A" * 64, "²" * 64, "0" * 63, ""])
PATHS = st.sampled_from(["../../../../canary", "/etc/hostname", "../canary", ".", "..", "\0", "x\n", "\x1b[2J"])
NUMBERS = st.one_of(st.integers(-(1 << 70), 1 << 70), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 1e400, True]))
SCALARS = st.one_of(st.none(), NUMBERS, DIGESTS, PATHS, st.text(max_size=8))
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(DIGESTS | PATHS, x, max_size=3))
DEEP = st.sampled_from(["[" * 50_000, '{"a":' * 2000, "9" * 9000])
KEYS = ("fingerprint", "model", "offset", "tokens", "kind", "form", "states", "parent", "blocks", "rest", "sizes")
DTYPES = ("F32", "F16", "BF16", "I32", "U32", "U8", "F64", "BOOL", "F8_E4M3", "X9", "")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store and a prompt cache as they should be."""
    folder = tmp_path_factory.mktemp("whole")
    Store(folder / "cache", "mark", 1 << 40, shapes=SHAPES).save([make(n, t) for n, t in enumerate(LENGTHS)])
    s = make(0, LENGTHS[0])
    cache = HybridCache()
    for linear in SHAPES.linear:
        cache.append(_layer(linear, s))
    cache.save(folder / "prompt", s.tokens.tolist(), "mark")
    return folder


def _layer(linear, s):
    from mlx_lm.models.cache import ArraysCache, KVCache

    c = ArraysCache(size=1) if linear else KVCache()
    if linear:
        c[0] = s.states[0]
    else:
        c.update_and_fetch(s.tail.arrays[0], s.tail.arrays[1])
    return c


class Place:
    """A copy of the whole store between files that must stay as they are."""

    def __init__(self, whole):
        self.folder = Path(tempfile.mkdtemp(prefix="ring-mlx-fuzz-"))
        self.root = self.folder / "cache"
        shutil.copytree(whole / "cache", self.root)
        shutil.copy(whole / "prompt", self.folder / "prompt.safetensors")
        self.store = self.root / "v1" / "mark"
        self.canaries = [self.folder / "canary", self.folder / "canary.safetensors", self.root / "canary.json"]
        for canary in self.canaries:
            canary.write_text(canary.name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert [c.read_text() for c in self.canaries] == [c.name for c in self.canaries]
        shutil.rmtree(self.folder)

    def manifest(self, which):
        """One of the manifests."""
        return sorted((self.store / "snapshots").iterdir())[which]

    def blob(self, which):
        """One of the blobs."""
        found = sorted((self.store / "blobs").iterdir())
        return found[which % len(found)]


def spliced(data, splices):
    """Bytes with some replaced, by position as a part of the whole."""
    for at, cut, new in splices:
        start = int(at * len(data))
        data = data[:start] + new + data[start + cut :]
    return data


SPLICES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=3)


@fuzz(examples=9)
@given(which=st.integers(0, 1), changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_manifests_with_a_right_checksum(forks, whole, which, changes):
    with Place(whole) as place:
        held = json.loads(place.manifest(which).read_text()) | changes
        held.pop("checksum")
        text = _text(held)
        place.manifest(which).write_text(text)
        attempt(forks, f"{DOORS}use_store", str(place.root), True)


@fuzz(examples=7)
@given(which=st.integers(0, 30), splices=SPLICES)
def test_any_file_with_bytes_changed(forks, whole, which, splices):
    with Place(whole) as place:
        files = sorted(p for p in place.store.rglob("*") if p.suffix)
        path = files[which % len(files)]
        path.write_bytes(spliced(path.read_bytes(), splices))
        attempt(forks, f"{DOORS}use_store", str(place.root), False)


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(DTYPES),
        "shape": st.lists(st.integers(-2, 1 << 40) | st.sampled_from([0, 1, 20, 32]), max_size=5),
        "data_offsets": st.lists(st.integers(-8, 1 << 40) | st.sampled_from([0, 80, 4096]), max_size=3),
    },
)
HEADERS = st.one_of(
    st.tuples(st.just("entry"), st.integers(0, 9), ENTRIES),
    st.tuples(st.just("add"), st.sampled_from(["x", "tokens", "states.1", "layers.9.keys", "tail.9.keys"]), ENTRIES),
    st.tuples(st.just("drop"), st.integers(0, 9), st.none()),
    st.tuples(st.just("metadata"), st.sampled_from(["0.keys", "layers", "version", "notes", "x"]), SCALARS | VALUES),
    st.tuples(st.just("text"), st.none(), DEEP),
)


def rewrite_header(path, how, what, value):
    """Change one thing in a safetensors header, whose length stays right."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = sorted(n for n in header if n != "__metadata__")
    if how == "entry":
        header[names[what % len(names)]] |= value
    elif how == "add":
        header[what] = {"dtype": "F32", "shape": [0], "data_offsets": [len(rest), len(rest)]} | value
    elif how == "drop":
        del header[names[what % len(names)]]
    elif how == "metadata":
        held = header["__metadata__"] = header.get("__metadata__") or {}
        held[what] = value if isinstance(value, str) else json.dumps(value)
    text = value if how == "text" else json.dumps(header, separators=(",", ":"))
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + rest)


@fuzz(examples=7)
@given(which=st.integers(0, 9), change=HEADERS)
def test_blobs_with_a_right_name(forks, whole, which, change):
    with Place(whole) as place:
        blob = place.blob(which)
        rewrite_header(blob, *change)
        name = hashlib.sha256(blob.read_bytes()).hexdigest()
        size = blob.stat().st_size
        blob.rename(blob.with_name(f"{name}.safetensors"))
        for n in range(2):
            path = place.manifest(n)
            held = json.loads(path.read_text().replace(blob.stem, name))
            held.pop("checksum")
            if name in held["sizes"]:
                held["sizes"][name] = size
            path.write_text(_text(held))
        attempt(forks, f"{DOORS}use_store", str(place.root), True)


@fuzz(examples=15)
@given(change=HEADERS, version=st.sampled_from(["1", "2", "3", "4"]), sealed=st.booleans())
def test_prompt_caches(forks, whole, change, version, sealed):
    with Place(whole) as place:
        path = place.folder / "prompt.safetensors"
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        if version == "1":
            del metadata["checksum"]
        else:
            metadata["checksum"] = UNSEALED
        mx.save_safetensors(str(path), arrays, metadata | {"version": version})
        rewrite_header(path, *change)
        if sealed:
            with suppress(ValueError):
                seal(path)
        attempt(forks, f"{DOORS}load_cache", str(path))


@fuzz(examples=6)
@given(splices=SPLICES)
def test_prompt_caches_with_bytes_changed(forks, whole, splices):
    with Place(whole) as place:
        path = place.folder / "prompt.safetensors"
        before = path.read_bytes()
        path.write_bytes(spliced(before, splices))
        outcome = attempt(forks, f"{DOORS}load_cache", str(path))
        assert outcome.code == 2 or path.read_bytes() == before


NAMES = st.one_of(
    st.sampled_from(["²-aa.json", ".lock", ".writing-x", "0000020-" + "a" * 64 + ".json", "a" * 64 + ".safetensors"]),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30),
)
KINDS = st.sampled_from(["file", "folder", "link", "dangling", "pipe", "unreadable"])


@fuzz(examples=7)
@given(
    folder=st.sampled_from([".", "snapshots", "blobs", "..", "../.."]),
    name=NAMES,
    kind=KINDS,
    takes=st.sampled_from([None, None, "snapshots", "blobs", ".lock"]),
)
def test_strange_files(forks, whole, folder, name, kind, takes):
    with Place(whole) as place:
        path = place.store / (takes or f"{folder}/{name}")
        if takes and path.exists():
            shutil.move(path, place.folder / "aside")
        if name in (".", "..") or os.path.lexists(path) or len(os.fsencode(path.name)) > 255:
            return
        {
            "file": lambda: path.write_bytes(b"{}"),
            "unreadable": lambda: path.touch(0),
            "folder": lambda: path.mkdir(),
            "link": lambda: path.symlink_to(place.canaries[0]),
            "dangling": lambda: path.symlink_to(place.folder / "nowhere"),
            "pipe": lambda: os.mkfifo(path),
        }[kind]()
        attempt(forks, f"{DOORS}use_store", str(place.root), False)
        assert not (place.folder / "nowhere").exists()
