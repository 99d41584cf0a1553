"""Where jobs listen: what SECURITY.md says in its table of ports."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import tiny
from tests.cluster.hosts import Hosts
from tests.launch.processes import PYTHON, REPOSITORY, RUN, Running, beside_python, free_port, wait_for
from tests.sockets import listening

pytestmark = pytest.mark.cluster
DEADLINE_SECONDS = 150.0
PORT = "29600"
INTERFACES = {
    "loopback": "loopback",
    "all, or `--host`": "all",
    "all": "all",
    "that of `MASTER_ADDR`": "network",
    "that which leads to the rendezvous": "network",
    "`GLOO_SOCKET_IFNAME`, else that of the host's name": "network",
}
"""How the table names an interface, and which of `interface_of` it is on the hosts of these tests."""


def promised(jobs: str) -> set[tuple[str, str]]:
    """Processes and interfaces in the table, for one kind of jobs."""
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \| [^|]* \| ([^|]*) \|", (REPOSITORY / "SECURITY.md").read_text(), re.M)
    found = {(process, INTERFACES[interface]) for kind, process, interface in rows if kind == jobs}
    assert found
    return found


def interface_of(address: str) -> str:
    """Of an address of hosts n1 and n2, or of this machine."""
    if address in ("0.0.0.0", "::"):
        return "all"
    return "loopback" if address == "127.0.0.1" else "network"


def interfaces(running: Running) -> set[str]:
    """Those at which the Python processes of a command listen."""
    return {interface_of(address) for address, _ in listening(running.remaining())}


def at_work(argv: Sequence[str], folder: Path, running: Sequence[Running]) -> None:
    wait_for(folder / "runs" / "tiny", "rounds/round_000001/meta.json", running, DEADLINE_SECONDS)


def recipe(model: Path, federation: Path, folder: Path) -> list[str]:
    """Rounds without end."""
    return tiny.recipe(model, federation, folder / "runs", federation__num_rounds=1000, train__max_steps=5)


def test_a_job_on_one_host_listens_nowhere_else(model: Path, federation: Path, tmp_path: Path) -> None:
    argv = recipe(model, federation, tmp_path)
    with Running([beside_python("deepspeed"), "--num_gpus", "2", *RUN[1:], *argv]) as job:
        at_work(argv, tmp_path, [job])
        found = interfaces(job)
    assert {interface for _, interface in promised("on one host")} == found == {"loopback"}


def test_a_job_on_two_hosts(hosts: Hosts, model: Path, federation: Path, tmp_path: Path) -> None:
    argv = recipe(model, federation, tmp_path)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts.address(1), "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(Running(hosts.on(r + 1, [*RUN, *argv]), **common, RANK=str(r), LOCAL_RANK="0"))
            for r in range(2)
        )
        at_work(argv, tmp_path, [first, second])
        found = {("rank 0", interface) for interface in interfaces(first)}
        found |= {("other ranks", interface) for interface in interfaces(second)}
    names = {"ranks": ("rank 0", "other ranks")}
    expected = {(one, where) for name, where in promised("on several hosts") for one in names.get(name, (name,))}
    assert found == expected


def test_groups_with_launchers_of_their_own(hosts: Hosts, model: Path, federation: Path, tmp_path: Path) -> None:
    argv = recipe(model, federation, tmp_path)
    with ExitStack() as stack:
        rendezvous = stack.enter_context(Running(hosts.on(1, [PYTHON, "launch/rendezvous.py", *argv, "--port", PORT])))
        groups = []
        for group in range(2):
            own = ["--cluster.group", str(group), "--cluster.rendezvous", f"{hosts.address(1)}:{PORT}"]
            groups.append(stack.enter_context(Running(hosts.on(group + 1, [*RUN, *argv, *own]))))
        at_work(argv, tmp_path, groups)
        found = {("rendezvous", interface) for interface in interfaces(rendezvous)}
        for group in groups:
            found |= {("leaders", interface) for interface in interfaces(group)}
    assert found == promised("with launchers of their own")


def test_a_rank_with_another_secret_is_refused(hosts: Hosts, model: Path, federation: Path, tmp_path: Path) -> None:
    """Nothing is written by the job, which lacks a rank then."""
    argv = tiny.recipe(model, federation, tmp_path / "runs", cluster__timeout_seconds=8)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts.address(1), "MASTER_PORT": str(free_port())}
    secrets = ("of the first host, long enough", "of the second, as long")
    with ExitStack() as stack:
        ranks = []
        for r, secret in enumerate(secrets):
            own = {"RANK": str(r), "LOCAL_RANK": "0", "DPA_DS_SECRET": secret}
            ranks.append(stack.enter_context(Running(hosts.on(r + 1, [*RUN, *argv]), **common, **own)))
        first, second = (rank.wait(DEADLINE_SECONDS) for rank in ranks)
    assert (first.returncode, second.returncode) == (3, 3)
    assert "rank 1 on n2 and rank 0 do not know each other" in second.output
    assert "refused a connection from 10.77.0.2" in first.output
    assert len(second.errors) == 1
    assert first.num_tracebacks == second.num_tracebacks == 0
    assert not (tmp_path / "runs").exists()


def test_two_jobs_of_one_host_find_ports_of_their_own(model: Path, federation: Path, tmp_path: Path) -> None:
    """`deepspeed launch/run.py` twice, neither with a port: both end well. Two starts of two ranks, half a minute."""
    with ExitStack() as stack:
        jobs = []
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            argv = tiny.recipe(model, federation, tmp_path / name / "runs", train__max_steps=2)
            command = [beside_python("deepspeed"), "--num_gpus", "2", *RUN[1:], *argv]
            jobs.append(stack.enter_context(Running(command)))
        ended = [job.wait(DEADLINE_SECONDS) for job in jobs]
    assert [one.returncode for one in ended] == [0, 0], "\n\n".join(one.output for one in ended)
