"""Two hosts on one machine: network namespaces, joined by a pair of virtual network interfaces.

A command on such a host sees that host's name, its own shared memory and one interface, eth0, which
leads to the other host. Files are those of the machine, as on a shared file system.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

HOSTFILE = Path(__file__).resolve().parents[1] / "hosts" / "hostfile"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEADLINE_S = 120.0
UNSHARE = ("unshare", "--uts", "--ipc", "--mount", "sh", "-c")
# $0 is the host's name, $1 its /etc/hosts, the rest the command.
BECOME = (
    'echo "$0" > /proc/sys/kernel/hostname && mount --bind "$1" /etc/hosts && shift && exec "$@"'
)
# Takes words as ssh does: options, the host, a command for its shell; and like ssh it does not hand
# the environment on.
LAUNCHER = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1
shift
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/ \\
    ip netns exec {prefix}-"$host" {become} "$host" {hosts} sh -c "$*"
"""


class NoRights(Exception):
    """This machine does not let us make two hosts; says why."""


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        raise NoRights(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class TwoHosts:
    """The hosts of hosts/hostfile, from `with` to its end; raises NoRights where it may not.

    folder  where to put the files that the hosts need
    """

    def __init__(self, folder: Path):
        lines = [line.split("#")[0].strip() for line in HOSTFILE.read_text().splitlines()]
        self.names = [line.split(":")[0] for line in lines if line]
        self.prefix = f"slimlab-{os.getpid()}"
        self.hosts, self.launcher = folder / "hosts", folder / "launcher"

    def __enter__(self) -> "TwoHosts":
        for tool in ("ip", "unshare", "mount"):
            if shutil.which(tool) is None:
                raise NoRights(f"no command {tool} here")
        try:
            self._make()
        except BaseException:
            remove_spaces(self.prefix)
            raise
        return self

    def __exit__(self, *reason) -> None:
        remove_spaces(self.prefix)

    def _make(self) -> None:
        remove_left_over()
        first, second = [f"{self.prefix}-{name}" for name in self.names]
        for space in (first, second):
            _ip("netns", "add", space)
        _ip(*f"-n {first} link add eth0 type veth peer name eth0 netns {second}".split())
        for space, address in zip((first, second), ADDRESSES, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")
        named = [f"{address} {name}\n" for address, name in zip(ADDRESSES, self.names, strict=True)]
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(named))
        become, hosts = shlex.join([*UNSHARE, BECOME]), shlex.quote(str(self.hosts))
        text = LAUNCHER.format(prefix=self.prefix, become=become, hosts=hosts)
        self.launcher.write_text(text)
        self.launcher.chmod(0o755)
        done = subprocess.run(
            self.on(0, "uname", "-n"), capture_output=True, text=True, timeout=DEADLINE_S
        )
        if done.stdout.strip() != self.names[0]:
            raise NoRights(f"no host with a name of its own: {done.stderr.strip()}")
        deadline_s = time.monotonic() + DEADLINE_S
        while any(link["operstate"] != "UP" for link in map(self._link, range(2))):
            assert time.monotonic() < deadline_s, "the hosts' interfaces do not come up"
            time.sleep(0.02)

    def on(self, host: int, *command: str) -> list[str]:
        """The command line that runs `command` on a host, 0 or 1, as somebody logged in there."""
        name = self.names[host]
        return [
            *("ip", "netns", "exec", f"{self.prefix}-{name}"),
            *(*UNSHARE, BECOME, name, str(self.hosts)),
            *command,
        ]

    def _link(self, host: int) -> dict:
        space = f"{self.prefix}-{self.names[host]}"
        return json.loads(_ip("-n", space, "-s", "-j", "link", "show", "eth0"))[0]

    def crossed_bytes(self) -> tuple[int, int]:
        """Bytes that have crossed from the first host to the second, and back."""
        counts = self._link(0)["stats64"]
        return counts["tx"]["bytes"], counts["rx"]["bytes"]

    def processes(self) -> list[str]:
        """The command lines of all that runs on both hosts."""
        found = []
        for pid in pids_in(self.prefix):
            with suppress(psutil.Error):
                one = psutil.Process(pid)
                if one.status() != psutil.STATUS_ZOMBIE:
                    found.append(shlex.join(one.cmdline()))
        return found


def spaces_of(prefix: str) -> list[str]:
    """The names of the namespaces that begin with `prefix` and a hyphen."""
    names = [line.split()[0] for line in _ip("netns", "list").splitlines() if line]
    return [name for name in names if name.startswith(f"{prefix}-")]


def pids_in(prefix: str) -> list[int]:
    """The processes in these namespaces."""
    return [int(pid) for name in spaces_of(prefix) for pid in _ip("netns", "pids", name).split()]


def remove_spaces(prefix: str) -> None:
    """End what runs in these namespaces, and remove them and their interfaces."""
    deadline_s = time.monotonic() + DEADLINE_S
    while (pids := pids_in(prefix)) and time.monotonic() < deadline_s:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for name in spaces_of(prefix):
        _ip("netns", "delete", name)


def remove_left_over() -> None:
    """Remove the namespaces of test runs that were killed."""
    for name in spaces_of("slimlab"):
        found = re.match(r"slimlab-(\d+)-", name)
        if found and not psutil.pid_exists(int(found[1])):
            with suppress(NoRights):
                remove_spaces(f"slimlab-{found[1]}")
