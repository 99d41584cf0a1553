"""What the proof of the secret costs: `python benchmarks/exchange.py`.

Two leaders of groups with launchers of their own, in turns through a gate and tunnels (ours) and as torchft comes (its
lighthouse open, a store on the first leader, state over HTTP and unpickled): an exchange of the adapter of a model, and
the handover of it to a leader that is behind. Then one request to the job's store, through a tunnel and without.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from progress import measuring
from table import seconds_of, spread, where_and_when

from dpa_ds.distributed.launchers import LOOPBACK
from dpa_ds.distributed.tunnel import LIGHTHOUSE, STORE, Gate, Tunnel, Visitor, listen

SECRET = b"of the benchmark, long enough"
SECONDS = 60.0
NUM_REQUESTS = 500


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=float, default=26.2, help="of what is summed (%(default)s: llama-13b, rank 8)"
    )
    parser.add_argument("--repeats", type=int, default=15, help="(%(default)s)")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", RUST_LOG="error")
    print(where_and_when(packages=("torch", "torchft")))
    import torch.multiprocessing as mp
    from torchft.coordination import LighthouseServer

    from dpa_ds.distributed.store import serve_store

    settings = {"bind": f"{LOOPBACK}:0", "min_replicas": 2, "join_timeout_ms": 60_000, "quorum_tick_ms": 50}
    guarded, bare = (LighthouseServer(**settings) for _ in range(2))
    _store, store_port = serve_store(0, timedelta(seconds=SECONDS))
    gate = Gate(listen(LOOPBACK, 0), {LIGHTHOUSE: _port(guarded.address()), STORE: store_port}, SECRET, report=print)
    print(f"two leaders, {args.megabytes:g} MB, {args.repeats} repeats, ours / torchft's own:")
    with tempfile.TemporaryDirectory() as folder:
        ports = (gate.port, _port(bare.address()))
        measuring("exchanges of two leaders")
        mp.spawn(_leader, (ports, folder, round(args.megabytes * 1e6 / 4), args.repeats), nprocs=2)
        for name, seconds in json.loads((Path(folder) / "seconds.json").read_text()).items():
            _show(name, seconds["ours"], seconds["bare"], "ms", 1e3)
    measuring("requests to the store")
    _show("one request to the store", *_requests(store_port, gate.port), "us", 1e6)


def _show(name: str, ours: list[float], bare: list[float], unit: str, factor: float) -> None:
    medians = [statistics.median(seconds) * factor for seconds in (ours, bare)]
    ratios = [mine / other for mine, other in zip(ours, bare, strict=True)]
    print(f"  {name:26}{medians[0]:8.1f} / {medians[1]:.1f} {unit}, ratio {spread(ratios)}")


def _leader(rank: int, ports: tuple[int, int], folder: str, numel: int, repeats: int) -> None:
    import torch

    torch.set_num_threads(1)
    gate_port, lighthouse_port = ports
    exchanges = {"ours": _ours(rank, gate_port), "bare": _bare(rank, lighthouse_port)}
    buffer = torch.randn(numel)
    found: dict[str, dict[str, list[float]]] = {"exchange": {"ours": [], "bare": []}}
    for _ in range(repeats + 1):
        for name, exchange in exchanges.items():
            exchange(torch.zeros(1))  # together
            found["exchange"][name].append(seconds_of(lambda: exchange(buffer)))  # noqa: B023
    found["exchange"] = {name: seconds[1:] for name, seconds in found["exchange"].items()}
    if rank == 0:
        found["handover"] = _handovers(buffer, repeats)
        (Path(folder) / "seconds.json").write_text(json.dumps(found))
    exchanges["ours"](torch.zeros(1))  # the other stays until here
    os._exit(0)


def _ours(rank: int, gate_port: int) -> Callable[[Any], None]:
    import torch

    from dpa_ds.distributed.elastic import ElasticGroup, SyncState

    group = ElasticGroup(
        group=rank,
        rendezvous=f"{LOOPBACK}:{gate_port}",
        secret=SECRET,
        facts={},
        num_groups=2,
        num_clients=1,
        min_clients=2,
        timeout_seconds=SECONDS,
        join_seconds=SECONDS,
    )
    group.sync_round(SyncState(0, torch.zeros(1)))
    return lambda buffer: group.all_reduce_(buffer, "benchmark")


def _bare(rank: int, lighthouse_port: int) -> Callable[[Any], None]:
    import torch
    import torch.distributed as dist
    from torchft import Manager, ProcessGroupGloo

    timeout = timedelta(seconds=SECONDS)
    host = socket.gethostname()
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=lambda state: None,
        state_dict=dict,
        min_replica_size=2,
        use_async_quorum=False,
        timeout=timeout,
        quorum_timeout=timeout,
        rank=0,
        world_size=1,
        store_addr=host,
        store_port=store.port,
        lighthouse_addr=f"http://{LOOPBACK}:{lighthouse_port}",
        replica_id=f"bare_{rank}",
        hostname=host,
    )

    def exchange(buffer: Any, _keep: Any = store) -> None:
        manager.start_quorum(shrink_only=False)
        total = torch.cat([buffer, torch.ones(1)])  # the same copies: what others sent may be lost half-way
        manager.allreduce(total, reduce_op=dist.ReduceOp.SUM).wait()
        assert manager.should_commit()
        buffer.copy_(total[:-1])

    return exchange


def _handovers(vector: Any, repeats: int) -> dict[str, list[float]]:
    """Seconds until a leader that is behind has the state, both ends in this process."""
    from torchft.checkpointing.http_transport import HTTPTransport

    from dpa_ds.distributed.handover import HandoverTransport

    timeout = timedelta(seconds=SECONDS)
    user = {"completed_rounds": 3, "membership": "FORMED", "shared": vector, "result": vector[:1000]}
    state = {"user": {"default": user}, "torchft": {"step": 7, "batches_committed": 9}}
    transports: dict[str, Any] = {
        "ours": HandoverTransport(LOOPBACK, SECRET, lambda: 1 << 30, SECONDS),
        "bare": HTTPTransport(timeout=timeout, num_chunks=0),
    }
    found: dict[str, list[float]] = {name: [] for name in transports}
    for step in range(repeats + 1):
        for name, transport in transports.items():

            def hand_over() -> None:
                sending = threading.Thread(target=transport.send_checkpoint, args=([1], step, state, timeout))  # noqa: B023
                sending.start()
                transport.recv_checkpoint(0, transport.metadata(), step, timeout)  # noqa: B023
                sending.join()
                transport.disallow_checkpoint()  # noqa: B023

            found[name].append(seconds_of(hand_over))
    return {name: seconds[1:] for name, seconds in found.items()}


def _requests(store_port: int, gate_port: int) -> tuple[list[float], list[float]]:
    import torch.distributed as dist

    tunnel = Tunnel(LOOPBACK, gate_port, SECRET, Visitor(STORE))
    clients = [
        dist.TCPStore(LOOPBACK, port, is_master=False, wait_for_workers=False) for port in (tunnel.port, store_port)
    ]
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(NUM_REQUESTS):
        for client, seconds in zip(clients, found, strict=True):
            seconds.append(seconds_of(lambda: client.add("counter", 1)))  # noqa: B023
    return found


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


if __name__ == "__main__":
    main()
