"""Entry point of launch/rendezvous.py: where rank groups with launchers of their own find each other."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NoReturn

from dpa_ds.cli.args import option, parse
from dpa_ds.cli.bootstrap import run_alone
from dpa_ds.config.extras import require
from dpa_ds.config.load import load_config
from dpa_ds.distributed.launchers import ANY_PORT, LOOPBACK, reachable_hostname
from dpa_ds.distributed.secret import make_secret
from dpa_ds.distributed.store import serve_store
from dpa_ds.distributed.tunnel import LIGHTHOUSE, STORE, Gate, listen
from dpa_ds.errors import ClusterError


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _is_port(number: int) -> bool:
    return 0 < number < 65536


@dataclass(frozen=True, kw_only=True)
class RendezvousOptions:
    """Keeps the list of the rank groups that are present (torchft's lighthouse).

    Start it once, on a host that all groups reach, with the recipe of the run, of which output_dir, name,
    cluster.heartbeat_timeout_seconds and federation.timeout_seconds are used. Then start each group with a launcher of
    its own, in any order, now or later.

    It makes the run's secret, OUTPUT_DIR/NAME.secret, which only its owner can read; groups without it are refused.
    Where the groups share no folder, set DPA_DS_SECRET to the same text for all.

    A group that dies, hangs (cluster.heartbeat_timeout_seconds) or does not finish its round in time
    (federation.timeout_seconds) is left out, and the others continue as long as they host federation.min_clients
    clients; started again, it joins at the next round. This process is the one thing that must not be lost: without it
    every group stops, with all rounds saved. It holds nothing: start it again, then the groups. It ends with SIGTERM or
    Ctrl-C. More: docs/reliability.md.

    examples
      python launch/rendezvous.py --config RECIPE --port 29600
      deepspeed launch/run.py --config RECIPE --cluster.group 0 --cluster.rendezvous HOST:29600
      deepspeed launch/run.py --config RECIPE --cluster.group 1 --cluster.rendezvous HOST:29600
    """

    port: int = option("PORT", 29600, must_be="a number in 1..65535", test=_is_port)
    """Port to listen on."""
    host: str = option("ADDRESS", "")
    """Address of this host to listen on; if not given: all interfaces."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve in one process, without a launcher; the exit status."""
    return run_alone(partial(run, argv))


def run(argv: Sequence[str] | None) -> NoReturn:
    """Serve until a signal ends the process.

    Raises:
        ConfigError: a mistake in the command line or the recipe.
        ClusterError: nobody can listen on that port.
    """
    options, recipe = parse(argv, RendezvousOptions, "python launch/rendezvous.py --config RECIPE")
    config = load_config(recipe)
    require("elastic", "launch/rendezvous.py")
    secret = make_secret(config.run_dir)
    os.environ.setdefault("RUST_LOG", "error")  # read when torchft is imported
    from torchft.coordination import LighthouseServer

    try:
        server = LighthouseServer(
            bind=f"{LOOPBACK}:0",  # it asks nobody who he is: the gate does
            min_replicas=1,
            join_timeout_ms=round(config.federation.timeout_seconds * 1000),
            quorum_tick_ms=50,
            heartbeat_timeout_ms=round(config.cluster.heartbeat_timeout_seconds * 1000),
        )
        lighthouse_port = int(server.address().rpartition(":")[2])
        _store, store_port = serve_store(ANY_PORT, timedelta(seconds=config.cluster.timeout_seconds))
        listener = listen(options.host, options.port)
        gate = Gate(listener, {LIGHTHOUSE: lighthouse_port, STORE: store_port}, secret, report=_say)
    except (RuntimeError, OSError) as error:
        raise ClusterError(
            f"cannot listen on port {options.port} of {options.host or 'all interfaces'} ({error}): choose another "
            "with --port, or an address of this host with --host"
        ) from error
    _say(f"rendezvous for {config.name} at {reachable_hostname()}:{gate.port}")
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main())
