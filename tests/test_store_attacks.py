"""A store of snapshots that somebody has tampered with: nothing outside is touched, nothing wrong is believed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
from contextlib import suppress

import mlx.core as mx
import numpy as np
import pytest

from ring_mlx.cli import main
from ring_mlx.engine.snapshots import Store
from ring_mlx.engine.snapshots import store as store_module
from ring_mlx.engine.stored import folder
from ring_mlx.engine.stored import manifest as manifests
from ring_mlx.engine.stored.stores import free_disk
from ring_mlx.errors import CacheFileError
from ring_mlx.model.cache_shapes import Shapes
from tests.saver import check, make
from tests.test_files import STRANGE, make_strange

BIG = 1 << 40


def longer(snapshot):
    return np.append(snapshot.tokens, 98)


class Tampered:
    """A store with two snapshots, and files around it that must stay as they are."""

    def __init__(self, folder):
        self.root, self.made = folder / "home" / "cache", [make(1, 300), make(2, 700)]
        self.canaries = {}
        for name in ("weights.safetensors", "weights", "0000300-aa.json", "home/config.json", "home/cache/notes.txt"):
            self.canaries[folder / name] = name.encode()
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_bytes(name.encode())
            (folder / name).chmod(0o644)
        Store(self.root, "mark", BIG).save(self.made)
        self.folder = self.root / "v1" / "mark"
        self.first, self.second = sorted((self.folder / "snapshots").iterdir())

    def forge(self, **changes):
        """Change a manifest so that its checksum is right."""
        held = json.loads(self.first.read_text()) | changes
        held.pop("checksum")
        self.first.write_text(manifests._text(held))

    def use(self):
        """Do everything that is done with a store; returns the warnings."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            store = Store(self.root, "mark", BIG)
            for _ in range(2):
                found = [store.deepest(longer(s)) for s in self.made]
                assert all(f is None or check(f) for f in found)
            count = len(told)
            with suppress(CacheFileError):
                store.save([make(3, 300)])
                assert check(store.deepest(longer(make(3, 300))))
            for budget in (BIG, 100_000, 1):
                try:
                    Store(self.root, "mark", budget).collect(unused_for_s=1e6)
                except OSError:
                    continue
            free_disk(1 << 60, self.root.parent, self.root)
        assert count <= 1
        return [str(w.message) for w in told]

    def check_canaries(self):
        for path, content in self.canaries.items():
            assert path.read_bytes() == content
            assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.fixture
def tampered(tmp_path):
    tampered = Tampered(tmp_path)
    yield tampered
    tampered.check_canaries()


@pytest.fixture
def cache(capsys, tampered):
    """Runs `ring-mlx cache`; what it does ends in success or one line."""

    def run(*args):
        code = main(["cache", *map(str, args), "--cache-dir", str(tampered.root)])
        out, err = capsys.readouterr()
        assert code in (0, 2)
        assert "Traceback" not in err
        assert all(line.startswith("ring-mlx: [cache] ") for line in err.splitlines())
        tampered.check_canaries()
        return code, out, err

    return run


OUTSIDE = ["../../../../../weights", "../notes", "/etc/passwd", "", ".", "..", "A" * 64, "a" * 63, "a" * 64 + "\n"]
NO_NAMES = [*OUTSIDE, None, 7, [], {}, True, "\0" * 64, "²" * 64, "\u0661" * 64]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(("rest", name) for name in NO_NAMES),
        *((key, name) for key in ("blocks", "sizes", "parent", "tokens") for name in (OUTSIDE[0], OUTSIDE[2], 7)),
    ],
    ids=repr,
)
def test_a_name_in_a_manifest_that_is_no_checksum_is_not_followed(tampered, cache, tmp_path, key, name):
    held = json.loads(tampered.first.read_text())
    if key == "blocks":
        forged = {"blocks": [name]}
        if isinstance(name, str):
            forged["sizes"] = {name: 1, held["rest"]: 1}
    elif key == "sizes":
        forged = {"sizes": held["sizes"] | {str(name): 1}}
    else:
        forged = {key: name}
        if key == "rest" and isinstance(name, str):
            forged["sizes"] = {name: 1, held["blocks"][0]: 1}
    tampered.forge(**forged)
    _, out, err = cache("list", "--json")
    assert [row["tokens"] for row in json.loads(out)] == [700]
    assert tampered.first.name in err
    cache("info")
    (told,) = tampered.use()[:1]
    assert tampered.first.name in told
    cache("prune", "--all")
    assert not list(tampered.root.rglob("*.json"))


