"""Where rank groups with launchers of their own meet: `python launch/rendezvous.py --config RECIPE --port 29600`."""

import sys

from dpa_ds.cli.rendezvous import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
