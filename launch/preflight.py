"""Are hosts, network, disk and software in order for a long job? `deepspeed launch/preflight.py --config RECIPE`."""

import sys

from dpa_ds.cli.preflight import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
