"""Hosts of a cluster on one machine: each with a network of its own, a name, and a cable that can be pulled.

A host is a network namespace on a bridge that has no way out; what runs there has host name and process ids of its own. All
share the file system. Needs the right to make namespaces (root, or a container with CAP_SYS_ADMIN and CAP_NET_ADMIN) and iproute2.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NETNS = Path("/etc/netns")
_COUNTER = itertools.count()
IN_HOST = 'hostname "$0" && exec "$@"'
CLEAN_UP = """\
read -r _
for name; do
  ip netns del "$name"
  rm -rf "/etc/netns/$name"
done
"""
"""Waits for a line, or for the end of who would write it, and takes the namespaces that are its arguments away."""


def why_not() -> str:
    """What keeps this machine from having such hosts; empty if nothing does."""
    for program in ("ip", "setpriv", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    probe = f"dpa{os.getpid()}probe"
    added = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if added.returncode:
        return f"network namespaces are not allowed here: {added.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


class Hosts:
    """Hosts n1, n2, ... with addresses 10.77.0.1, 10.77.0.2, ...; a context manager.

    They go with the process that made them, also if it is killed: what runs on them at once, then their networks.
    """

    def __init__(self, num_hosts: int) -> None:
        self._numbers = range(1, num_hosts + 1)
        self._prefix = f"dpa{os.getpid()}x{next(_COUNTER)}"

    def __enter__(self) -> "Hosts":
        switch = self._netns("sw")
        names = [switch, *(self._netns(f"n{n}") for n in self._numbers)]
        # In a session of its own: whoever kills this process and its group does not kill what cleans up.
        self._cleaner = subprocess.Popen(
            ["sh", "-c", CLEAN_UP, "sh", *names],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        addresses = "127.0.0.1 localhost\n" + "".join(f"{self.address(n)} n{n}\n" for n in self._numbers)
        for n in self._numbers:
            host = self._netns(f"n{n}")
            _ip("netns", "add", host)
            _ip("link", "add", f"p{n}", "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", switch, "link", "set", f"p{n}", "master", "br0", "up")
            _ip("-n", host, "addr", "add", f"{self.address(n)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host, "link", "set", device, "up")
            own = NETNS / host  # `ip netns exec` lays these over /etc
            own.mkdir(parents=True)
            (own / "hosts").write_text(addresses)
            (own / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
            (own / "resolv.conf").write_text("")  # else each reverse look-up waits 5 s
        return self

    def __exit__(self, *_: object) -> None:
        self._cleaner.communicate(b"\n")

    def address(self, number: int) -> str:
        """IPv4 address of host `number`."""
        return f"10.77.0.{number}"

    def on(self, number: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run on host `number`; all that it starts there dies with it, and it with who started it."""
        mortal = ["setpriv", "--pdeathsig", "KILL"]  # stays with `ip` and `unshare`, which are no new processes
        alone = ["unshare", "--uts", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child=KILL"]
        in_network = ["ip", "netns", "exec", self._netns(f"n{number}")]
        return [*mortal, *in_network, *alone, "sh", "-c", IN_HOST, f"n{number}", *command]

    def unplug(self, number: int) -> None:
        """Pull the cable of host `number`: packets are lost, and nobody is reported."""
        _ip("-n", self._netns("sw"), "link", "set", f"p{number}", "down")

    def plug(self, number: int) -> None:
        """Put it back."""
        _ip("-n", self._netns("sw"), "link", "set", f"p{number}", "up")

    @contextmanager
    def slow(self, number: int, rate: str) -> Iterator[None]:
        """Meanwhile the cable of host `number` carries no more than `rate` towards it, such as 8mbit (a second)."""
        queue = ["netns", "exec", self._netns("sw"), "tc", "qdisc"]
        _ip(*queue, "add", "dev", f"p{number}", "root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms")
        try:
            yield
        finally:
            _ip(*queue, "del", "dev", f"p{number}", "root")

    def _netns(self, name: str) -> str:
        return self._prefix + name


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