def test_a_list_in_place_of_a_manifest_cannot_reach_out(tampered, cache):
    tampered.forge(rest="../../../../../weights", sizes={"../../../../../weights": 1 << 60})
    cache("prune", "--max-size", "1MB")
    cache("prune", "--unused-days", "0")
    cache("prune")


@pytest.mark.parametrize(
    "size", ["10", -1, 1.5, 10**400, 1 << 60, True, None, [1], float("nan"), float("inf")], ids=str
)
def test_a_size_that_cannot_be_is_refused(tampered, cache, size):
    held = json.loads(tampered.first.read_text())
    try:
        tampered.forge(sizes=dict.fromkeys(held["sizes"], size))
    except ValueError:  # Python does not write a number of so many digits either.
        tampered.first.write_text(tampered.first.read_text().replace(": 1", f": 1{'0' * 5000}"))
    _, out, err = cache("info")
    assert "1 snapshots" in out
    assert tampered.first.name in err
    assert tampered.first.name in tampered.use()[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", -300), ("offset", "300"), ("offset", 300.0), ("offset", 301), ("offset", 10**12), ("offset", True),
        ("form", None), ("form", [[8]]), ("form", [[8, "32"]]), ("form", [None] * 20_000), ("form", [[True, 32]]),
        ("form", []), ("form", [None, None]), ("form", [[8, 32]]), ("states", -1), ("states", 1 << 70), ("states", 3),
        ("states", "2"), ("blocks", []), ("blocks", "a" * 64), ("blocks", {"a": 1}), ("kind", 7), ("model", None),
        ("fingerprint", "other"), ("fingerprint", 1), ("version", 2), ("version", 1.0), ("format", "other"),
        ("tokens", "0" * 64), ("sizes", []), ("sizes", {}), ("parent", "0000300-" + "0" * 63), ("parent", 300),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_is_refused(tampered, cache, key, value):
    tampered.forge(**{key: value})
    for command in ("list", "info"):
        _, _, err = cache(command)
        # What only the arrays show is seen when they are read.
        assert tampered.first.name in err or key in ("fingerprint", "form", "states")
    assert key == "states" or tampered.use()
    cache("prune", "--all")
    assert not list(tampered.root.rglob("*.json"))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 990 + b"1" + b"}" * 990,
        b"null",
        b"[]",
        b"\xff\xfe",
        b"",
        b"{" + b" " * (9 << 20) + b"}",
    ],
    ids=["deep", "nested", "null", "list", "no UTF-8", "empty", "huge"],
)
def test_a_manifest_that_is_none_is_passed_over(tampered, cache, content):
    tampered.first.write_bytes(content)
    assert tampered.first.name in cache("list")[2]
    assert tampered.first.name in tampered.use()[0]


def test_any_changed_byte_of_a_manifest_is_refused(tampered):
    data = tampered.first.read_bytes()
    for at in range(len(data)):
        for spoilt in (data[at] ^ 1 << at % 8, ord("\t") if data[at] == ord(" ") else ord(" ")):
            tampered.first.write_bytes(data[:at] + bytes([spoilt]) + data[at + 1 :])
            with pytest.raises(ValueError, match=r"."):
                manifests.read_manifest(tampered.first)
    for text in (data + b"\n", data.replace(b'"offset"', b'"offset": 300, "offset"')):
        tampered.first.write_bytes(text)
        with pytest.raises(ValueError, match="checksum"):
            manifests.read_manifest(tampered.first)


STRANGE_NAMES = [
    "²-aa.json", "١٢٣٤٥٦٧-" + "a" * 64 + ".json", "0000300-" + "A" * 64 + ".json", "-1-aa.json", "1e3-aa.json",
    "99999999999999999999-" + "a" * 64 + ".json", "0000300-" + "a" * 64 + ".json ", "a\nb.json", "x\x1b[2J.json",
    "0000300.json", "-.json", "evil.safetensors", "a" * 64, b"\xff\xfe.json", "0000300-" + "a" * 63 + "\n.json",
]  # fmt: skip


