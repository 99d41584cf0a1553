"""Before a long job: what each rank finds out, what a run needs, and a table of both."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from dpa_ds.adapters.methods import build_schedule
from dpa_ds.cli.train import describe_rank, place
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed import probes
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.probes import RankFacts
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import World, build_world
from dpa_ds.errors import ClusterError
from dpa_ds.evaluation.layout import aligned
from dpa_ds.federation.clients import client_names
from dpa_ds.model.base import DTYPES, check_precision, resolve_model
from dpa_ds.model.directory import count_parameters
from dpa_ds.runs.storage import write_file
from dpa_ds.runs.tracking import logger, setup_logging

OK, WARNING, FAILED = "ok", "warning", "FAILED"
SLOW_SHARE = 0.1
"""An exchange that takes more than this share of federation.timeout_seconds leaves the clients too little of it."""
MAX_CLOCK_OFFSET_SECONDS = 1.0


@dataclass(frozen=True)
class Needs:
    """What a run of the recipe will ask of hosts and network. Bytes."""

    adapter: int
    """One exchange: the global adapter in fp32."""
    base_on_rank: int
    """The frozen weights that a rank keeps: all, or its share under ZeRO-3."""
    rounds_on_disk: int
    """Checkpoints of all rounds that are kept, and of the one being written."""
    exchange_seconds: float
    """At most."""


@dataclass(frozen=True)
class Row:
    """One check."""

    what: str
    measured: str
    needed: str
    verdict: str = OK
    remedy: str = ""


def check(config: RunConfig, job: JobStore, json_path: str | None = None) -> None:
    """Measure, print the table, and write it to `json_path`. Collective: every rank of the job.

    Raises:
        ClusterError: a check failed; the table tells the remedy.
    """
    job.start_watchdog(config.checkpoint.grace_seconds, config.cluster.heartbeat_timeout_seconds)
    setup_logging(is_coordinator=job.launch.global_rank == 0)
    topology = place(config, job, len(client_names(config.data, config.seed, build_schedule(config.method).pooled)))
    job.describe_rank = partial(describe_rank, topology, job)
    world = build_world(job, topology, config.cluster, config.federation.timeout_seconds)
    check_precision(config.model.precision)
    needs = compute_needs(config, topology, world)
    job.publish(f"check/{job.launch.global_rank}", asdict(probe(config, job, world, needs)))

    def judge_all() -> int:
        facts = [RankFacts(**job.lookup(f"check/{rank}")) for rank in range(topology.job_world_size)]
        rows = list(judge(facts, topology, needs))
        logger.info(render(rows))
        if json_path:
            found = {"ranks": list(map(asdict, facts)), "needs": asdict(needs), "checks": list(map(asdict, rows))}
            write_file(Path(json_path), json.dumps(found, indent=1))
        return sum(row.verdict == FAILED for row in rows)

    num_failed = job.broadcast_from_rank_zero("num_failed", judge_all)
    world.close()
    if num_failed:
        raise ClusterError(f"{num_failed} of the checks above failed: mend that before the job is started")


def compute_needs(config: RunConfig, topology: Topology, world: World) -> Needs:
    """From the recipe and the model's config; no weights are read. Collective: all ranks of the group."""
    with world.leader_first():
        directory = resolve_model(config.model, config.data.cache_dir)
    base, shared, local = count_parameters(directory, config.lora)
    zero = load_deepspeed_json(config.engine.deepspeed_config).get("zero_optimization", {})
    ranks_that_share = world.world_size if zero.get("stage", 0) == 3 else 1
    # In a round: the global adapter, and for each client its local one with two moments (method.* may need less).
    of_round = 4 * (shared + 3 * local * topology.num_clients)
    return Needs(
        adapter=4 * shared,
        base_on_rank=base * DTYPES[config.model.precision].itemsize // ranks_that_share,
        rounds_on_disk=of_round * (config.checkpoint.keep_rounds + 1),
        exchange_seconds=SLOW_SHARE * config.federation.timeout_seconds,
    )


