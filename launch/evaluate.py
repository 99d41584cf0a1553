"""Score a trained run on test instances: `deepspeed launch/evaluate.py --run runs/NAME [--option VALUE ...]`."""

import sys

from dpa_ds.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
