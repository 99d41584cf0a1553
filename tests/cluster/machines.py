"""Hosts that are up: each with an ssh server of its own, and a real Slurm over all of them.

Needs, beside network namespaces, openssh-server and pdsh; for Slurm also slurm-wlm and munge. All state is in one folder; the
machine's own ssh and Slurm are not touched.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.cluster.hosts import NETNS, Hosts, why_not
from tests.launch.processes import REPOSITORY, own_environment

PROGRAMS = ("nsenter", "ssh-keygen", "sshd", "pdsh", "munged", "slurmctld", "slurmd", "sbatch")
NUM_CPUS = 4
UP_SECONDS = 60.0
SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
"""
SSH_CONFIG = """\
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
  ServerAliveInterval 2
"""
# A node is down soon after it is silent, jobs die soon after SIGTERM, and a requeued job starts again at once.
SLURM_CONF = """\
ClusterName=tests
SlurmctldHost=n1({first})
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmctldParameters=preempt_send_user_signal
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd-spool
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=20
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
NODE = "NodeName=n{n} NodeAddr={address} CPUs={cpus} RealMemory=8000 Gres=gpu:{cpus} State=UNKNOWN"
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"
BOOT = """\
hostname {name}
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir -p -m 755 /run/sshd /run/munge /run/slurmd-spool
install -m 400 {folder}/munge.key /run/munge.key
munged --key-file=/run/munge.key --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/munged.pid \\
  --log-file=/run/munge.log --seed-file=/run/munge.seed
[ {name} != n1 ] || slurmctld -c
slurmd -N {name}
/usr/sbin/sshd -D -e -f {folder}/sshd_config &
while :; do sleep 1000 & wait $!; done
"""


def why_no_machines() -> str:
    """What keeps this machine from having such hosts; empty if nothing does."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        return f"not installed: {', '.join(missing)} (packages openssh-client openssh-server pdsh slurm-wlm munge)"
    return why_not()


class Machines(Hosts):
    """Hosts n1, n2, ... that reach each other by ssh, and are the nodes of a Slurm; a context manager.

    Args:
        folder: empty; for keys, logs and Slurm's state.
    """

    def __init__(self, num_hosts: int, folder: Path) -> None:
        super().__init__(num_hosts)
        self._folder = folder
        self._booted: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Machines":
        super().__enter__()
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._folder / name], check=True)
        (self._folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self._folder))
        (self._folder / "munge.key").write_bytes(os.urandom(128))
        (self._folder / "state").mkdir()
        for k in range(NUM_CPUS):  # devices that exist, and that no program here opens
            subprocess.run(["mknod", self._folder / f"gpu{k}", "c", "1", "3"], check=True)
        nodes = [NODE.format(n=n, address=self.address(n), cpus=NUM_CPUS) for n in self._numbers]
        slurm_conf = SLURM_CONF.format(folder=self._folder, first=self.address(1), nodes="\n".join(nodes))
        gres_conf = f"AutoDetect=off\nName=gpu File={self._folder}/gpu[0-{NUM_CPUS - 1}]\n"
        files = {"slurm.conf": slurm_conf, "gres.conf": gres_conf, "cgroup.conf": CGROUP_CONF}
        for n in self._numbers:
            own = NETNS / self._netns(f"n{n}")
            (own / "ssh").mkdir()
            (own / "ssh" / "ssh_config").write_text(SSH_CONFIG.format(folder=self._folder))
            (own / "slurm").mkdir()
            for name, text in files.items():
                (own / "slurm" / name).write_text(text)
        try:
            for n in self._numbers:
                self.boot(n)
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for n in list(self._booted):
            self.crash(n)
        super().__exit__(*error)

    def boot(self, number: int) -> None:
        """Switch host `number` on."""
        script = BOOT.format(name=f"n{number}", folder=self._folder)
        with (self._folder / f"n{number}.log").open("ab") as log:
            self._booted[number] = subprocess.Popen(
                super().on(number, ["sh", "-c", script]), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        while not self._children(number):
            time.sleep(0.01)

    def crash(self, number: int) -> None:
        """Take the power from host `number`."""
        process = self._booted.pop(number)
        for child in psutil.Process(process.pid).children(recursive=True)[::-1]:
            with suppress(psutil.Error):
                child.send_signal(signal.SIGKILL)
        process.kill()
        process.wait()

    def on(self, number: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run on host `number`, which is up."""
        inside = [
            "nsenter",
            "-t",
            str(self._children(number)[0].pid),
            "--net",
            "--uts",
            "--mount",
            "--pid",
            f"--wd={REPOSITORY}",
        ]
        return [*inside, "--", *command]

    def ask(self, *command: str, on: int = 1, **variables: str) -> str:
        """What `command` prints on a host, where it must succeed."""
        # A task has as many threads as it asked for CPUs, of which a node claims more than this machine has.
        environment = {**own_environment(), "PYTHON": sys.executable, "OMP_THREAD_LIMIT": "1", **variables}
        done = subprocess.run(self.on(on, command), env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job_state(self, job: str) -> str:
        """Slurm's word for where a job, or its first part, is; COMPLETED and others for some minutes after its end."""
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").split()[0]

    def cancel_all(self) -> None:
        """End every job; none is left on a node when this returns."""
        self.ask("scancel", "--user=root")
        deadline = time.monotonic() + UP_SECONDS
        while left := self.ask("squeue", "--noheader", "--states=RUNNING,COMPLETING"):
            assert time.monotonic() < deadline, left
            time.sleep(0.2)

    def clear(self) -> None:
        """All hosts up, no job: what every test begins with."""
        lost = [number for number in self._numbers if number not in self._booted]
        for number in lost:
            self.boot(number)
        self.cancel_all()
        if lost:
            self._wait_until_up()

    def num_bytes(self, number: int) -> int:
        """Bytes that host `number` has received and sent by its cable so far."""
        counters = [f"/sys/class/net/eth0/statistics/{way}_bytes" for way in ("rx", "tx")]
        return sum(map(int, self.ask("cat", *counters, on=number).split()))

    def _children(self, number: int) -> list[psutil.Process]:
        """The host's first process, as this machine counts."""
        return psutil.Process(self._booted[number].pid).children()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + UP_SECONDS
        idle = self.on(1, ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"])
        while subprocess.run(idle, capture_output=True, text=True).stdout.strip() != str(len(self._numbers)):
            assert time.monotonic() < deadline, "\n".join(path.read_text() for path in self._folder.glob("*.log"))
            time.sleep(0.1)
