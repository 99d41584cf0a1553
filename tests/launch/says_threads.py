"""Says how many threads a rank takes that is alone on its host, for tests."""

import sys

import torch

from dpa_ds.distributed.device import claim_device
from dpa_ds.distributed.launchers import discover_launch

claim_device(discover_launch(), ranks_on_host=1)
sys.stdout.write(f"threads={torch.get_num_threads()}\n")
