"""What fits, and how fast: `python launch/plan.py --config RECIPE --cluster nodes=8,gpus=4,gpu=h100-80g,net=400Gb`."""

import sys

from dpa_ds.cli.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