def probe(config: RunConfig, job: JobStore, world: World, needs: Needs) -> RankFacts:
    """What this rank finds out. Collective: every rank of the job."""
    device, device_name, free_device_memory = probes.device_facts(world)
    offset = probes.clock_offset(job)
    bandwidth, latency = probes.gather_speed(world)
    exchange = (0.0, 0.0)
    if world.leaders is not None and world.topology.num_groups > 1:
        exchange = probes.exchange_speed(world.leaders, needs.adapter)
    return RankFacts(
        rank=job.launch.global_rank,
        host=job.launch.hostname,
        group=world.group,
        address=probes.own_address(),
        device=device,
        device_name=device_name,
        num_threads=probes.num_threads(),
        num_cores=len(os.sched_getaffinity(0)),
        free_device_memory=free_device_memory,
        free_host_memory=probes.free_host_memory(),
        free_disk=probes.free_disk(config.run_dir),
        sees_token=probes.sees_token(job, Path(config.output_dir)),
        clock_offset=offset,
        gather_bandwidth=bandwidth,
        gather_latency=latency,
        exchange_seconds=exchange[0],
        exchange_latency=exchange[1],
    )


def judge(facts: Sequence[RankFacts], topology: Topology, needs: Needs) -> Iterator[Row]:
    """The table's rows. A function of its arguments only."""
    yield Row("code, packages, config", f"equal on {len(facts)} ranks", "equal")  # else the job had not come this far
    yield _addresses(facts)
    yield _placement(facts, topology)
    yield _devices(facts)
    yield from _memory(facts, needs)
    yield _disk(facts, needs)
    yield _clocks(facts)
    yield from _network(facts, needs)


def _row(what: str, measured: str, needed: str, bad: Sequence[str], verdict: str, remedy: str) -> Row:
    """`verdict` if there is anything `bad`, which is named."""
    if not bad:
        return Row(what, measured, needed)
    named = ", ".join(bad[:4]) + (", ..." if len(bad) > 4 else "")
    return Row(what, measured, needed, verdict, f"{named}: {remedy}")


def _hosts(facts: Sequence[RankFacts]) -> dict[str, list[RankFacts]]:
    hosts: dict[str, list[RankFacts]] = defaultdict(list)
    for fact in facts:
        hosts[fact.host].append(fact)
    return hosts


def _addresses(facts: Sequence[RankFacts]) -> Row:
    hosts = _hosts(facts)
    listed = ", ".join(f"{host} {ranks[0].address}" for host, ranks in list(hosts.items())[:4])
    bad = [host for host, ranks in hosts.items() if ranks[0].address.startswith(("127.", "unknown"))]
    remedy = "its own name does not lead to an address that other hosts reach: set GLOO_SOCKET_IFNAME there, or mend /etc/hosts"
    needed = "reached from outside" if len(hosts) > 1 else "one host"
    return _row(f"{len(hosts)} hosts", listed, needed, bad if len(hosts) > 1 else [], WARNING, remedy)


