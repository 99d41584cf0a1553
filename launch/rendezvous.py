"""Where rank groups with launchers of their own find each other: `python launch/rendezvous.py --config RECIPE --port 29600`."""

import os
import sys
import time

USAGE = """\
usage: python launch/rendezvous.py --config RECIPE [--port 29600] [--SECTION.FIELD VALUE]

Keeps the list of the rank groups that are present (torchft's lighthouse). Start it once, on a host that all groups reach, with the
recipe of the run; then start each group with a launcher of its own, in any order, now or later:

  deepspeed launch/run.py --config RECIPE --cluster.group 0 --cluster.rendezvous HOST:29600
  deepspeed launch/run.py --config RECIPE --cluster.group 1 --cluster.rendezvous HOST:29600

A group that dies, hangs (cluster.heartbeat_timeout_seconds) or does not finish its round in time (federation.timeout_seconds) is left out, and
the others continue as long as they host federation.min_clients clients; started again, it joins at the next round. This process is the one
thing that must not be lost: without it every group stops, with all rounds saved. It holds nothing: start it again, then the groups. It
ends with SIGTERM or Ctrl-C. More: docs/reliability.md.

  --port PORT              to listen on (default: 29600)
  --config RECIPE          the run's recipe: its cluster.heartbeat_timeout_seconds and federation.timeout_seconds are used
"""


def main() -> None:
    """Entry point; one process, no launcher."""
    from dpa_ds.cli.args import take_options
    from dpa_ds.config.load import load_config
    from dpa_ds.errors import DpaError

    if any(word in ("-h", "--help") for word in sys.argv[1:]):
        sys.stdout.write(USAGE)
        return
    try:
        own, recipe_arguments = take_options(sys.argv[1:], ("port",))
        port = own.get("port", "29600")
        serve(load_config(recipe_arguments), port)
    except DpaError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def serve(config, port):  # type: ignore[no-untyped-def]
    """Run the lighthouse until a signal ends the process."""
    from dpa_ds.errors import ClusterError

    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(f"--port must be a number in 1..65535, got {port}")
    os.environ.setdefault("RUST_LOG", "error")
    from torchft.coordination import LighthouseServer

    try:
        server = LighthouseServer(
            bind=f"[::]:{port}",
            min_replicas=1,
            join_timeout_ms=round(config.federation.timeout_seconds * 1000),
            quorum_tick_ms=50,
            heartbeat_timeout_ms=round(config.cluster.heartbeat_timeout_seconds * 1000),
        )
    except RuntimeError as error:
        raise ClusterError(f"cannot listen on port {port} ({error}): choose another with --port") from error
    sys.stdout.write(f"rendezvous for {config.name} at {server.address()}\n")
    sys.stdout.flush()
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
