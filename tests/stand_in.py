"""Ranks without a model, an ssh without a network, and ``ring-mlx launch`` over both: what passes between them is real.

The ssh gives its command to a shell that greets, as many a login shell does, and drops all bytes once a file says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
INTERPRETER = """#!{python}
import sys
sys.path.insert(0, {root!r})
from tests import stand_in
sys.exit(stand_in.rank(sys.argv[3:]))
"""
SSH = """#!{python}
import sys
sys.path.insert(0, {root!r})
from tests import stand_in
sys.exit(stand_in.ssh(sys.argv[1:], {folder!r}))
"""
GREETING = 'echo "Welcome to $0"; printf "no newline"; echo "no such locale" >&2; '


def rank(words):
    """``boot`` as it is; a command's first argument is a program, which runs once all ranks have started."""
    from ring_mlx.distributed import boot, heartbeat

    if words[0] == boot.__name__:
        return boot.main()
    line, number = heartbeat.of_launcher(), int(os.environ["MLX_RANK"])
    line.all_started.wait()
    line.joined()
    part = Path(f".rank{number}")
    part.write_text(str(os.getpid()))
    part.replace(f"rank{number}")  # there with its text, or not at all
    signal.signal(signal.SIGPIPE, lambda *_: os._exit(141))
    exec(words[2], {"rank": number, "words": words})  # noqa: S102 a test's own text
    return 0


def ssh(words, folder):
    """Run a host's command here; a file ``cut-HOST`` in the folder stands for a link that carries nothing."""
    host, command = words[words.index("--") + 1 :]
    if host.startswith("no-"):
        Path(words[words.index("-E") + 1]).write_text(f"ssh: connect to host {host} port 22: Connection refused\r\n")
        return 255
    pipe = subprocess.PIPE
    shell = subprocess.Popen(["sh", "-c", GREETING + command, host], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
    ways = ((0, shell.stdin.fileno()), (shell.stdout.fileno(), 1), (shell.stderr.fileno(), 2))
    threads = [threading.Thread(target=_carry, args=(*way, Path(folder, f"cut-{host}")), daemon=True) for way in ways]
    for thread in threads:
        thread.start()
    code = shell.wait()
    for thread in threads[1:]:
        thread.join()
    return code if code >= 0 else 255


def _carry(source, target, cut):
    while (data := os.read(source, 1 << 16)) and not cut.exists():
        try:
            while data:
                data = data[os.write(target, data) :]
        except OSError:
            break
    while cut.exists():
        time.sleep(0.05)
    os.close(source)
    os.close(target)


class Stage:
    """Where such launches run.

    Args:
        folder: For scripts and files.
    """

    def __init__(self, folder):
        self.folder, self.python = folder, folder / "an interpreter's"
        (folder / "bin").mkdir()
        for file, text in ((self.python, INTERPRETER), (folder / "bin" / "ssh", SSH)):
            file.write_text(text.format(python=sys.executable, root=str(ROOT), folder=str(folder)))
            file.chmod(0o755)

    def command(self, hosts, *words, envs=()):
        """The words that launch a command on hosts."""
        file = self.folder / "hosts.json"
        entries = [{"ssh": name, "ips": ["127.0.0.1"]} for name in hosts]
        file.write_text(json.dumps({"backend": "ring", "envs": list(envs), "hosts": entries}))
        launch = ("-m", "ring_mlx", "launch", "--no-check", "--hostfile", file, "--python", self.python)
        return [sys.executable, *map(str, launch), "generate", *map(str, words)]

    @contextlib.contextmanager
    def popen(self, hosts, *words, envs=(), wrap=(), **options):
        """A launch, as a process of the words in ``wrap``."""
        env = os.environ | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [*wrap, *self.command(hosts, *words, envs=envs)]
        with subprocess.Popen(command, **{"env": env, "cwd": self.folder} | pipes | options) as p:
            try:
                yield p
            finally:
                p.kill()

    def pid(self, number):
        """The process of a rank, once it has told. Rank 0's first word says nothing about the others."""
        file = self.folder / f"rank{number}"
        end = time.monotonic() + 60
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return int(file.read_text())

    def run(self, hosts, *words, **options):
        """Exit code, output and lines of error of a launch."""
        with self.popen(hosts, *words, **options) as p:
            out, err = p.communicate(timeout=120)
        return p.returncode, out, err.decode().splitlines()
