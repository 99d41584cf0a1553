"""The table of launch/preflight.py: what was measured, what a run needs, a verdict, and the remedy."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dpa_ds.distributed.probes import RankFacts
from dpa_ds.distributed.topology import Topology
from dpa_ds.evaluation.layout import aligned

OK, WARNING, FAILED = "ok", "warning", "FAILED"
SLOW_SHARE = 0.1
"""An exchange that takes more than this share of federation.timeout_seconds leaves the clients too little of it."""
MAX_CLOCK_OFFSET_SECONDS = 1.0
_MOST_NAMES = 4
"""Hosts or ranks that a line names."""


@dataclass(frozen=True)
class Needs:
    """What a run of the recipe will ask of hosts and network, in bytes and seconds."""

    adapter: int
    """Bytes of one exchange: the global adapter in fp32."""
    base_on_rank: int
    """Bytes of the frozen weights that a rank keeps: all, or its share under ZeRO-3."""
    rounds_on_disk: int
    """Bytes of the checkpoints of all rounds that are kept, and of the one being written."""
    exchange_seconds: float
    """Longest time that one exchange may take."""


@dataclass(frozen=True)
class Row:
    """One check."""

    what: str
    measured: str
    needed: str
    verdict: str = OK
    remedy: str = ""

    def unless(self, bad: Sequence[str], verdict: str, remedy: str) -> "Row":
        """This row if nothing is `bad`; else with `verdict`, and `remedy` for what is bad, by name."""
        if not bad:
            return self
        named = ", ".join(bad[:_MOST_NAMES])
        if len(bad) > _MOST_NAMES:
            named += ", ..."
        return Row(self.what, self.measured, self.needed, verdict, f"{named}: {remedy}")


@dataclass(frozen=True)
class Host:
    """The ranks of one host; what they share is read from the first."""

    name: str
    ranks: Sequence[RankFacts]

    @property
    def first(self) -> RankFacts:
        """The host's rank that stands for all in what does not differ."""
        return self.ranks[0]

    @property
    def num_threads(self) -> int:
        """Threads of all its ranks."""
        return sum(fact.num_threads for fact in self.ranks)

    def base_bytes(self, needs: Needs) -> int:
        """Bytes of the frozen weights of all its ranks."""
        return len(self.ranks) * needs.base_on_rank


def judge(facts: Sequence[RankFacts], topology: Topology, needs: Needs) -> list[Row]:
    """The table's rows. A function of its arguments only."""
    hosts = _hosts_of(facts)
    rows = [
        Row("code, packages, config", f"equal on {len(facts)} ranks", "equal"),  # else the job had not come this far
        _judge_addresses(hosts),
        _judge_placement(facts, hosts, topology),
    ]
    if _on_cpu(facts):
        rows.append(_judge_cores(facts, hosts))
    else:
        rows += [_judge_devices(facts, hosts), _judge_device_memory(facts, needs)]
    rows += [_judge_host_memory(facts, hosts, needs), _judge_disk(facts, hosts, needs), _judge_clocks(facts, hosts)]
    inside = [fact for fact in facts if fact.gather_bandwidth > 0]
    if inside:
        rows.append(_show_group_network(inside))
    between = [fact for fact in facts if fact.exchange_seconds > 0]
    if between:
        rows.append(_judge_exchange(between, needs))
    return rows


def render(rows: Sequence[Row]) -> str:
    """The table, and a line for each remedy."""
    cells = [("check", "measured", "needed", "")]
    remedies = []
    for row in rows:
        cells.append((row.what, row.measured, row.needed, row.verdict))
        if row.remedy:
            remedies.append(f"{row.verdict}: {row.what}: {row.remedy}")
    lines = aligned(cells, left=4)
    if remedies:
        lines += ["", *remedies]
    return "\n".join(lines)


def _hosts_of(facts: Sequence[RankFacts]) -> list[Host]:
    ranks: dict[str, list[RankFacts]] = defaultdict(list)
    for fact in facts:
        ranks[fact.host].append(fact)
    return [Host(name, of_host) for name, of_host in ranks.items()]


def _on_cpu(facts: Sequence[RankFacts]) -> bool:
    return all(fact.device == "" for fact in facts)


def _judge_addresses(hosts: Sequence[Host]) -> Row:
    listed = ", ".join(f"{host.name} {host.first.address}" for host in hosts[:_MOST_NAMES])
    if len(hosts) == 1:
        return Row("1 hosts", listed, "one host")
    bad = [host.name for host in hosts if host.first.address.startswith(("127.", "unknown"))]
    remedy = (
        "its own name does not lead to an address that other hosts reach: set GLOO_SOCKET_IFNAME there, or mend "
        "/etc/hosts"
    )
    return Row(f"{len(hosts)} hosts", listed, "reached from outside").unless(bad, WARNING, remedy)


def _judge_placement(facts: Sequence[RankFacts], hosts: Sequence[Host], topology: Topology) -> Row:
    ranks_per_host = max(len(host.ranks) for host in hosts)
    hosts_of_groups, bad = [], []
    for group, leader, size in zip(topology.groups, topology.leaders, topology.group_sizes, strict=True):
        num_hosts = len({fact.host for fact in facts[leader : leader + size]})
        hosts_of_groups.append(num_hosts)
        if num_hosts > math.ceil(size / ranks_per_host):
            bad.append(f"group {group} ({size} ranks on {num_hosts} hosts)")
    least, most = min(hosts_of_groups), max(hosts_of_groups)
    extent = str(least)
    if most > least:
        extent = f"{least} to {most}"
    measured = f"{topology.num_groups} groups, each on {extent} hosts"
    remedy = (
        "number ranks host by host (srun --distribution=block), or choose cluster.ranks_per_group so that hosts are "
        "whole"
    )
    return Row("placement", measured, "as few as possible").unless(bad, WARNING, remedy)


