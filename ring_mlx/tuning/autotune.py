"""All choices of a model in order, within seconds in all; kept beside the proofs of this machine, and applied at a load.

The choices of one token come first, then those of prompts, then those of a few tokens. Each begins with what those before
it chose. At the end the tables and all that was chosen are timed against each other once more, for each kind of work, and
what is not faster then is given up.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from metal_kernels import choices, machine
from metal_kernels.choices import Value
from metal_kernels.launch import sources as _sources
from ring_mlx.errors import RingError
from ring_mlx.model import decode_step
from ring_mlx.model.model import Model
from ring_mlx.system.progress import Progress
from ring_mlx.system.wired import Wired
from ring_mlx.tuning import workloads
from ring_mlx.tuning.race import NO_TIME, Budget, Run, Verdict, race, said

SECONDS = 10.0
# Of all, what the second look at the end may take.
LAST_LOOK = 0.2
NOTICE = (
    f"[tuning] the first model of this kind on this machine: for up to {SECONDS:.0f} s it is timed what is fast here, and "
    f"kept; --no-tune or {choices.SWITCH}=off leaves that out."
)
TABLES, CHOSEN = "tables", "chosen"
STEP = "prefill_step"
_waits: list[bool] = []
# Of the seconds for single choices, by kind of work.
SHARES = {choices.ONE: 0.5, choices.MANY: 0.25, STEP: 0.1, choices.FEW: 0.08, choices.EIGHT: 0.07}
KINDS = {
    choices.ONE: "decoding one row",
    choices.MANY: "reading a prompt",
    STEP: "reading in steps",
    choices.FEW: "decoding 4 rows, and 4 tokens a step",
    choices.EIGHT: "decoding 8 rows, and 8 tokens a step",
}


class TuningError(RingError, origin="tuning"):
    """The work to time cannot run."""


@dataclass
class Tuning:
    """The result for one kind of model on one backend; ``chosen`` has only differences from the tables.

    The verdicts are of each choice, then of each kind of work with all of them; ``buffers`` is that on command buffers.
    """

    label: str
    backend: str
    chosen: dict[str, Value] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0
    buffers: Verdict | None = None

    def as_dict(self) -> dict[str, Any]:
        buffers = self.buffers and self.buffers.as_dict()
        return asdict(self) | {"verdicts": [v.as_dict() for v in self.verdicts], "buffers": buffers}


def settle(model: Model, progress: Progress | None = None) -> None:
    """Use this machine's choices for such a model; on a GPU make them now if there are none.

    ``RING_MLX_TUNE=off`` leaves the tables. With experts that are read on demand nothing is timed, since that would time the disk.
    """
    where = choices.where()
    if choices.is_off():
        choices.apply({}, where)
        return
    found = stored(model, where)
    is_wanted = found is None and not _waits and where in decode_step.COMPILED_ON
    if is_wanted and not _is_streamed(model):
        _first_load(model, where, progress)
        found = stored(model, where)
    choices.apply({} if found is None else found.get("chosen"), where)


def _first_load(model: Model, where: str, progress: Progress | None) -> None:
    """Time and keep. If that ends the process, or fails, later loads use the tables and do not try again."""
    tables = Tuning(shape_class(model)[0], where)
    if not keep(model, tables, "timing did not end"):  # a later load would not know, and every one would take as long
        _forget(model, where)
        return
    warnings.warn(NOTICE, stacklevel=4)
    try:
        keep(model, tune(model, Budget(SECONDS), progress))
    except TuningError as e:
        warnings.warn(f"{e}", stacklevel=4)
        keep(model, tables, str(e))
    except BaseException:
        _forget(model, where)
        raise


def _forget(model: Model, where: str) -> None:
    machine.store(where).put(machine.CHOICES, {shape_class(model)[1]: None})


@contextmanager
def later() -> Iterator[None]:
    """Time nothing at a load within this context; earlier choices are used."""
    _waits.append(True)
    try:
        yield
    finally:
        _waits.pop()


def stored(model: Model, where: str) -> dict[str, Any] | None:
    """The kept choices for such a model with these kernels, or None."""
    found = machine.store(where).get(machine.CHOICES, shape_class(model)[1])
    return found if found is not None and is_current(found) else None


def is_current(entry: Mapping[str, Any]) -> bool:
    """Whether kept choices were timed with these kernels."""
    return entry.get("sources") == _sources()


def keep(model: Model, tuning: Tuning, problem: str = "") -> bool:
    """Keep the result, or why there is none; returns whether other processes will find it."""
    entry = tuning.as_dict() | {"sources": _sources(), "problem": problem}
    return machine.store(tuning.backend).put(machine.CHOICES, {shape_class(model)[1]: entry})


def tune(model: Model, budget: Budget, progress: Progress | None = None) -> Tuning:
    """Time every choice of this model; raises TuningError if the present choices cannot run. Changes nothing."""
    try:
        with Wired():
            return _tune(model, budget, progress)
    except Exception as e:  # a load must not fail by it, whatever MLX raises
        raise TuningError(f"nothing could be timed ({said(e)}); the tables are used.") from e
    finally:
        mx.clear_cache()  # an answer wants the memory


def _tune(model: Model, budget: Budget, progress: Progress | None) -> Tuning:
    where, began = choices.where(), budget.clock()
    tuning = Tuning(shape_class(model)[0], where)
    races = _Races(model, where, tuning.chosen, budget, progress)
    tuning.verdicts = [*races.run(), *_last_look(model, tuning.chosen, budget)]
    tuning.seconds = budget.clock() - began
    if progress:
        progress(len(races.names), len(races.names))
    return tuning


class _Races:
    """Races of single choices, each on top of those before it, which ``chosen`` holds."""

    def __init__(
        self, model: Model, where: str, chosen: dict[str, Value], budget: Budget, progress: Progress | None
    ) -> None:
        self._model, self._where, self._chosen, self._progress = model, where, chosen, progress
        self._budget = budget.part((1 - LAST_LOOK) * budget.left_s())
        self.names = [name for name, entry in choices.TABLE.items() if len(entry.values_on(where)) > 1]
        self._verdicts: dict[str, Verdict] = {}
        self._runs: dict[str, tuple[dict[str, Value], Run]] = {}  # of what holds, by kind
        self._told = 0
        self._first_s = 0.0  # the longest first run of a kind of work

    def run(self) -> list[Verdict]:
        """Those that this model asks for; what had no time gets what is left at the end, when its kernels are compiled."""
        for kind, of_kind in groupby(self.names, kind_of):
            self._run_kind(kind, list(of_kind))
        for name in [n for n, v in self._verdicts.items() if not v.seconds and kind_of(n) in self._runs]:
            self._race(name, self._budget.part(self._budget.left_s() / 2))
        return list(self._verdicts.values())

    def _run_kind(self, kind: str, names: list[str]) -> None:
        """Choices of one kind of work: each may spend half of the kind's rest, since those that matter most come first."""
        if self._budget.left_s() <= self._first_s:
            for name in names:
                self._give_up(name)
            return
        asked = self._asked_for(kind, names[0])
        kinds = list(dict.fromkeys(map(kind_of, self.names)))
        left = sum(SHARES[k] for k in kinds[kinds.index(kind) :])
        part = self._budget.part(self._budget.left_s() * SHARES[kind] / left)
        names = [name for name in names if name in asked]
        for done, name in enumerate(names):
            self._race(name, part.part(part.left_s() * max(1 / 2, 1 / (len(names) - done))))

    def _asked_for(self, kind: str, name: str) -> set[str]:
        """The choices that the model asks for in a kind of work, known after a first run."""
        began = self._budget.clock()
        with choices.use({}) as asked:
            run = workloads.work(self._model, name, {})
            run(1)
        self._runs[kind] = {}, run
        self._first_s = max(self._first_s, self._budget.clock() - began)
        return asked

    def _give_up(self, name: str) -> None:
        entry = choices.TABLE[name]
        default, values = entry.default_on(self._where), entry.values_on(self._where)
        self._verdicts[name] = Verdict(name, default, default, {}, dict.fromkeys(values, NO_TIME))

    def _race(self, name: str, budget: Budget) -> None:
        if self._progress:
            about = f"timing what is fast here: {choices.TABLE[name].about}"
            self._told = max(self._told, self.names.index(name))
            self._progress(self._told, len(self.names), about, self._budget.left_s())
        entry = choices.TABLE[name]
        values = workloads.fitting_steps(self._model) if name == STEP else entry.values_on(self._where)
        default = entry.default_on(self._where)
        verdict = race(name, {v: self._way(name, v, default) for v in values}, default, budget)
        self._verdicts[name] = verdict
        if verdict.chosen != default:
            self._chosen[name] = verdict.chosen

    def _way(self, name: str, value: Value, default: Value) -> Run:
        """A run that is made at its first call, so that making it counts as its first run."""
        made: list[Run] = []
        kind = kind_of(name)
        chosen = self._chosen | ({} if value == default else {name: value})

        def run(times: int) -> None:
            if not made:
                known, before = self._runs[kind]
                made.append(before if known == chosen else workloads.work(self._model, name, chosen))
                if value == default:
                    self._runs[kind] = dict(chosen), made[0]
            made[0](times)

        return run


