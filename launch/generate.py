"""Answer as one client's model: `python launch/generate.py --run runs/NAME --client 3 [--prompt TEXT]`."""

import sys

from dpa_ds.cli.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
