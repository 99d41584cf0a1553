"""A real RoundState of one rank, and a client without examples, for tests of what is saved inside a round."""

from pathlib import Path

import numpy as np
import torch

from dpa_ds.config.schema import CheckpointConfig
from dpa_ds.data.tokenize import TokenizedExamples
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.launchers import Launch
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import World
from dpa_ds.federation.aggregation.base import ServerState
from dpa_ds.federation.clients import HostedClient
from dpa_ds.federation.progress import ClientState
from dpa_ds.federation.round_state import RoundSaving, RoundState
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.storage import BackgroundWriter

LAYOUT = {"ranks": 1}


def one_client(state: ClientState) -> HostedClient:
    """Client 0 in this state."""
    examples = TokenizedExamples(
        np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros((0, 2), np.int32), np.zeros(1, np.int64), 0
    )
    return HostedClient(0, "client_0", (), examples, None, state, None)


def make_round_state(run_dir: Path, writer: BackgroundWriter) -> RoundState:
    """Of a job of one rank."""
    job = JobStore(Launch("single", 0, 1, 0, "127.0.0.1", 0))
    world = World(Topology((1,), 1), 0, 0, 1, torch.device("cpu"), None)
    saving = RoundSaving(RunFolder(run_dir), writer, CheckpointConfig(), LAYOUT)
    server_state = ServerState({"a.lora_A.weight": torch.zeros(2, 3)}, torch.zeros(0, 0))
    return RoundState(saving, world, job, "skip", server_state, 0)