def _judge_cores(facts: Sequence[RankFacts], hosts: Sequence[Host]) -> Row:
    bad = []
    for host in hosts:
        if host.num_threads > host.first.num_cores:
            bad.append(f"{host.name} ({host.num_threads} threads, {host.first.num_cores} cores)")
    remedy = "threads that share a core slow each other down: set OMP_NUM_THREADS, or start fewer ranks"
    return Row("devices", _device_names(facts), "a core for each thread").unless(bad, WARNING, remedy)


def _judge_devices(facts: Sequence[RankFacts], hosts: Sequence[Host]) -> Row:
    bad = []
    for host in hosts:
        users: dict[str, list[str]] = defaultdict(list)
        for fact in host.ranks:
            users[fact.device].append(str(fact.rank))
        for ranks in users.values():
            if len(ranks) > 1:
                bad.append(f"{host.name}: ranks {', '.join(ranks)}")
    remedy = "have one device for them all; start one rank for each device, and let the launcher set LOCAL_RANK"
    return Row("devices", _device_names(facts), "one for each rank").unless(bad, FAILED, remedy)


def _device_names(facts: Sequence[RankFacts]) -> str:
    return ", ".join(sorted({fact.device_name for fact in facts}))


def _judge_device_memory(facts: Sequence[RankFacts], needs: Needs) -> Row:
    least = min(fact.free_device_memory for fact in facts)
    bad = [f"rank {fact.rank} ({fact.host})" for fact in facts if fact.free_device_memory < needs.base_on_rank]
    remedy = "the frozen weights alone do not fit: more ranks in a group under ZeRO-3, or offload (launch/plan.py)"
    return Row("free device memory", _gigabytes(least), _weights(needs.base_on_rank)).unless(bad, FAILED, remedy)


def _judge_host_memory(facts: Sequence[RankFacts], hosts: Sequence[Host], needs: Needs) -> Row:
    bad = [host.name for host in hosts if host.first.free_host_memory < host.base_bytes(needs)]
    most = max(host.base_bytes(needs) for host in hosts)
    least = min(fact.free_host_memory for fact in facts)
    remedy = (
        "ranks read the weights through host memory: start fewer ranks per host, or more ranks in a group under ZeRO-3"
    )
    verdict = WARNING
    if _on_cpu(facts):  # where the weights then stay
        verdict = FAILED
    return Row("free host memory", _gigabytes(least), _weights(most)).unless(bad, verdict, remedy)


def _judge_disk(facts: Sequence[RankFacts], hosts: Sequence[Host], needs: Needs) -> Row:
    blind = [host.name for host in hosts if not all(fact.sees_token for fact in host.ranks)]
    if blind:
        remedy = "does not see what rank 0 writes into output_dir: choose a folder that all hosts share"
        return Row("output_dir", "not shared", "one folder for all hosts").unless(blind, FAILED, remedy)
    least = min(fact.free_disk for fact in facts)
    bad = [host.name for host in hosts if host.first.free_disk < needs.rounds_on_disk]
    needed = f"{_gigabytes(needs.rounds_on_disk)} of checkpoints"
    remedy = "make room, choose another output_dir, or lower checkpoint.keep_rounds"
    return Row("output_dir", f"shared, {_gigabytes(least)} free", needed).unless(bad, FAILED, remedy)


def _judge_clocks(facts: Sequence[RankFacts], hosts: Sequence[Host]) -> Row:
    bad = [host.name for host in hosts if abs(host.first.clock_offset) > MAX_CLOCK_OFFSET_SECONDS]
    largest = max(abs(fact.clock_offset) for fact in facts)
    remedy = "its clock is off: times in logs and files do not compare; have NTP mended"
    return Row("clocks", f"{largest:.2f} s apart", f"{MAX_CLOCK_OFFSET_SECONDS:g} s").unless(bad, WARNING, remedy)


def _show_group_network(inside: Sequence[RankFacts]) -> Row:
    """For comparison only: what is needed depends on the layout."""
    slowest = min(inside, key=_gather_bandwidth)
    gigabits = f"{8 * slowest.gather_bandwidth / 1e9:.3g} Gbit/s"
    measured = f"{gigabits} (group {slowest.group}), {slowest.gather_latency * 1e3:.2f} ms"
    return Row("inside a group", measured, "launch/plan.py says what a step sends")


def _judge_exchange(between: Sequence[RankFacts], needs: Needs) -> Row:
    slowest = max(between, key=_exchange_seconds)
    bad = []
    if slowest.exchange_seconds > needs.exchange_seconds:
        bad.append("the leaders")
    remedy = (
        f"an exchange takes more than {SLOW_SHARE:.0%} of federation.timeout_seconds: choose the fast network with "
        "GLOO_SOCKET_IFNAME, raise that bound, or lower lora.rank"
    )
    measured = f"{slowest.exchange_seconds:.3f} s a round, {slowest.exchange_latency * 1e3:.2f} ms empty"
    needed = f"{needs.adapter / 1e6:.3g} MB in {needs.exchange_seconds:.3g} s"
    return Row("between leaders", measured, needed).unless(bad, FAILED, remedy)


def _gather_bandwidth(fact: RankFacts) -> float:
    return fact.gather_bandwidth


def _exchange_seconds(fact: RankFacts) -> float:
    return fact.exchange_seconds


def _weights(num_bytes: int) -> str:
    return f"{_gigabytes(num_bytes)} of weights"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
