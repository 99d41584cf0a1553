"""A recipe and a job script to edit: `python launch/init.py [NAME] [DIR]`."""

import sys

from dpa_ds.cli.init import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
