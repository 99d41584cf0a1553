"""Hosts go with the process that made them, whatever its end."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import NETNS, why_not
from tests.cluster.machines import why_no_machines
from tests.launch.processes import REPOSITORY

pytestmark = pytest.mark.cluster
HOSTS = """
import subprocess, sys, time
from tests.cluster.hosts import Hosts

with Hosts(2) as hosts:
    subprocess.Popen(hosts.on(1, ["sh", "-c", "setsid sleep 1000 & sleep 1000"]))
    print(hosts._prefix, flush=True)
    sys.stdin.readline()
"""
MACHINES = """
import sys
from pathlib import Path
from tests.cluster.machines import Machines

with Machines(2, Path(sys.argv[1])) as machines:
    print(machines._prefix, flush=True)
    sys.stdin.readline()
"""
SECONDS = 20.0


def wait_for_names(process: subprocess.Popen[str], names: set[str]) -> list[psutil.Process]:
    """All that `process` started, once programs of these names are among it."""
    deadline = time.monotonic() + SECONDS
    while True:
        started = psutil.Process(process.pid).children(recursive=True)
        if names <= {one.name() for one in started}:
            return started
        assert time.monotonic() < deadline, [one.name() for one in started]
        time.sleep(0.05)


def left_of(prefix: str, started: list[psutil.Process]) -> list[str]:
    networks = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    left = [name for name in networks if name.startswith(prefix)]
    left += [str(path) for path in NETNS.glob(f"{prefix}*")]
    return left + [one.name() for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("end", ["killed", "regular"])
@pytest.mark.parametrize(
    ("program", "daemons"),
    [(HOSTS, {"sleep"}), (MACHINES, {"munged", "slurmctld", "slurmd", "sshd"})],
    ids=["hosts", "machines"],
)
def test_nothing_is_left_of_hosts(program: str, daemons: set[str], end: str, tmp_path: Path) -> None:
    reason = why_not() if program == HOSTS else why_no_machines()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        prefix = process.stdout.readline().strip()
        assert prefix, "it ended"
        started = wait_for_names(process, daemons)
        assert left_of(prefix, started)
        if end == "killed":
            process.kill()
        process.communicate("\n" if end == "regular" else None)
    deadline = time.monotonic() + SECONDS
    while left := left_of(prefix, started):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
