"""Keeps the proofs of kernels and the choices of tuning for this machine, from process to process.

A file holds those of one identity (chip, system, driver, MLX, backend), and is never read under another. Nothing is kept of
models, prompts, paths or users. ``RING_MLX_MACHINE`` names another folder than the cache's ``machine``; with ``off`` nothing is
read or written. A file that is broken, foreign or cannot be read or written counts as none: it costs time, never an answer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

SWITCH = "RING_MLX_MACHINE"
PROOFS, CHOICES = "proofs", "choices"
FORMAT = 1
MOST_BYTES = 4_000_000
LOCK_WAIT_S = 0.5
DRIVER = Path("/sys/module/nvidia/version")

Entries = dict[str, dict[str, Any]]


def cache_folder() -> Path:
    """Where ring-mlx keeps what can be made again: XDG_CACHE_HOME or ~/.cache; no folder for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull if root.startswith("~") else root) / "ring-mlx"


@cache
def identity(backend: str) -> dict[str, str]:
    """What a proof or a choice holds for: chip, operating system, versions, and the name of the backend."""
    try:
        info = mx.device_info()
    except Exception:  # noqa: BLE001 without a name the machine is one like others
        info = {}
    mac = platform.mac_ver()[0]
    return {
        "backend": backend,
        "chip": str(info.get("device_name", "unknown")),
        "architecture": str(info.get("architecture", platform.machine())),
        "os": f"{'macOS' if mac else platform.system()} {mac or platform.release()}",
        "build": platform.version(),  # an update that keeps the version brings another compiler too
        "driver": _driver(),
        "mlx": str(getattr(mx, "__version__", "unknown")),
    }


def _driver() -> str:
    try:
        return DRIVER.read_text(encoding="utf-8").strip()[:100]
    except (OSError, ValueError):
        return ""


class Store:
    """The entries of one identity, in memory and in a file (``path`` None: in memory only).

    Safe under threads and beside other processes.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, str]) -> None:
        self.path, self.identity = path, dict(identity)
        self._lock = threading.Lock()
        self._wait_s = LOCK_WAIT_S
        self._entries: dict[str, Entries] | None = None
        self._own: dict[str, dict[str, dict[str, Any] | None]] = {}

    def all(self, namespace: str) -> Entries:
        """A copy of all entries; what other processes wrote after the first call is seen when this one writes."""
        with self._lock:
            return dict(self._loaded().get(namespace, {}))

    def get(self, namespace: str, key: str) -> dict[str, Any] | None:
        with self._lock:
            return self._loaded().get(namespace, {}).get(key)

    def put(self, namespace: str, entries: Mapping[str, dict[str, Any] | None]) -> bool:
        """Add or replace entries, None to remove one, here and in the file; returns whether other processes will find them."""
        if not entries:
            return True
        with self._lock:
            self._loaded()
            self._own.setdefault(namespace, {}).update(entries)
            self._entries = _merged(self._loaded(), self._own)
            if self.path is None:
                return False
            wait_s, self._wait_s = self._wait_s, 0.0  # who holds it that long may never give it back
            with suppress(OSError, ValueError, TypeError), _locked(self.path, wait_s):
                self._wait_s = LOCK_WAIT_S
                self._entries = _merged(_read(self.path, self.identity), self._own)
                _write(self.path, {"format": FORMAT, "identity": self.identity, **self._entries})
                self._own = {}
            return not self._own

    def clear(self, namespace: str) -> None:
        """Take all entries of a namespace away."""
        self.put(namespace, dict.fromkeys(self.all(namespace)))

    def _loaded(self) -> dict[str, Entries]:
        if self._entries is None:
            self._entries = {} if self.path is None else _read(self.path, self.identity)
        return self._entries


def store(backend: str) -> Store:
    """That of this machine with a backend of this name, in the folder that the environment names now."""
    return _store(_folder(), backend)


def peek(namespace: str, key: str) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Every identity whose file is in the folder with its entry of a name, for who may not ask the device yet."""
    for path in _files():
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found = json.loads(_bytes_of(path))["identity"]
            entry = _read(path, found)[namespace].get(key)
            if entry is not None:
                yield dict(found), entry


def _files() -> list[Path]:
    folder = _folder()
    try:
        return [] if folder is None else sorted(folder.glob("*.json"))
    except OSError:  # a name too long, a link to itself, a folder that may not be read
        return []


def _folder() -> Path | None:
    switch = os.environ.get(SWITCH, "")
    if switch.lower() in ("off", "0"):
        return None
    return Path(os.path.expanduser(switch)) if switch else cache_folder() / "machine"


@cache
def _store(folder: Path | None, backend: str) -> Store:
    found = identity(backend)
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    return Store(None if folder is None else folder / f"{digest}.json", found)


def _merged(
    entries: Mapping[str, Entries], changes: Mapping[str, Mapping[str, dict[str, Any] | None]]
) -> dict[str, Entries]:
    out = {name: dict(found) for name, found in entries.items()}
    for name, changed in changes.items():
        both = {**out.get(name, {}), **changed}
        out[name] = {key: value for key, value in both.items() if value is not None}
    return out


def _read(path: Path, identity: Mapping[str, str]) -> dict[str, Entries]:
    """What a file holds for an identity; nothing if it is none of ours."""
    try:
        found = json.loads(_bytes_of(path))
        if found["format"] != FORMAT or found["identity"] != identity:
            return {}
        spaces = {name: found.get(name, {}) for name in (PROOFS, CHOICES)}
        return {name: {k: v for k, v in space.items() if isinstance(v, dict)} for name, space in spaces.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _bytes_of(path: Path) -> bytes:
    """The content of a plain file of this user, without waiting for a pipe and without following a link."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(handle, "rb") as f:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_size > MOST_BYTES:
            raise OSError("not a file of ours")
        return f.read(MOST_BYTES)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Put a file in the place of another, whole or not at all."""
    text = json.dumps(content, indent=1, sort_keys=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".writing-", delete=False, encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):  # there is none after an interrupt that came behind the replacement
                os.unlink(file.name)
            raise


@contextmanager
def _locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock beside a file; raises OSError if another process does not give it back soon."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path.with_suffix(".lock"), flags, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        yield
    finally:
        os.close(handle)