@pytest.mark.parametrize("name", STRANGE_NAMES, ids=repr)
@pytest.mark.parametrize("folder", ["snapshots", "blobs"])
def test_a_file_with_another_name_is_named_and_stays(tampered, cache, folder, name):
    path = os.path.join(os.fsencode(tampered.folder / folder), os.fsencode(name))
    with open(path, "wb") as f:
        f.write(b"{}")
    for command in ("list", "info"):
        code, _, err = cache(command)
        assert code == 0
        assert "is no file of a snapshot; ignored." in err
    tampered.use()
    cache("prune", "--all")
    assert os.path.exists(path)


def test_files_of_the_system_are_passed_over_in_silence(tampered, cache):
    (tampered.folder / "snapshots" / ".DS_Store").write_bytes(b"x")
    (tampered.root / "v1" / ".DS_Store").write_bytes(b"x")
    assert cache("info")[2] == ""
    assert tampered.use() == []


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("place", ["manifest", "blob", "lock"])
def test_something_else_in_place_of_a_file(tampered, cache, kind, place):
    paths = {"manifest": tampered.first, "blob": next((tampered.folder / "blobs").iterdir())}
    path = paths.get(place, tampered.folder / ".lock")
    path.unlink()
    make_strange(path, kind)
    for args in (["list"], ["info"], ["prune"], ["prune", "--unused-days", "0"], ["prune", "--all"]):
        code, _, err = cache(*args)
        assert err or place == "lock"
        assert code == 0 or place == "lock"
    tampered.use()
    assert path.is_symlink() == (kind == "link") or path.exists()
    target = path.parent / "target"
    assert kind != "link" or target.read_bytes() == b"x" * 99


@pytest.mark.parametrize("which", ["v1", "v1/mark", "v1/mark/snapshots", "v1/mark/blobs"])
@pytest.mark.parametrize("kind", ["link", "file", "pipe"])
def test_a_folder_that_is_a_link_is_not_entered(tampered, cache, tmp_path, which, kind):
    folder, aside = tampered.root / which, tmp_path / "aside"
    shutil.move(folder, aside)
    victim = aside / ("a" * 64 + ".safetensors")
    victim.write_bytes(b"mine")
    before = sorted(p for p in aside.rglob("*"))
    if kind == "link":
        folder.symlink_to(aside)
    elif kind == "pipe":
        os.mkfifo(folder)
    else:
        folder.write_bytes(b"x")
    aside.chmod(0o755)
    for args in (["list"], ["info"], ["prune", "--all"]):
        assert str(tampered.root / "v1") in cache(*args)[2]
    told = tampered.use()
    assert any(str(folder) in line for line in told)
    assert sorted(p for p in aside.rglob("*")) == before
    assert stat.S_IMODE(aside.stat().st_mode) == 0o755


def test_the_root_may_be_a_link_of_ones_own(tampered, tmp_path):
    (tmp_path / "link").symlink_to(tampered.root)
    assert check(Store(tmp_path / "link", "mark", BIG).deepest(longer(tampered.made[0])))


@pytest.mark.parametrize("which", [".", "v1", "v1/mark", "v1/mark/snapshots"])
def test_a_folder_of_another_user_is_not_used(tampered, cache, which):
    folder = tampered.root / which
    try:
        os.chown(folder, 65534, -1)
    except PermissionError:
        pytest.skip("only root gives folders away")
    for args in (["list"], ["info"], ["prune", "--all"]):
        assert "belongs to user 65534" in cache(*args)[2]
    told = tampered.use()
    assert any("belongs to user 65534" in line for line in told)
    assert tampered.first.exists()


def test_what_is_open_to_others_is_closed(tampered):
    paths = [tampered.folder, *tampered.folder.rglob("*")]
    for path in paths:
        path.chmod(0o777 if path.is_dir() else 0o666)
    Store(tampered.root, "mark", BIG).deepest(longer(tampered.made[0]))
    for path in [*paths, tampered.root / "v1"]:
        if path.name != ".lock":
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    Store(tampered.root, "mark", BIG).save([make(4, 20)])
    assert stat.S_IMODE((tampered.folder / ".lock").stat().st_mode) == 0o600


