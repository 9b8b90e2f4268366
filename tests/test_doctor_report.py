"""The report of a machine: its parts, each apart from the others' failures, and nothing private in it."""

from __future__ import annotations

import getpass
import json
import os
import platform
import sys

import mlx.core as mx
import pytest

from metal_kernels import launch
from ring_mlx.bench import operations
from ring_mlx.bench.floor import Rates
from ring_mlx.cli import main
from ring_mlx.doctor import report, report_parts
from ring_mlx.doctor.report import PARTS
from ring_mlx.doctor.report_page import page
from ring_mlx.doctor.report_parts import MAKE, SWITCHES
from ring_mlx.tuning import autotune
from tests.fake_mac import FREE, Mac

PRIVATE = {
    "home": "/Users/jane m doe",
    "user": "jane.doe",
    "host": "Janes-MacBook-Pro",
    "token": "sk-planted-4711",
    "folder": "/Volumes/Jane's disk/models/ring",
}
ON = {
    "device": "Apple M2 Pro",
    "system": "Darwin arm64",
    "backend": "metal",
    "kernels": "metal",
    "ring_mlx": "0.1",
    "python": "3.13.1",
}
HEAD = ON | {"model": "mini, random", "weights_gb": 9.2}
BENCH = {
    "head": HEAD,
    "rows": [],
    "table": "| engine |\n| --- |\n| ring-mlx |",
    "dispatches": {"CustomKernel": 120, "Add": 3},
}
GOOD = {
    "operation": "add_qmv",
    "kernel": "ring_qmv",
    "variant": "BITS=4, grid 64x1x1",
    "passed": True,
    "error": 1e-3,
    "why": "",
}
BAD = GOOD | {"variant": "BITS=8 | odd", "passed": False, "error": 0.7, "why": "differs by 0.7 relative RMS"}
FINDING = {"section": "machine", "name": "memory", "status": "ok", "seen": "64.0 GB", "remedy": "", "data": None}
FOUND = {
    "machine": {"on": ON, "device": {"architecture": "applegpu_g14s"}, "stack": {"mlx": "0.32.4"}, "switches": [], "findings": [FINDING]},
    "rates": {"bandwidth_gbps": 180.0, "matmul_tflops": 6.0, "of": "bfloat16"},
    "kernels": {"findings": [FINDING | {"section": "kernels", "name": "router", "seen": "1e-3 | odd"}]},
    "operations": {
        "shape": "mini",
        "rows": [
            {"operation": "route", "tokens": 1, "difference": 0.0, "mlx_us": 30.0, "ours_us": 10.0},
            {"operation": "add_qmv", "tokens": 4, "error": "RuntimeError: no such function"},
        ],
    },
    "tuning": {"made": [{"table": "mini on metal\n\n| choice |\n|---|\n| route/1 |"}]},
    "toy": BENCH,
    "mini": BENCH,
    "proofs": {"entries": [GOOD, GOOD | {"error": 2e-3}, BAD]},
}  # fmt: skip


def runner(**changes):
    """Stands in for the processes: what each part finds, or an exception."""
    made = {name: {"found": found} for name, found in FOUND.items()} | changes

    def run(name, folder):
        if isinstance(made[name], BaseException):
            raise made[name]
        return made[name]

    return run


def read(file):
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


@pytest.fixture
def jane(monkeypatch, tmp_path):
    """A user whose names and folders must not be sent."""
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, PRIVATE["home"] if name == "HOME" else PRIVATE["user"])
    monkeypatch.setenv("API_TOKEN", PRIVATE["token"])
    for switch in SWITCHES:
        monkeypatch.setenv(switch, PRIVATE["token"])
    monkeypatch.setattr(getpass, "getuser", lambda: PRIVATE["user"])
    monkeypatch.setattr(platform, "node", lambda: f"{PRIVATE['host']}.local")
    monkeypatch.setattr(sys, "prefix", PRIVATE["folder"])
    monkeypatch.setattr(sys, "executable", f"{PRIVATE['folder']}/bin/python")


def test_the_page_shows_every_part(tmp_path):
    made = report.make(tmp_path / "r.json", run=runner())
    found, text = read(tmp_path / "r.json")
    assert found == made
    assert found["complete"]
    assert set(found["parts"]) == set(PARTS) == set(MAKE)
    assert text.startswith("# ring-mlx 0.1 on Apple M2 Pro\n")
    for line in (
        "| memory | 64.0 GB |",
        "| architecture | applegpu_g14s |",
        "| router | ok | 1e-3 \\| odd |",
        "180.0 GB/s, 6 TFLOP/s of bfloat16 products.",
        "| add_qmv | ring_qmv | 3 | 2 | 7.0e-01 |",
        "- ring_qmv (BITS=8 | odd): differs by 0.7 relative RMS",
        "| route | 1 | 30.0 | 10.0 | 3.00 | 0.0e+00 |",
        "| add_qmv | 4 |  |  |  | RuntimeError: no such function |",
        "| route/1 |",
        "mini, random: 9.20 GB, 123 dispatches a token.",
        "| ring-mlx |",
    ):
        assert line in text.splitlines()
    assert "**2 failed:**" in text


