"""Set methods side by side: `deepspeed launch/compare.py --config RECIPE --methods feddpa_t,fedit --seeds 0,1,2`."""

import sys

from dpa_ds.cli.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