def test_a_root_of_ones_own_is_closed_and_a_shared_one_left(tmp_path):
    for name in ("own", "shared"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
    (tmp_path / "shared" / "film").write_text("")
    for name, mode in (("own", 0o700), ("shared", 0o755)):
        Store(tmp_path / name, "mark", BIG).save([make(1, 20)])
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_times_that_no_calendar_has_are_listed(tampered, cache):
    try:
        os.utime(tampered.first, (1 << 55, 1 << 55))
    except OSError:
        os.utime(tampered.first, (-1, -1))
    assert len(cache("list")[1].splitlines()) == 3


def shapes_of(made):
    return Shapes((True, False, True), 2, 1, made.parts[0].arrays[0].shape[-1], 99, mx.float32, 4096)


def test_a_snapshot_is_held_against_the_model(tmp_path, monkeypatch):
    made = make(1, 300)
    made.states = [mx.full((1, 2, 32, 32), float(x)) for x in (made.tokens.sum(), 300)]
    made.logits = mx.zeros((1, 99))
    Store(tmp_path, "mark", BIG).save([made])
    right = shapes_of(made)
    assert Store(tmp_path, "mark", BIG, shapes=right).deepest(longer(made)).offset == 300
    others = {
        "linear": [(True, False), (True, True), (False, False, True, True)], "heads": [1, 3], "kv_heads": [2],
        "head_dim": [16, 64], "vocab_size": [98], "dtype": [mx.bfloat16, mx.float16], "context_tokens": [299],
    }  # fmt: skip
    for name, values in others.items():
        for value in values:
            other = Shapes(**{**vars(right), name: value})
            shutil.copytree(tmp_path / "v1", tmp_path / "copy" / "v1", dirs_exist_ok=True)
            store = Store(tmp_path / "copy", "mark", BIG, shapes=other)
            with pytest.warns(UserWarning, match="where the model has|number of layers|model's context"):
                assert store.deepest(longer(made)) is None


@pytest.mark.parametrize("is_told", [True, False])
def test_a_blob_that_is_larger_than_it_can_be_is_not_read(tampered, monkeypatch, is_told):
    """A file may have holes: the checksum of a terabyte of nothing takes hours."""
    blob = tampered.folder / "blobs" / f"{json.loads(tampered.first.read_text())['rest']}.safetensors"
    os.truncate(blob, BIG)
    if is_told:
        sizes = json.loads(tampered.first.read_text())["sizes"]
        tampered.forge(sizes=sizes | {blob.stem: BIG})
    right = folder.checksum
    for module in ("snapshots.packing", "stored.folder"):
        monkeypatch.setattr(
            f"ring_mlx.engine.{module}.checksum",
            lambda p: pytest.fail("it was read") if p == blob else right(p),
        )
    store = Store(tampered.root, "mark", BIG, shapes=shapes_of(tampered.made[0]))
    with pytest.warns(UserWarning, match=f"has {BIG} bytes"):
        assert store.deepest(longer(tampered.made[0])) is None
    assert not tampered.first.exists()
    assert not blob.exists()


@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), OSError(5, "I/O"), RuntimeError("[malloc]")], ids=str
)
def test_a_failure_that_may_pass_costs_no_snapshot(tampered, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(store_module, "read_blob", fail)
    store = Store(tampered.root, "mark", BIG)
    with pytest.warns(UserWarning, match="ignored, the prompt is read again"):
        assert store.deepest(longer(tampered.made[0])) is None
    monkeypatch.undo()
    assert check(store.deepest(longer(tampered.made[0])))


@pytest.mark.parametrize("which", ["snapshots", "blobs", ".lock", "."])
def test_ones_own_files_are_made_readable_again(tampered, which):
    top = tampered.folder / which
    for path in [*top.rglob("*"), top]:
        path.chmod(0)
    store = Store(tampered.root, "mark", BIG)
    assert check(store.deepest(longer(tampered.made[1])))
    assert store.save([make(3, 20)]) == 1
    assert stat.S_IMODE(tampered.first.stat().st_mode) == 0o600


def test_a_manifest_has_as_many_blocks_as_its_tokens_need(tampered):
    held = json.loads(tampered.first.read_text())
    tampered.forge(blocks=[], sizes={held["rest"]: held["sizes"][held["rest"]]})
    with pytest.raises(ValueError, match="as many blocks"):
        manifests.read_manifest(tampered.first)
