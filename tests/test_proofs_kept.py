"""Verdicts that outlive a process, and what is no fault of a kernel; one small kernel stands for all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

from metal_kernels import dispatch, launch, proofs
from metal_kernels.linear_gate import fused
from metal_kernels.linear_gate.naive import naive_linear_gate
from metal_kernels.machine import PROOFS, Store
from metal_kernels.variants import Variant
from tests import python_kernels
from tests.compare import assert_close
from tests.kernel_backends import mutated, proving

HERE = {"chip": "M1"}
WEIGHT = mx.array([1.0, 0.5, 2.0, 1.5] * 6)


@pytest.fixture(autouse=True)
def in_python(monkeypatch):
    monkeypatch.setattr(launch.Kernel, "_build", python_kernels.hand_over)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.json"


def x(rows=4, seed=0):
    return mx.random.normal((rows, 24), key=mx.random.key(seed))


def gate(x):
    return dispatch.linear_gate(x, x, WEIGHT, 3, 1e-6)


def right(x):
    return naive_linear_gate(x, x, WEIGHT, 3, 1e-6)


class Machine:
    """One process after another on one machine: each counts its launches and what the plain form was asked."""

    def __init__(self, path, monkeypatch, spoil=None, identity=HERE):
        self.launched, self.plain = [], []
        self.where = proving(python_kernels.construct(spoil, self.launched), store=Store(path, identity))
        monkeypatch.setattr(dispatch, "naive_linear_gate", lambda *a: self.plain.append(1) or naive_linear_gate(*a))

    def run(self, *arrays):
        with launch.use(self.where):
            return [gate(a) for a in arrays]

    @property
    def counts(self):
        return len(self.launched), len(self.plain)


def wrong(name, template, outputs):
    return [x + 1 for x in outputs]


def test_another_start_tries_nothing_again(path, monkeypatch):
    first = Machine(path, monkeypatch)
    first.run(x(), x(), x(seed=1))
    assert first.counts == (3, 1)
    again = Machine(path, monkeypatch)
    assert_close(again.run(x())[0], right(x()))
    assert again.counts == (1, 0)
    (entry,) = again.where.ledger.entries()
    assert (entry["kernel"], entry["operation"], entry["passed"]) == ("ring_linear_gate", "linear_gate", True)
    assert entry["error"] < 1e-6


@pytest.mark.parametrize("change", ["identity", "source", "types", "grid", "template"])
def test_what_differs_is_tried(path, monkeypatch, change):
    Machine(path, monkeypatch).run(x())
    again = Machine(path, monkeypatch, identity={"chip": "M2"} if change == "identity" else HERE)
    if change == "source":
        with mutated(fused.KERNEL, ("{", "{ ")):
            again.run(x())
    elif change == "types":
        again.run(x().astype(mx.bfloat16))
    elif change == "grid":
        again.run(x(40))
    elif change == "template":
        with launch.use(again.where):
            dispatch.linear_gate(x(), x(), WEIGHT, 2, 1e-6)
    else:
        again.run(x())
    assert again.counts == (1, 1)


def test_a_fault_is_not_run_again_and_told_once_a_start(path, monkeypatch):
    with pytest.warns(UserWarning, match="differs by .* MLX's operations take its place") as told:
        found = Machine(path, monkeypatch, wrong).run(x(), x())
    assert len(told) == 1
    assert_close(found[0], right(x()))
    again = Machine(path, monkeypatch, wrong)
    with pytest.warns(UserWarning, match=r"ring_linear_gate .*found at an earlier start") as told:
        found = again.run(x(), x())
    assert len(told) == 1
    assert not again.launched
    assert_close(found[1], right(x()))


@pytest.mark.parametrize("passed", ["yes", 1, None, [True], {}])
def test_what_is_no_verdict_of_ours_is_none(path, monkeypatch, passed):
    Machine(path, monkeypatch).run(x())
    store = Store(path, HERE)
    for key, entry in store.all(PROOFS).items():
        store.put(PROOFS, {key: {**entry, "passed": passed}})
    again = Machine(path, monkeypatch)
    assert again.where.ledger.entries() == []
    again.run(x(), x())
    assert again.counts == (2, 1)
    assert [entry["passed"] for entry in again.where.ledger.entries()] == [True]


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("pid_of", [ended_process, os.getpid])  # in a container each process has the same number
@pytest.mark.parametrize(("ended", "is_tried"), [(0, True), (1, False)])
def test_a_kernel_that_ends_the_process_twice_is_not_tried_a_third_time(path, monkeypatch, ended, is_tried, pid_of):
    Machine(path, monkeypatch).run(x())
    store, pid = Store(path, HERE), pid_of()
    for key, entry in store.all(PROOFS).items():
        store.put(PROOFS, {key: {"kernel": entry["kernel"], "variant": "", "trying": pid, "ended": ended}})
    again = Machine(path, monkeypatch)
    if is_tried:
        again.run(x())
    else:
        with pytest.warns(UserWarning, match="process that tried it ended"):
            again.run(x())
    assert again.counts == (int(is_tried), 1)
    assert [entry["passed"] for entry in Store(path, HERE).all(PROOFS).values()] == [is_tried]


@pytest.mark.parametrize("entry", [{}, {"trying": "x"}, {"trying": -1, "ended": "many"}, {"passed": None, "why": 3}])
def test_a_strange_entry_is_no_proof(path, monkeypatch, entry):
    Machine(path, monkeypatch).run(x())
    store = Store(path, HERE)
    store.put(PROOFS, dict.fromkeys(store.all(PROOFS), entry))
    again = Machine(path, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(again.run(x())[0], right(x()))
    assert len(again.plain) == 1


def test_what_is_tried_is_on_disk_before_it_runs(path, monkeypatch):
    def look(*arguments):
        seen.extend(Store(path, HERE).all(PROOFS).values())
        return judged(*arguments)

    seen, judged = [], proofs._judged
    monkeypatch.setattr(proofs, "_judged", look)
    Machine(path, monkeypatch).run(x())
    assert [entry.get("trying") for entry in seen] == [os.getpid()]
    assert [entry["passed"] for entry in Store(path, HERE).all(PROOFS).values()] == [True]


@pytest.mark.parametrize("moment", ["judged", "noted", "settled", "settled in memory"])
def test_a_try_that_is_interrupted_leaves_nothing(path, monkeypatch, moment):
    def interrupted(*arguments):
        if moment == "settled in memory" and written == [None]:
            m.setattr(machine.where.ledger._store, "path", None)
        written.append(keep(*arguments) if moment != "judged" else None)
        m.setattr(machine.where.ledger._store, "path", path)
        if len(written) == (2 if "settled" in moment else 1):
            raise KeyboardInterrupt

    machine, keep, written = Machine(path, monkeypatch), proofs.Ledger._keep, []
    with monkeypatch.context() as m:
        m.setattr(*(proofs, "_judged") if moment == "judged" else (proofs.Ledger, "_keep"), interrupted)
        with pytest.raises(KeyboardInterrupt):
            machine.run(x())
    assert not [entry for entry in Store(path, HERE).all(PROOFS).values() if "trying" in entry]
    again = Machine(path, monkeypatch)
    again.run(x())
    assert again.where.ledger.entries()[0]["passed"]


def test_no_thread_takes_a_try_of_this_process_for_one_that_ended(path, monkeypatch):
    """Another one may look before and after each note."""
    machine, keep, seen = Machine(path, monkeypatch), proofs.Ledger._keep, []

    def deaths(ledger, variants):
        return [ledger._deaths(v, ledger._store.get(PROOFS, v.key) or {}) for v in variants]

    def look(ledger, variants, entry):
        seen.append(deaths(ledger, variants))
        keep(ledger, variants, entry)
        seen.append(deaths(ledger, variants))

    monkeypatch.setattr(proofs.Ledger, "_keep", look)
    monkeypatch.setattr(proofs, "_judged", lambda *_: (None, None))
    machine.run(x())
    assert seen == [[0]] * 4


IOGPU = "[METAL] Command buffer execution failed: %s (0000000e:kIOGPUCommandBufferCallbackError%s)"
PASSING = [
    "[malloc] Unable to allocate 5 bytes.",
    "std::bad_alloc",
    "",  # of a MemoryError
    "[metal::malloc] Resource limit (499000) exceeded.",
    "cudaMallocAsync(&p, 5) failed: out of memory",
    IOGPU % ("Insufficient Memory", "OutOfMemory"),
    IOGPU % ("Innocent Victim of GPU Error/Recovery", "InnocentVictim"),
    IOGPU % ("Impacting Interactivity", "ImpactingInteractivity"),
    IOGPU % ("Ignored (for causing prior/excessive GPU errors)", "SubmissionsIgnored"),
]
LASTING = [
    "an illegal memory access was encountered",
    "Threadgroup memory size (36864) exceeds the maximum threadgroup memory allowed (32768)",
    IOGPU % ("Caused GPU Address Fault Error", "PageFault"),
    IOGPU % ("Caused GPU Timeout Error", "Timeout"),
]


@pytest.mark.parametrize("said", [*PASSING, *LASTING])
def test_short_memory_and_work_of_others_are_not_held_against_a_kernel_at_the_next_start(path, monkeypatch, said):
    def fail(name, template, outputs):
        raise RuntimeError(said) if said else MemoryError

    machine = Machine(path, monkeypatch, fail)
    with pytest.warns(UserWarning, match="MLX's operations take its place"):
        machine.run(x(), x())
    assert machine.counts == (1, 2)
    assert [entry["passed"] for entry in Store(path, HERE).all(PROOFS).values()] == [False] * (said in LASTING)


def test_a_failure_before_the_kernel_is_not_the_kernels(path, monkeypatch):
    machine = Machine(path, monkeypatch)
    missing = mx.load(str(_cut(path.parent / "cut.npy")))
    with pytest.raises(RuntimeError):
        machine.run(missing)
    assert machine.where.ledger.entries() == []
    assert machine.run(x())
    q, state = mx.zeros((1, 3, 2, 32)), mx.zeros((1, 2, 32, 7))
    with launch.use(machine.where), pytest.raises(ValueError, match="state must be"):
        dispatch.lightning_attn(q, q, q, mx.ones(2), 1.0, state)


def _cut(path):
    mx.save(str(path), mx.zeros((40, 24)))
    path.write_bytes(path.read_bytes()[:500])
    return path


def test_a_plain_form_that_fails_leaves_what_serves_without_it(path, monkeypatch):
    machine, arguments = Machine(path, monkeypatch), (x(), x(), WEIGHT, 3, 1e-6)

    def fails(*_):
        raise RuntimeError("no such product on this device")

    with launch.use(machine.where), pytest.warns(UserWarning, match=r"nothing to hold it against \(no such product"):
        found = dispatch._served("linear_gate", fused.fused_linear_gate, fails, arguments, naive_linear_gate)
    assert_close(found, right(x()))
    assert not Store(path, HERE).all(PROOFS)


def test_a_plain_form_that_is_not_finite_says_nothing(path, monkeypatch):
    machine, strange = Machine(path, monkeypatch), x()
    strange[1, 3] = mx.nan
    (found,) = machine.run(strange)
    assert machine.where.ledger.entries() == []
    assert mx.array_equal(found, right(strange), equal_nan=True)
    assert not Store(path, HERE).all(PROOFS)
    machine.run(x())
    assert machine.where.ledger.entries()[0]["passed"]


def test_a_function_that_is_transformed_gets_the_plain_form_until_the_kernel_is_proven(path, monkeypatch):
    machine = Machine(path, monkeypatch)
    with launch.use(machine.where):
        assert_close(mx.vmap(gate)(x()), right(x()))
        assert machine.where.ledger.entries() == []
        with proofs.tracing(), pytest.raises(proofs.Unproven):
            gate(x())
        gate(x())
        with proofs.tracing():
            gate(x())
    assert len(machine.plain) == 2


def test_after_doubt_all_is_tried_again_also_what_was_kept(path, monkeypatch):
    Machine(path, monkeypatch).run(x())
    again = Machine(path, monkeypatch)
    again.run(x())
    assert again.counts == (1, 0)
    before = again.where.ledger.turned_off
    again.where.ledger.doubt()
    assert again.where.ledger.turned_off > before
    again.run(x(), x())
    assert again.counts == (3, 1)


def test_a_proven_kernel_that_raises_later_is_off_and_the_call_goes_on(path, monkeypatch):
    broken = []
    machine = Machine(path, monkeypatch, lambda name, template, out: out if not broken else 1 / 0)
    machine.run(x())
    broken.append(True)
    with pytest.warns(UserWarning, match="division by zero"):
        (found,) = machine.run(x())
    assert_close(found, right(x()))
    assert not machine.where.ledger.entries()[0]["passed"]


def test_threads_prove_one_kernel_together(path, monkeypatch):
    machine = Machine(path, monkeypatch)

    def work(seed):
        (found,) = machine.run(x(seed=seed))
        mx.eval(found)
        return found

    judged, together = proofs._judged, threading.Barrier(6)
    monkeypatch.setattr(proofs, "_judged", lambda *a: time.sleep(0.05) or judged(*a))  # so that others come meanwhile
    # Around all threads: the default device is one for the process, and threads that each set and restore it leave another.
    with mx.stream(mx.cpu), ThreadPoolExecutor(6, initializer=together.wait) as pool:
        found = list(pool.map(work, range(30)))
    for seed, y in enumerate(found):
        assert_close(y, right(x(seed=seed)))
    assert [entry["passed"] for entry in machine.where.ledger.entries()] == [True]
    assert len(machine.plain) == 1


def test_a_proven_launch_is_known_by_all_that_tells_variants_apart(monkeypatch):
    kernel = launch.Kernel(fused.KERNEL.file, ("x", "gate"), ("y",))
    where, asked = proving(lambda *_: lambda **_: []), []
    monkeypatch.setattr(launch, "variant_of", lambda *a: asked.append(1) or Variant("k", "kernel", "words"))
    where.ledger._verdicts["k"] = True
    a, b, template = mx.zeros(8), mx.ones(8), [("N", 3)]
    usual = {"inputs": [a, b], "template": template, "grid": (32, 1, 1), "shapes": [(8,)]}

    def run(**changes):
        asked.clear()
        kernel(**{**usual, **changes}, threadgroup=(32, 1, 1), dtypes=[mx.float32])
        return len(asked)

    with launch.use(where):
        assert (run(), run(), run(inputs=[b, a])) == (1, 0, 0)
        assert template in where.ledger.passing.values()  # held, so that its id stays its own
        for other in (
            {"inputs": [a, a]},
            {"inputs": [a.astype(mx.float16), b]},
            {"template": [("N", 3)]},
            {"grid": (64, 1, 1)},
            {"shapes": [(9,)]},
        ):
            assert (run(**other), run(**other)) == (1, 0), other
        assert run() == 0
        monkeypatch.setattr(proofs, "MOST_KNOWN", 4)
        kept = [[("N", n)] for n in range(20)]
        assert sum(run(template=t) for t in kept) == 20
        assert len(where.ledger.passing) <= 4
        where.ledger._verdicts["k"] = False
        where.ledger.doubt()
        for count in (1, 0):
            with pytest.raises(proofs.TurnedOff):
                run()
            assert len(asked) == count
