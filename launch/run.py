"""Train federated dual adapters: `deepspeed launch/run.py --config RECIPE [--section.field VALUE ...]`."""

import sys

from dpa_ds.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