def test_a_page_fits_into_an_issue():
    many = [BAD | {"variant": f"{n} " + "x" * 200, "operation": f"o{n % 30}"} for n in range(3000)]
    made = {"date": "2026-11-30", "seconds": 1.0, "complete": True, "parts": {"proofs": {"found": {"entries": many}}}}
    text = page(made, report.problems(made))
    assert len(text) < 65_536
    assert "and 2960 more, in the JSON" in text


def test_nothing_private_is_sent(jane, tmp_path):
    said = [
        f"{PRIVATE['home']}/.venv/lib/x.py: {PRIVATE['user']} on {PRIVATE['host']}.local may not read {PRIVATE['folder']}/a"
    ]
    said += ["error in /private/var/folders/zz/T/abc/kernel.metal:12, JANE.DOE at " + PRIVATE["host"].upper()]

    def run(name, folder):
        if name in ("machine", "kernels", "operations", "proofs"):
            return {"found": MAKE[name](), "said": said}
        return {"error": f"OSError: {said[0]}", "said": said}

    with launch.use(None):  # times nothing on a GPU
        made = report.make(tmp_path / "r.json", run=run)
    assert made["parts"]["machine"]["found"]["switches"] == list(SWITCHES)
    for text in (tmp_path.joinpath(name).read_text() for name in ("r.json", "r.md")):
        low = text.lower()
        assert not [name for name, value in PRIVATE.items() if value.lower() in low]
        assert not [
            word for word in ("jane", "/private", "/volumes", "/users", os.environ["HOME"].lower()) if word in low
        ]
        assert "kernel.metal:12" in text
        assert "<user> on <host>" in text


def test_a_time_of_day_and_a_number_of_the_card_are_not_told(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "applegpu_g14s", "uuid": "GPU-4711"})
    found = report_parts.machine()
    assert found["device"] == {"architecture": "applegpu_g14s"}
    assert "date" not in found["on"]
    assert "python" in found["on"]
    assert "Python" not in {f["name"] for f in found["findings"]}  # it names a folder


def test_a_part_that_fails_is_a_line_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "in_a_process", runner(rates={"error": "not done after 60 s"}))
    assert main(["doctor", "--report", str(tmp_path / "r.json")]) == 1
    out, err = capsys.readouterr()
    first, *others = err.splitlines()
    assert "the report takes about 2.5 minutes, at most" in first
    assert "[doctor] rates: not done after 60 s" in err
    assert "[doctor] ring_qmv (BITS=8 | odd): differs" in err
    assert out.count("r.md") == 2
    found, text = read(tmp_path / "r.json")
    assert found["parts"]["rates"]["error"] == "not done after 60 s"
    assert found["complete"]
    assert "\nnot done after 60 s\n" in text
    assert others


def test_what_is_interrupted_keeps_what_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "in_a_process", runner(kernels=KeyboardInterrupt()))
    assert main(["doctor", "--report", str(tmp_path / "r.json")]) == 130
    found, text = read(tmp_path / "r.json")
    assert list(found["parts"]) == ["machine", "rates", "kernels"]
    assert not found["complete"]
    assert "180.0 GB/s" in text
    assert "It is not complete." in text
    assert "hold what was done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--report", "r.md"), "would have the same name; end it in .json"),
        (("--report", "r.MD"), "would have the same name; end it in .json"),
        (("--report", ""), "names no file"),
        (("--report", "."), "names no file"),
        (("--report", "mine.json"), "mine.md is there and no page of a report"),
        (("--report", "folder"), "cannot be written"),
        (("--report", "r.json", "--json"), "leave one of them out"),
        (("--report", "r.json", "--tune"), "--tune and --report are tasks of their own"),
        (("--report", "r.json", "--check-decay", "x"), "--check-decay and --report are tasks of their own"),
    ],
)
def test_refusals_come_before_anything_is_timed(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.md").write_text("# ring-mlx\n")
    monkeypatch.setattr(report, "in_a_process", lambda *_: pytest.fail("too late"))
    assert main(["doctor", *words]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "mine.md").read_text() == "# ring-mlx\n"


@pytest.mark.parametrize(("user", "host"), [("max", "mini.local"), ("parts", "found.error"), ("machine", "seconds")])
def test_names_that_are_words_of_a_report_break_none(tmp_path, monkeypatch, user, host):
    monkeypatch.setattr(getpass, "getuser", lambda: user)
    monkeypatch.setattr(platform, "node", lambda: host)
    machine = FOUND["machine"] | {"on": ON | {"device": "Apple M3 Max"}}
    for _ in range(2):  # the second replaces the page of the first
        report.make(tmp_path / "r.json", run=runner(machine={"found": machine}))
    found, text = read(tmp_path / "r.json")
    assert set(found["parts"]) == set(PARTS)
    assert text.startswith("# ring-mlx 0.1 on Apple M3 Max\n")
    assert "## Speed: mini's shapes" in text


def test_a_disk_that_fills_up_is_a_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "r.json")

    monkeypatch.setattr(report, "in_a_process", runner())
    monkeypatch.setattr(report, "write_named", full)
    assert main(["doctor", "--report", str(tmp_path / "r.json")]) == 2
    assert "r.json cannot be written (No space left on device); free some space." in capsys.readouterr().err


