"""A kernel proves itself on this machine before it serves: its first results are held against the plain form's.

What is proved is a variant: the kernel's source, its template arguments, the types of its arrays, and the sizes of its grid and
outputs in powers of two. An operation's call launches one or more. If one of them is unproven, the operation runs both ways.
If the kernel does not build, raises, is not finite or differs, the unproven variants of that call are turned off, and the plain
form serves. Verdicts are kept with the machine (`machine.Store`), so another start does not ask again.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from metal_kernels.agreement import Judge, Judged, agree
from metal_kernels.failures import is_passing, said
from metal_kernels.machine import PROOFS, Store
from metal_kernels.variants import Variant

MOST_KNOWN = 1024
# A process can be killed while it tries a variant, but hardly twice at the same one.
ENDED_TWICE = 2
# What MLX says of an array that stands for others while a function is traced.
TRACED = "function transformations"

Result = Any


class Unproven(Exception):
    """A variant was about to be launched that has no verdict."""


class TurnedOff(Exception):
    """A variant was about to be launched that is off."""


@dataclass
class _Trial:
    """What an operation launched while it was tried."""

    launched: list[Variant] = field(default_factory=list)
    unproven: list[Variant] = field(default_factory=list)
    inputs: list[mx.array] = field(default_factory=list)


trial: ContextVar[_Trial | None] = ContextVar("trial", default=None)
_is_tracing: ContextVar[bool] = ContextVar("tracing", default=False)


@contextmanager
def tracing() -> Iterator[None]:
    """Raise `Unproven` where an operation would be tried, since nothing can be computed while a function is traced."""
    token = _is_tracing.set(True)
    try:
        yield
    finally:
        _is_tracing.reset(token)


class Ledger:
    """The verdicts of one backend: those of this process, and those that are kept in ``store``.

    Attributes:
        turned_off: How often variants were turned off or doubted; steps that were compiled before are not valid then.
        passing: Launches that need not ask again unless a trial is under way, by what is cheap to know of them, which
            includes the id of the template.
    """

    def __init__(self, store: Store) -> None:
        self.turned_off = 0
        self.passing: dict[object, object] = {}
        self._store, self._lock = store, threading.RLock()
        self._verdicts: dict[str, bool] = {}
        self._is_trusting = True
        self._tried_now: set[str] = set()
        self._failing: dict[object, object] = {}

    def admit(
        self, launch: object, template: object, variant: Callable[[], Variant], inputs: Sequence[mx.array]
    ) -> None:
        """Let a launch pass, or note it for the trial that is under way.

        Args:
            launch: As in `passing`.
            template: Its template arguments; kept, so that no other one gets its id.
            variant: Works out what it is a launch of.
            inputs: Its arrays.

        Raises: Unproven if the variant has no verdict and nothing is being tried, TurnedOff if it is off.
        """
        if launch in self._failing:
            raise TurnedOff
        found, under_way = variant(), trial.get()
        verdict = self._verdict(found)
        if verdict is not None:
            known = self.passing if verdict else self._failing
            if len(known) >= MOST_KNOWN:
                known.clear()
            known[launch] = template
        if verdict is False:
            raise TurnedOff
        if under_way is not None:
            under_way.launched.append(found)
            under_way.inputs += inputs
            if verdict is None:
                under_way.unproven.append(found)
        elif verdict is None:
            raise Unproven

    def settle(
        self,
        error: Exception,
        operation: str,
        kernel: Callable[[], Result],
        plain: Callable[..., Result],
        arguments: tuple[Any, ...],
        otherwise: Callable[..., Result],
        judge: Judge = agree,
    ) -> Result:
        """The result of an operation whose kernel just raised: unproven, turned off, or failing for the first time.

        Args:
            error: What it raised.
            operation: Its name.
            kernel: Launches it again.
            plain, arguments: The same by MLX's operations, to which `judge` holds the kernel.
            otherwise: Takes the same arguments in place of a kernel that is off.
        """
        if isinstance(error, TurnedOff):
            return otherwise(*arguments)
        if _is_tracing.get():
            raise Unproven(operation) from error
        with self._lock:
            return self._try(operation, kernel, plain, arguments, otherwise, judge, isinstance(error, Unproven))

    def doubt(self) -> None:
        """Trust no proof from now on, of this process or another: each is made again."""
        self._verdicts = {key: False for key, passed in self._verdicts.items() if not passed}
        self._is_trusting = False
        self._forget_passing()

    def has_tried(self, kind: str) -> bool:
        """Whether a process before this one, or this one, tried all that `note_tried` says."""
        return self._is_trusting and self._store.get(PROOFS, kind) is not None

    def note_tried(self, kind: str) -> None:
        """Keep that all kernels of a kind of model were tried."""
        self._store.put(PROOFS, {kind: {"tried": True}})

    def entries(self) -> list[dict[str, Any]]:
        """All verdicts that are kept, sorted by kernel: kernel, operation, variant, passed, error, why."""
        found = [entry for entry in self._store.all(PROOFS).values() if type(entry.get("passed")) is bool]
        return sorted(found, key=lambda entry: (str(entry.get("kernel")), str(entry.get("variant"))))

    def _try(
        self, operation: str, kernel: Any, plain: Any, arguments: Any, otherwise: Any, judge: Judge, is_new: bool
    ) -> Result:
        """Both ways; the kernel's result if it agrees, else the plain one. ``is_new``: unproven, when it was wanted."""
        tried, problem = _Trial(), ""
        token = trial.set(tried)
        try:
            found = kernel()
        except TurnedOff:
            return otherwise(*arguments)
        except Exception as e:
            if not tried.launched:
                raise  # not the kernel's doing
            found, problem = None, said(e)
            tried.unproven = tried.launched[-1:]
        finally:
            trial.reset(token)
        if is_new and not tried.unproven:
            return found  # another thread has just tried it
        try:
            mx.eval(tried.inputs)  # What fails here is not the kernel's doing either.
        except ValueError as e:
            if TRACED not in str(e):
                raise
            return otherwise(*arguments)
        blamed = tried.unproven or tried.launched
        with self._trying(operation, blamed):
            try:
                expected = plain(*arguments)
                mx.eval(expected)
            except Exception as e:  # noqa: BLE001 as below; what serves in its place may do without it
                self._turn_off(blamed, f"there is nothing to hold it against ({said(e)})")
                return otherwise(*arguments)
            error, wrong = (None, problem) if problem else _judged(judge, operation, arguments, found, expected)
            if wrong is not None:
                self._settle(operation, blamed, error, wrong)
        return found if wrong == "" else expected

    def _verdict(self, variant: Variant) -> bool | None:
        """Whether a variant passed; None if nobody knows."""
        found = self._verdicts.get(variant.key)
        if found is not None:
            return found
        entry = self._store.get(PROOFS, variant.key)
        if entry is None:
            return None
        if type(entry.get("passed")) is bool:
            passed, why = entry["passed"], str(entry.get("why"))
        elif "trying" not in entry:
            return None  # no verdict of ours
        else:
            passed, why = self._deaths(variant, entry) < ENDED_TWICE, "the process that tried it ended, twice"
        if not passed:
            if "trying" in entry:
                kept = {"operation": entry.get("operation"), "passed": False, "error": None, "why": why}
                self._keep([variant], kept)
            self._turn_off([variant], f"{why} (found at an earlier start)")
        elif "trying" in entry or not self._is_trusting:
            return None
        self._verdicts[variant.key] = passed
        return passed

    def _settle(self, operation: str, variants: Sequence[Variant], error: float | None, problem: str) -> None:
        for variant in variants:
            self._verdicts[variant.key] = not problem
        if problem:
            self._turn_off(variants, problem)
        if not problem or not is_passing(problem):
            entry = {"operation": operation, "passed": not problem, "error": error, "why": problem}
            self._keep(variants, entry)

    def _turn_off(self, variants: Sequence[Variant], problem: str) -> None:
        for variant in variants:
            self._verdicts[variant.key] = False
        self._forget_passing()
        named = " and ".join(f"{v.kernel} ({v.words})" for v in variants)
        warnings.warn(
            f"[kernels] {named}: {problem}; MLX's operations take its place, which are slower. Please report this.",
            stacklevel=2,
        )

    def _forget_passing(self) -> None:
        self.turned_off += 1
        self.passing.clear()

    def _keep(self, variants: Sequence[Variant], entry: dict[str, Any] | None) -> None:
        named = {v.key: entry and {"kernel": v.kernel, "variant": v.words, **entry} for v in variants}
        self._store.put(PROOFS, named)

    @contextmanager
    def _trying(self, operation: str, variants: Sequence[Variant]) -> Iterator[None]:
        """Note on disk what is tried: some errors of a GPU end the process, and another start must not try for ever."""
        ended = max(self._deaths(v, self._store.get(PROOFS, v.key) or {}) for v in variants)
        keys = {v.key for v in variants}
        try:
            self._tried_now |= keys
            self._keep(variants, {"operation": operation, "trying": os.getpid(), "ended": ended})
            yield
            variants = [v for v in variants if "trying" in (self._store.get(PROOFS, v.key) or {})]
        finally:  # all of them where it was interrupted: what is in memory may not be on disk
            self._keep(variants, None)
            self._tried_now -= keys  # now that no other thread can take it for another process's

    def _deaths(self, variant: Variant, entry: dict[str, Any]) -> int:
        """How many processes ended while they tried this."""
        before = entry.get("ended")
        before = before if type(before) is int else 0
        pid = entry.get("trying")
        if type(pid) is not int or variant.key in self._tried_now:
            return before
        if pid == os.getpid():  # of an earlier one: in a container all have the same
            return before + 1
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return before + 1
        except (OSError, OverflowError):
            pass
        return before


def _judged(judge: Judge, operation: str, arguments: tuple[Any, ...], found: Result, expected: Result) -> Judged:
    """The verdict on a result that is still to be computed."""
    try:
        mx.eval(found)
        return judge(operation, arguments, found, expected)
    except Exception as e:  # noqa: BLE001 whatever a compiler or a driver raises
        return None, said(e)
