"""The key-value store through which the ranks of a job find each other: torch's, closed to everybody else.

torch's TCPStore has no authentication, so it listens on the loopback interface of rank 0's host. A job on one host
needs no more. On several hosts a gate stands before it, on the interface that MASTER_ADDR names, and the other ranks
go through tunnels (tunnel.py). Under torchrun, whose agent has a store of its own, that one says only where ours is.
"""

import json
import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from dpa_ds.distributed.launchers import ANY_PORT, LOOPBACK, Launch
from dpa_ds.distributed.meeting import announce_port, ask_port
from dpa_ds.distributed.secret import HungUp, Refused, user_secret
from dpa_ds.distributed.tunnel import STORE, Gate, Tunnel, Visitor, listen
from dpa_ds.distributed.watchdog import say
from dpa_ds.errors import ClusterError

if TYPE_CHECKING:
    import torch.distributed as dist

RETRY_SECONDS = 0.1


def connect_store(launch: Launch, timeout_seconds: float) -> "dist.Store":
    """Serve the job's store (rank 0), or reach it. Collective: every rank of the job.

    Args:
        timeout_seconds: bound on waiting for rank 0, and on each wait for a key.

    Raises:
        ClusterError: the port is taken, or nobody answers there; or this rank has another secret than rank 0.
    """
    import torch.distributed as dist  # takes a second, which --help need not wait for

    if launch.job_world_size == 1:
        return dist.HashStore()
    timeout = timedelta(seconds=timeout_seconds)
    if launch.global_rank == 0:
        has_named_port = launch.on_one_host and not launch.agent_store
        try:
            store, port = serve_store(launch.master_port if has_named_port else ANY_PORT, timeout)
        except OSError as error:
            raise _cannot("serve", launch, error) from error
        if not launch.on_one_host:
            port = _open_gate(launch, port)
        _announce(launch, port, timeout)
        return store
    port = _learn_port(launch, timeout)
    if not launch.on_one_host:
        port = _open_tunnel(launch, port, timeout_seconds)
    try:
        return dist.TCPStore(LOOPBACK, port, None, False, timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise _cannot("reach", launch, error) from error


def serve_store(port: int, timeout: timedelta) -> "tuple[dist.TCPStore, int]":
    """A store on this host's loopback interface alone, as long as it is kept; and its port.

    Args:
        port: ANY_PORT for one that is free.
        timeout: bound on each wait for a key.

    Raises:
        OSError: the port is taken.
    """
    import torch.distributed as dist

    listener = listen(LOOPBACK, port)
    port = int(listener.getsockname()[1])
    descriptor = listener.detach()
    return dist.TCPStore(LOOPBACK, port, None, True, timeout, False, master_listen_fd=descriptor), port


def _open_gate(launch: Launch, store_port: int) -> int:
    """Let the ranks of other hosts in.

    Returns:
        the gate's port.
    """
    port = ANY_PORT if launch.agent_store else launch.master_port
    try:
        listener = listen(_address_of_this_host(launch.master_addr), port)
    except OSError as error:
        raise _cannot("serve", launch, error) from error
    return Gate(listener, {STORE: store_port}, user_secret(), report=say).port


def _address_of_this_host(host: str) -> str:
    """The address that `host` stands for, if others can reach this host there; else empty: all interfaces."""
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        listen(address, ANY_PORT).close()
    except OSError:  # an address that leads here by translation, or none
        return ""
    return "" if address.startswith("127.") or address == "::1" else address


def _open_tunnel(launch: Launch, port: int, timeout_seconds: float) -> int:
    """A port of this host that leads to the store, once rank 0 has opened its gate."""
    tunnel = Tunnel(launch.master_addr, port, user_secret(), Visitor(STORE))
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            tunnel.try_gate()
            return tunnel.port
        except (HungUp, OSError) as error:
            if time.monotonic() > deadline:
                raise _cannot("reach", launch, error) from error
            time.sleep(RETRY_SECONDS)
        except Refused as error:
            raise ClusterError(
                f"rank {launch.global_rank} on {launch.hostname} and rank 0 do not know each other "
                f"({launch.master_addr}:{port}: {error}): both read the secret in the user's home "
                "(.config/dpa_ds/secret); where the hosts share none, set DPA_DS_SECRET to the same text on all of "
                "them; or another program listens there: choose another MASTER_PORT (deepspeed --master_port)"
            ) from error


def _announce(launch: Launch, port: int, timeout: timedelta) -> None:
    if launch.agent_store:
        _agent_store(launch, timeout).set("address", json.dumps(port))
    elif launch.master_port == ANY_PORT:
        announce_port(launch.launcher_process, port)


def _learn_port(launch: Launch, timeout: timedelta) -> int:
    if launch.agent_store:
        try:
            return int(json.loads(_agent_store(launch, timeout).get("address")))
        except (RuntimeError, ValueError, TypeError) as error:
            raise _cannot("reach", launch, error) from error
    if launch.master_port == ANY_PORT:
        return ask_port(launch.launcher_process, timeout.total_seconds())
    return launch.master_port


def _agent_store(launch: Launch, timeout: timedelta) -> "dist.Store":
    import torch.distributed as dist

    try:
        store = dist.TCPStore(launch.master_addr, launch.master_port, None, False, timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise _cannot("reach", launch, error) from error
    # A restarted torchrun attempt must not read the keys of the one before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"dpa_ds/{attempt}", store)


def _cannot(verb: str, launch: Launch, error: Exception) -> ClusterError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ClusterError(
        f"rank {launch.global_rank} cannot {verb} the job's store at {launch.meeting_place}: "
        f"{reason}; choose another MASTER_PORT (deepspeed --master_port)"
    )