def test_a_process_of_its_own(tmp_path):
    found = report.in_a_process("proofs", tmp_path)["found"]
    assert found["entries" if launch.backend() else "skipped"]


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("echo '[METAL] Command buffer failed' >&2; kill -6 $$", "(signal 6): [METAL] Command buffer failed"),
        ("exit 3", "(exit code 3): it said nothing"),
        ("echo half > $5; exit 0", "(exit code 0): it said nothing"),
        ("sleep 50", "not done after 0 s"),
    ],
)
def test_a_process_that_crashes_or_hangs(tmp_path, monkeypatch, does, said):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    if "sleep" in does:
        monkeypatch.setitem(PARTS, "rates", PARTS["rates"]._replace(limit_s=0.05))
    assert said in report.in_a_process("rates", tmp_path)["error"]


def test_a_part_that_raises_says_why(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("[metal::malloc]\n too much")

    monkeypatch.setitem(MAKE, "rates", fail)
    assert report_parts.main("rates", str(tmp_path / "x")) == 0
    assert json.loads((tmp_path / "x").read_text()) == {"error": "RuntimeError: [metal::malloc] too much"}


def test_operations_are_timed_and_one_that_fails_costs_no_other(monkeypatch):
    def refuse(x):
        raise RuntimeError("does not build")

    backend = launch.Backend("metal", lambda **_: None)
    monkeypatch.setattr(report_parts, "OPERATION_TOKENS", (1, 512))
    monkeypatch.setattr(
        operations, "cases", lambda *_: iter([("bad", refuse, mx.ones(4)), ("sum", mx.negative, mx.ones(4))])
    )
    with launch.use(backend):
        rows = report_parts.operations()["rows"]
    assert [(r["operation"], r["tokens"], r.get("error")) for r in rows] == [
        ("bad", 1, "RuntimeError: does not build"),
        ("sum", 1, None),
        ("bad", 512, "RuntimeError: does not build"),
        ("sum", 512, None),
    ]
    assert all(r["difference"] == 0 and r["mlx_us"] > 0 and r["ours_us"] > 0 for r in rows if "error" not in r)


@pytest.mark.parametrize(
    ("recommended", "free", "what"),
    [
        (24, 90, {"random": "mini", "layers": 20}),
        (7, 90, {"random": "mini", "layers": 10}),
        (24, 12, {"random": "mini", "layers": 10}),
    ],
)
def test_as_much_of_mini_as_fits(monkeypatch, recommended, free, what):
    Mac(monkeypatch, **{FREE: free}).metal(max_recommended_working_set_size=recommended << 30)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert report_parts._mini() == what


def test_mini_is_left_out_where_it_does_not_fit_or_would_take_minutes(monkeypatch):
    Mac(monkeypatch, **{FREE: 2}).metal()
    assert "no GPU" in report_parts._mini()["skipped"]
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert report_parts._mini()["skipped"].startswith("5 layers of mini need 2.8 GB, and")


def test_speeds_dispatches_and_choices_are_found(monkeypatch):
    for name, value in (("CPU_CONTEXTS", (16, 32)), ("CONTEXTS", (16, 32)), ("GENERATE", 2), ("REPEATS", 1)):
        monkeypatch.setattr(report_parts, name, value)
    monkeypatch.setattr(report_parts, "TRIED", ((1, 2), (3, 4)))
    monkeypatch.setattr(autotune, "SECONDS", 0.05)
    monkeypatch.setattr("ring_mlx.bench.run.measure_rates", lambda: Rates(1e9, 1e12, "float32"))
    monkeypatch.setattr(report_parts, "_mini", lambda: {"random": "golden", "layers": 4})
    for found in (report_parts.toy(), report_parts.mini()):
        assert [row["context"] for row in found["rows"]] == [16, 32]
        assert all(row["decode_tps_median"] > 0 for row in found["rows"])
        assert found["head"]["bandwidth_gbps"] > 0
        assert sum(found["dispatches"].values()) > 50
        assert "date" not in found["head"]
        assert not found["head"].keys() & found["rows"][0].keys()
    assert [made["table"].count("prefill_step") for made in report_parts.tuning()["made"]] == [1, 1]
