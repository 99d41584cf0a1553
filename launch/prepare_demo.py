"""Fetch the demo's model and build its data: `python launch/prepare_demo.py [--cache DIR]`."""

import sys

from dpa_ds.cli.prepare_demo import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
