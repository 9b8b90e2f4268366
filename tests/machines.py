"""Machines of a test's own: network namespaces with an sshd each, joined by a bridge whose links can be cut.

Nothing outside them changes: the host's own network gets no address, route, link or rule.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

TOOLS = ("ip", "ssh", "ssh-keygen", "sshd", "nsenter", "unshare", "mount")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
SSHD_CONFIG = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PasswordAuthentication no
PidFile none
"""
SSH_CONFIG = """
Host mac*
  IdentityFile {folder}/user
  UserKnownHostsFile {folder}/known
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
"""
START_S = 60
HAS_FILTER = shutil.which("iptables", path=PATH) is not None


def missing():
    """Why there can be no machines here, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not Path("/proc/self/ns/net").exists():
        return "network namespaces need Linux and root"
    lacking = [t for t in TOOLS if shutil.which(t, path=PATH) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    name = f"rm{secrets.token_hex(4)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces are not allowed here"
    link = ["ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "name", "two"]
    works = subprocess.run(link, capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None if works else "virtual links are not allowed here"


class Machines:
    """``mac0`` to ``mac{count - 1}``, of which mac0 is to launch.

    Args:
        folder: For keys and configurations.
        count: How many.
    """

    def __init__(self, folder, count):
        self.folder, self._mark = folder, f"rm{secrets.token_hex(4)}"
        self.names = [f"mac{i}" for i in range(count)]
        self._processes = []
        for kind in ("host", "user"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / kind)
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
        key = (folder / "host.pub").read_text()
        (folder / "known").write_text("".join(f"{name} {key}" for name in self.names))
        config = SSH_CONFIG.format(folder=folder)
        config += "".join(
            f"Host {name}\n  HostName {ip(i)}\n  HostKeyAlias {name}\n" for i, name in enumerate(self.names)
        )
        (folder / "ssh_config").write_text(config)
        ssh = folder / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)

    def start(self):
        """Make the namespaces, their links, and an sshd in each but the first."""
        _run("ip", "netns", "add", self._space("hub"))
        self._hub("link", "add", "br0", "type", "bridge")
        self._hub("link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            space = self._space(name)
            _run("ip", "netns", "add", space)
            self._hub("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._hub("link", "set", name, "master", "br0", "up")
            _run("ip", "-n", space, "addr", "add", f"{ip(i)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", space, "link", "set", device, "up")
        # A name and a /run of its own for each, seen by nobody else.
        script = "hostname $1 && mount -t tmpfs none /run && mkdir /run/sshd && exec $2 -D -e -f $3"
        sshd = (shutil.which("sshd", path=PATH), self.folder / "sshd_config")
        for name in self.names[1:]:
            words = ("unshare", "--uts", "--mount", "sh", "-c", script, "sh", name, *sshd)
            self._processes.append(self.popen(name, *words, stderr=subprocess.DEVNULL))
        for name in self.names[1:]:
            self.wait_for(name)

    def popen(self, name, *words, **options):
        """A process on a machine."""
        inside = ["nsenter", f"--net=/run/netns/{self._space(name)}", *map(str, words)]
        env = os.environ | {"PATH": f"{self.folder / 'bin'}:{PATH}"} | options.pop("env", {})
        return subprocess.Popen(inside, env=env, **options)

    def wait_for(self, name):
        """Until its sshd answers."""
        deadline = time.monotonic() + START_S
        while self.popen("mac0", "ssh", "-o", "BatchMode=yes", name, "true", stderr=subprocess.DEVNULL).wait():
            assert time.monotonic() < deadline, f"no sshd on {name}"
            time.sleep(0.2)

    def pids(self, name, word):
        """Processes on a machine whose command line holds a word, by number."""
        found = []
        for pid in _run("ip", "netns", "pids", self._space(name)).split():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if word in words and "ring_mlx" in words:
                    found.append(int(pid))
        return found

    def cut(self, name):
        """Its link carries nothing any more, and nothing says so."""
        self._hub("link", "set", name, "nomaster")

    def refuse(self, name):
        """It refuses all that arrives, on connections that stand too."""
        self._filter(name, "-A", "INPUT", "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")

    def mend(self, name):
        """Its link carries all again, and it takes it."""
        self._hub("link", "set", name, "master", "br0")
        if HAS_FILTER:
            self._filter(name, "-F")

    def _filter(self, name, *words):
        _run("nsenter", f"--net=/run/netns/{self._space(name)}", "iptables", "-w", *words)

    def close(self):
        """End all that runs there, and remove the namespaces."""
        for name in ("hub", *self.names):
            space = self._space(name)
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False).stdout
            for pid in map(int, pids.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        for process in self._processes:
            process.wait()

    def _space(self, name):
        return f"{self._mark}-{name}"

    def _hub(self, *words):
        _run("ip", "-n", self._space("hub"), *words)


def ip(number):
    """The address of a machine."""
    return f"10.77.0.{number + 1}"


def _run(*words):
    return subprocess.run(
        [*map(str, words)], check=True, capture_output=True, text=True, env=os.environ | {"PATH": PATH}
    ).stdout
