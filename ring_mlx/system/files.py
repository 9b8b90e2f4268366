"""Writes files atomically: whole or absent, also after a power cut. Makes and reads private files.

A file is written under another name, synced to the disk and renamed; then its folder is synced. So a name that is there
after a power cut names the whole file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ring_mlx.system import leftovers, macos

TEMPORARY = ".writing-"
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
LOCK_WAIT_S = 60.0
# Of a text that a model is to read; beyond that its tokens alone take a gigabyte.
MOST_TEXT_BYTES = 32_000_000

Write = Callable[[str], object]


def write_atomically(path: Path, write: Write, private: bool = True) -> None:
    """Let ``write`` fill a new file that replaces ``path``; a reader sees the old or the new one.

    Args:
        path: The file; its folder is made if it is missing. A link is replaced, not its target.
        write: Gets the name of an empty file, which ends in ``.safetensors``.
        private: Only its owner may read it; otherwise it has the mode of the file before it, or the usual one.

    Raises:
        OSError: If there is no space or no permission, or ``path`` is not a file; nothing is left behind then.
    """
    with _naming(path):
        make_folder(path.parent)
        with unfinished(path.parent, private, like=path) as name:
            write(str(name))
            place(name, path)


def write_named(path: Path, content: str | Write) -> None:
    """Write a file that a user named, with `write_atomically`; a pipe or a device gets the content as it comes."""
    write = _writer(content) if isinstance(content, str) else content
    if is_stream(path):
        write(str(path))
    else:
        write_atomically(behind_links(path), write, private=False)


def write_together(folder: Path, texts: Mapping[str, str]) -> None:
    """Replace several files of a folder once all of them are written, so that a full disk changes none."""
    with _naming(folder), ExitStack() as stack:
        names = {n: stack.enter_context(unfinished(folder, private=False, like=folder / n)) for n in texts}
        for name, text in texts.items():
            names[name].write_bytes(text.encode())
            sync_path(names[name])
        for name in texts:
            place(names[name], folder / name)


@contextmanager
def unfinished(folder: Path, private: bool = True, like: Path | None = None) -> Iterator[Path]:
    """A new empty file in a folder, removed afterwards unless it was renamed; private, or of the mode of ``like``."""
    leftovers.sweep(folder, TEMPORARY)
    name = folder / f"{TEMPORARY}{secrets.token_hex(8)}.safetensors"
    handle = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, PRIVATE_FILE if private else 0o666)
    leftovers.hold(handle)
    try:
        if private:
            os.fchmod(handle, PRIVATE_FILE)  # A umask could take the owner's rights away too.
        elif like is not None and like.is_file():
            os.fchmod(handle, stat.S_IMODE(like.stat().st_mode))
        yield name
    finally:
        os.close(handle)
        with suppress(OSError):  # What went wrong before it matters more.
            os.unlink(name)


def write_text(path: Path, text: str, private: bool = False) -> None:
    """`write_atomically` a text; behind a link its target is replaced."""
    write_atomically(behind_links(path), _writer(text), private)


def _writer(text: str) -> Write:
    return lambda name: Path(name).write_bytes(text.encode())


def behind_links(path: str | os.PathLike[str]) -> Path:
    """The file that a path leads to; a link to itself is itself."""
    return Path(os.path.realpath(path))


def place(name: Path, path: Path) -> None:
    """Sync a written file or folder, rename it to ``path`` and sync the folder around it.

    A file replaces only a file that may be changed; else OSError is raised.
    """
    if not name.is_dir():
        _check_replaceable(path)
    sync_path(name)
    os.replace(name, path)
    sync_path(path.parent)


def check_named(path: Path) -> None:
    """`check_writable` for a file that a user named."""
    if not is_stream(path):
        check_writable(behind_links(path))


def check_writable(path: Path) -> None:
    """Try before long work whether `write_atomically` could write a file; makes its folder, raises the same."""
    with _naming(path):
        _check_replaceable(path)
        make_folder(path.parent)
        with unfinished(path.parent):
            pass


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe or a device, such as /dev/stdout."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _check_replaceable(path: Path) -> None:
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise OSError(errno.EEXIST, "it is there and not a file", str(path))
        if not os.access(path, os.W_OK):  # A rename would not ask.
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an error name the file that is meant, not the temporary one."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) if e.errno else e from None


def sync_path(path: Path) -> None:
    """Flush a file to the disk, past the disk's own cache where the system can, or a folder, whose renames then last."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not macos.flush_disk(handle):
            os.fsync(handle)
    except OSError as e:
        # Some network file systems cannot do that for a folder; a file is never passed over.
        if e.errno not in (errno.EINVAL, errno.EBADF) or not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and the missing ones above it, for their owner only; a folder that is there stays as it is."""
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    try:
        folder.mkdir(PRIVATE_FOLDER)
    except FileExistsError:
        if folder.is_dir():  # Another process was faster.
            return
        raise
    folder.chmod(PRIVATE_FOLDER)
    sync_path(folder.parent)


def check_private(folder: Path) -> None:
    """Let nobody else into a folder; raises OSError for a link, no folder, or another user's folder."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "not a folder"
        raise OSError(errno.ENOTDIR, f"it is {what}", str(folder))
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"it belongs to user {found.st_uid}", str(folder))
    if stat.S_IMODE(found.st_mode) != PRIVATE_FOLDER:
        try:
            folder.chmod(PRIVATE_FOLDER)
        except OSError as e:
            if e.errno != errno.EROFS:
                raise


def is_plain(path: Path) -> bool:
    """Whether a path is a file: no link, folder, pipe or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def text_of(path: Path, most_bytes: int) -> str:
    """The UTF-8 text of a file that a user names, with line feeds as line ends; errors as `bytes_of`."""
    return bytes_of(path, most_bytes).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def bytes_of(path: Path, most_bytes: int) -> bytes:
    """The content of a file that a user names, perhaps by a link.

    Raises OSError if it cannot be read, is a pipe or a device, or has more than ``most_bytes``; ValueError if its name
    cannot be a file's.
    """
    # Without O_NONBLOCK a pipe would wait for a writer.
    handle = os.open(os.path.expanduser(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as f:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        data = f.read(most_bytes + 1)  # some files have more than they say, such as those of /proc
    if data is None:  # or would wait
        raise OSError(errno.EAGAIN, "it is not a file")
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes // 1_000_000} MB")
    return data


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """All bytes of a file; raises OSError as `open_plain`, or if there are more than ``most_bytes``."""
    with open_plain(path) as f:
        data = f.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {most_bytes} bytes", str(path))
    return data


def open_plain(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a file, without waiting for a pipe; raises OSError for a link, a folder, a pipe or a device."""
    strange = OSError(errno.EINVAL, "it is not a plain file", str(path))
    try:
        handle = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_FILE)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise strange from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise strange
    return os.fdopen(handle, "rb" if flags == os.O_RDONLY else "r+b")


@contextmanager
def locked(path: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Hold a lock file, which the system frees if the process is killed; raises OSError after ``wait_s``."""
    with open_plain(path, os.O_RDWR | os.O_CREAT) as f:
        if stat.S_IMODE(os.fstat(f.fileno()).st_mode) != PRIVATE_FILE:
            os.fchmod(f.fileno(), PRIVATE_FILE)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(errno.EAGAIN, "another process holds it", str(path)) from None
                time.sleep(0.01)
        yield
