"""What commands write besides chats and snapshots, where the disk takes no more: one line, and old files stay whole."""

from __future__ import annotations

import csv
import os
import resource
import stat
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from ring_mlx.bench import report
from ring_mlx.bench import run as benchmark
from ring_mlx.bench.config import BenchError
from ring_mlx.convert import writer
from ring_mlx.convert.report import Report, save
from ring_mlx.distributed.hosts import Host, write_host_file
from ring_mlx.doctor.decay_choice import write_offset
from ring_mlx.errors import ConvertError, OptionError, RingError
from ring_mlx.evaluation.heat_map import check_plot, plot
from ring_mlx.evaluation.recall import Cell, Grid
from ring_mlx.system import files

OLD = "old" * 40
HEAD = {
    **dict.fromkeys((*benchmark.HEAD, *benchmark.MODEL, *benchmark.LATER), "x"),
    "weights_gb": 1.0,
    "build_peak_gb": 1.0,
    "bandwidth_gbps": None,
}
ROW = dict.fromkeys(report.CELL_COLUMNS, 1.0) | {"engine": "ring-mlx", "context": 8}


@contextmanager
def short_files(most_bytes):
    """No file may grow beyond so many bytes, as on a disk that fills up while it is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module", autouse=True)
def fonts():
    """matplotlib writes a list of fonts when it is first imported."""
    import matplotlib.font_manager  # noqa: F401


def result():
    return benchmark.Result(HEAD, report.columns(False, False), [HEAD | ROW])


def grid():
    return Grid([Cell(90, 0.0, 90, 1, 2, 0), Cell(90, 1.0, 90, 2, 2, 0)], 180, 180)


WRITERS = {
    "json": lambda path: benchmark.write(result(), benchmark.Files(json=path)),
    "markdown": lambda path: benchmark.write(result(), benchmark.Files(markdown=path)),
    "plot": lambda path: benchmark.write(result(), benchmark.Files(plot=path)),
    "heat map": lambda path: plot(grid(), "title", path),
    "hosts": lambda path: write_host_file(path, [Host("a", "10.0.0.1"), Host("b", "10.0.0.2")]),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("most_bytes", [0, 100])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, kind, most_bytes):
    path = tmp_path / "a"
    path.write_text(OLD)
    with short_files(most_bytes), pytest.raises(RingError, match=r"/a .*(File too large|written)"):
        WRITERS[kind](path)
    assert path.read_text() == OLD
    assert os.listdir(tmp_path) == ["a"]
    WRITERS[kind](path)
    assert not path.read_bytes().startswith(b"old")


def test_a_file_that_cannot_be_written_costs_no_other_one(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(BenchError, match=r"a\.json \(it is there and not a file\) could not be written"):
        benchmark.write(result(), benchmark.Files(json=tmp_path / "a.json", markdown=tmp_path / "a.md"))
    assert "ring-mlx" in (tmp_path / "a.md").read_text()


def test_rows_that_do_not_fit_are_no_part_of_a_table(tmp_path):
    path = tmp_path / "a.csv"
    report.append_csv(path, ["engine", "runs"], [{"engine": "one", "runs": 1}])
    before = path.read_bytes()
    with short_files(len(before) + 3), pytest.raises(BenchError, match="could not be written"):
        report.append_csv(path, ["engine", "runs"], [{"engine": "two", "runs": 2}])
    assert path.read_bytes() == before
    path.write_bytes(before.rstrip(b"\n"))  # as an editor may leave it
    report.append_csv(path, ["engine", "runs"], [{"engine": "two", "runs": 2}])
    assert [row["engine"] for row in csv.DictReader(path.read_text().splitlines())] == ["one", "two"]


@pytest.mark.parametrize("kind", ["csv", "json", "markdown", "plot"])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path, monkeypatch, kind):
    path = tmp_path / "a"
    with pytest.raises(BenchError, match="there is no such folder"):
        benchmark.Files(**{kind: tmp_path / "none" / "a"}).check()
    path.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    with pytest.raises(BenchError, match=r"a cannot be written.*Permission denied"):
        benchmark.Files(**{kind: path}).check()
    with pytest.raises(OptionError, match=r"a cannot be written.*Permission denied"):
        check_plot(path)
    monkeypatch.undo()
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "no/folder")
    with pytest.raises(BenchError, match=r"a cannot be written \(\[Errno 2\].*/a'\)"):
        benchmark.Files(**{kind: path}).check()


def test_pipes_and_devices_get_what_would_be_in_a_file(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    benchmark.Files(json=pipe, markdown=Path("/dev/null")).check()
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    benchmark.write(result(), benchmark.Files(json=pipe))
    reader.join()
    assert '"cells"' in found[0]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.fixture
def converted(tmp_path):
    """A folder with what a conversion's notes are about."""
    folder = tmp_path / "out"
    place = writer.PartialFolder(folder, {}, resume=False)
    for name in ("README.md", "config.json"):
        (place.folder / name).write_text("{}")
    place.finish({"README.md", "config.json"})
    place.close()
    return folder


NOTES = {
    "report": (lambda folder: save(Report(1, 1, {}), folder), "could not be written"),
    "decay": (lambda folder: write_offset(folder, -1), "config.json cannot be written"),
}


@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("most_bytes", [0, 150])
def test_notes_that_do_not_fit_leave_a_converted_folder_as_it_was(converted, note, most_bytes):
    before = {p.name: p.read_bytes() for p in converted.iterdir()}
    write, said = NOTES[note]
    with short_files(most_bytes), pytest.raises(RingError, match=said):
        write(converted)
    assert {p.name: p.read_bytes() for p in converted.iterdir()} == before
    writer.verify(converted)
    (converted / "config.json").chmod(0o640)
    write(converted)
    writer.verify(converted)
    assert {p.name: p.read_bytes() for p in converted.iterdir()} != before
    assert stat.S_IMODE((converted / "config.json").stat().st_mode) == 0o640


def test_a_shard_that_vanished_is_not_taken_for_converted(tmp_path):
    place = writer.PartialFolder(tmp_path / "out", {}, resume=False)
    for shard in ("a.safetensors", "b.safetensors"):
        (place.folder / "x").write_text(shard)
        place.finish_shard(shard, place.folder / "x")
    (place.folder / "b.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"b\.safetensors vanished from .*--resume"):
        place.finish(set())
    assert not (tmp_path / "out").exists()
    place.close()
    place = writer.PartialFolder(tmp_path / "out", {}, resume=True)
    assert [place.has(f"{shard}.safetensors") for shard in "ab"] == [True, False]
    place.close()