def _placement(facts: Sequence[RankFacts], topology: Topology) -> Row:
    per_host = max(map(len, _hosts(facts).values()))
    spread, bad = [], []
    for group, leader, size in zip(topology.groups, topology.leaders, topology.group_sizes, strict=True):
        num_hosts = len({fact.host for fact in facts[leader : leader + size]})
        spread.append(num_hosts)
        if num_hosts > -(-size // per_host):
            bad.append(f"group {group} ({size} ranks on {num_hosts} hosts)")
    measured = f"{len(spread)} groups, each on {min(spread)}" + (
        f" to {max(spread)}" if max(spread) > min(spread) else ""
    )
    remedy = "number ranks host by host (srun --distribution=block), or choose cluster.ranks_per_group so that hosts are whole"
    return _row("placement", f"{measured} hosts", "as few as possible", bad, WARNING, remedy)


def _devices(facts: Sequence[RankFacts]) -> Row:
    names = sorted({fact.device_name for fact in facts})
    if all(fact.device == "" for fact in facts):
        bad = [
            f"{host} ({sum(fact.num_threads for fact in ranks)} threads, {ranks[0].num_cores} cores)"
            for host, ranks in _hosts(facts).items()
            if sum(fact.num_threads for fact in ranks) > ranks[0].num_cores
        ]
        remedy = "threads that share a core slow each other down: set OMP_NUM_THREADS, or start fewer ranks"
        return _row("devices", ", ".join(names), "a core for each thread", bad, WARNING, remedy)
    users: dict[tuple[str, str], list[str]] = defaultdict(list)
    for fact in facts:
        users[fact.host, fact.device].append(str(fact.rank))
    bad = [f"{host}: ranks {', '.join(ranks)}" for (host, _), ranks in users.items() if len(ranks) > 1]
    remedy = "have one device for them all; start one rank for each device, and let the launcher set LOCAL_RANK"
    return _row("devices", ", ".join(names), "one for each rank", bad, FAILED, remedy)


def _memory(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Row]:
    on_cpu = facts[0].device == ""
    if not on_cpu:
        least = min(fact.free_device_memory for fact in facts)
        bad = [f"rank {fact.rank} ({fact.host})" for fact in facts if fact.free_device_memory < needs.base_on_rank]
        remedy = "the frozen weights alone do not fit: more ranks in a group under ZeRO-3, or offload (launch/plan.py)"
        yield _row("free device memory", gigabytes(least), _weights(needs.base_on_rank), bad, FAILED, remedy)
    hosts = _hosts(facts)
    most = max(map(len, hosts.values())) * needs.base_on_rank
    bad = [h for h, ranks in hosts.items() if ranks[0].free_host_memory < len(ranks) * needs.base_on_rank]
    least = min(fact.free_host_memory for fact in facts)
    remedy = (
        "ranks read the weights through host memory: start fewer ranks per host, or more ranks in a group under ZeRO-3"
    )
    yield _row("free host memory", gigabytes(least), _weights(most), bad, FAILED if on_cpu else WARNING, remedy)


def _disk(facts: Sequence[RankFacts], needs: Needs) -> Row:
    least = min(fact.free_disk for fact in facts)
    blind = [host for host, ranks in _hosts(facts).items() if not all(fact.sees_token for fact in ranks)]
    if blind:
        remedy = "does not see what rank 0 writes into output_dir: choose a folder that all hosts share"
        return _row("output_dir", "not shared", "one folder for all hosts", blind, FAILED, remedy)
    bad = [host for host, ranks in _hosts(facts).items() if ranks[0].free_disk < needs.rounds_on_disk]
    needed = f"{gigabytes(needs.rounds_on_disk)} of checkpoints"
    remedy = "make room, choose another output_dir, or lower checkpoint.keep_rounds"
    return _row("output_dir", f"shared, {gigabytes(least)} free", needed, bad, FAILED, remedy)


def _clocks(facts: Sequence[RankFacts]) -> Row:
    bad = [host for host, ranks in _hosts(facts).items() if abs(ranks[0].clock_offset) > MAX_CLOCK_OFFSET_SECONDS]
    largest = max(abs(fact.clock_offset) for fact in facts)
    remedy = "its clock is off: times in logs and files do not compare; have NTP mended"
    return _row("clocks", f"{largest:.2f} s apart", f"{MAX_CLOCK_OFFSET_SECONDS:g} s", bad, WARNING, remedy)


def _network(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Row]:
    inside = [fact for fact in facts if fact.gather_bandwidth > 0]
    if inside:
        slowest = min(inside, key=lambda fact: fact.gather_bandwidth)
        measured = f"{_gbit(slowest.gather_bandwidth)} (group {slowest.group}), {slowest.gather_latency * 1e3:.2f} ms"
        yield Row("inside a group", measured, "launch/plan.py tells what a step sends")
    between = [fact for fact in facts if fact.exchange_seconds > 0]
    if between:
        slowest = max(between, key=lambda fact: fact.exchange_seconds)
        measured = f"{slowest.exchange_seconds:.3f} s a round, {slowest.exchange_latency * 1e3:.2f} ms empty"
        needed = f"{needs.adapter / 1e6:.3g} MB in {needs.exchange_seconds:.3g} s"
        bad = ["the leaders"] if slowest.exchange_seconds > needs.exchange_seconds else []
        remedy = (
            f"an exchange takes more than {SLOW_SHARE:.0%} of federation.timeout_seconds: choose the fast network with "
            "GLOO_SOCKET_IFNAME, raise that bound, or lower lora.rank"
        )
        yield _row("between leaders", measured, needed, bad, FAILED, remedy)


def _weights(num_bytes: int) -> str:
    return f"{gigabytes(num_bytes)} of weights"


def _gbit(bytes_per_second: float) -> str:
    return f"{8 * bytes_per_second / 1e9:.3g} Gbit/s"


def gigabytes(num_bytes: int) -> str:
    """Such as 12.5 GB."""
    return f"{num_bytes / 1e9:.3g} GB"


def render(rows: Sequence[Row]) -> str:
    """The table, and a line for each remedy."""
    cells = [("check", "measured", "needed", ""), *((row.what, row.measured, row.needed, row.verdict) for row in rows)]
    remedies = [f"{row.verdict}: {row.what}: {row.remedy}" for row in rows if row.remedy]
    return "\n".join([*aligned(cells, left=4), *([""] if remedies else []), *remedies])
