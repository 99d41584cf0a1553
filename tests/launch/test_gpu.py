"""A GPU computes what the CPU does: the same recipe on both. Skipped where there is none; never run by CI."""

import pytest
import torch

pytestmark = [pytest.mark.launch, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
