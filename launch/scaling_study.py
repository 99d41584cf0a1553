"""How does it scale: `python launch/scaling_study.py --config RECIPE --over groups=1,2,4 --output runs/scale`."""

import sys

from dpa_ds.cli.scaling_study import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