def kind_of(name: str) -> str:
    """The kind of work with which a choice is timed: a key of `KINDS`."""
    return STEP if name == STEP else name.partition("/")[2]


def _last_look(model: Model, chosen: dict[str, Value], budget: Budget) -> Iterator[Verdict]:
    """Time the tables against all choices, for each kind of work; removes choices that are not faster from ``chosen``."""
    for kind, about in KINDS.items():
        names = [name for name in chosen if kind_of(name) == kind]
        if not names:
            continue
        runs: dict[Value, Run] = {
            TABLES: workloads.work(model, names[0], {}),
            CHOSEN: workloads.work(model, names[0], dict(chosen)),
        }
        verdict = race(about, runs, TABLES, budget)
        if verdict.seconds and verdict.chosen != CHOSEN:
            for name in names:
                del chosen[name]
        yield verdict


def shape_class(model: Model) -> tuple[str, str]:
    """What kind of model this is, for people, and its name in the store: equal for equal shapes of all weights."""
    c = model.config
    arrays = sorted((name, a.shape, str(a.dtype)) for name, a in tree_flatten(model.parameters()))
    bits = sorted({m.bits for m in model.modules() if hasattr(m, "bits")})
    experts = f", {c.num_experts} experts" if c.num_experts else ""
    packed = f", {' and '.join(map(str, bits))} bits" if bits else ""
    label = f"{c.num_hidden_layers} layers of {c.hidden_size}{experts}{packed}{', exact' if model.exact else ''}"
    return label, hashlib.sha256(repr((label, arrays)).encode()).hexdigest()[:16]


def _is_streamed(model: Model) -> bool:
    return any(getattr(layer.mlp, "is_streamed", False) for layer in model.layers)
