"""A text in the user's editor, whatever the editor does to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from ring_mlx import RingError, harmless, text_of

MOST_BYTES = 4_000_000
USUAL = ("nano", "vim", "vi")
Run = Callable[[list[str]], Awaitable[int]]


class EditorError(RingError):
    """The editor cannot be started, or has left no text."""

    origin = "editor"


def editor() -> list[str]:
    """The command of the user's editor, by ``VISUAL`` or ``EDITOR``, else one that most systems have."""
    set_by_user = os.environ.get("VISUAL", "").strip() or os.environ.get("EDITOR", "").strip()
    try:
        found = shlex.split(set_by_user) or [name for name in USUAL if shutil.which(name)][:1]
    except ValueError as e:
        raise EditorError(f"{set_by_user} is no command ({e}); set VISUAL or EDITOR to one.") from None
    if not found or not shutil.which(found[0]):
        raise EditorError(f"{found[0] if found else 'an editor'} cannot be found; set VISUAL or EDITOR to one.")
    return found


async def edited(text: str, run: Run) -> str:
    """The text after the user has edited it.

    Args:
        text: What to begin with.
        run: Runs a command in the terminal and returns its exit code.

    Raises:
        EditorError: If there is no new text; what the editor has left is kept in a file then, and named.
    """
    command = editor()
    handle, name = tempfile.mkstemp(prefix="ring-mlx-", suffix=".md")
    os.close(handle)
    file, before = Path(name), text.encode("utf-8", "replace")
    file.write_bytes(before)
    wrong = ""
    try:
        code = await run([*command, name])
        wrong = f"{command[0]} ended with code {code}" if code else ""
    except OSError as e:
        wrong = f"{command[0]} cannot be started ({e.strerror})"
    except BaseException:  # the chat ends, or Ctrl+C in plain mode
        _kept(file, before)
        raise
    if not wrong:
        try:
            found = harmless(text_of(file, MOST_BYTES))
        except UnicodeDecodeError:
            wrong = "it has left no UTF-8 text"
        except OSError as e:
            wrong = f"what it has left cannot be read ({e.strerror})"
        else:
            file.unlink(missing_ok=True)
            return found.removesuffix("\n")
    raise EditorError(f"{wrong}; the prompt is as it was{_kept(file, before)}.")


def _kept(file: Path, before: bytes) -> str:
    """Where a file is that the editor has changed; an unchanged one is removed."""
    with contextlib.suppress(OSError):
        if file.is_file() and file.read_bytes() != before:
            return f", the file is {file}"
        file.unlink(missing_ok=True)
    return ""


async def run_here(command: list[str]) -> int:
    """Run a command in this terminal; it ends with whatever waits for it."""
    process = await asyncio.create_subprocess_exec(*command)
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
