"""Runs one plain function on N real ranks: forked from a server that has imported everything, with a deadline.

A FileStore under tmp_path joins the ranks, so no port is used. What the function returns must be picklable and hold
no torch tensor: those travel as file descriptors, which end with the rank.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PRELOADED = [
    "datasets",
    "dpa_ds.config.load",
    "dpa_ds.cli.session",
    "matplotlib.figure",
    # What these would import when they are first used, half of a small run's time:
    "deepspeed.runtime.zero.muon.muon_optimizer",  # deepspeed.initialize: torch.compile, and with it torch._inductor
    "transformers.models.llama.modeling_llama",
]

LINGER_SECONDS = 60.0


def run_on_ranks(
    function: Callable[..., Any], num_ranks: int, tmp_path: Path, *args: Any, deadline_seconds: float = 300.0
) -> list[Any]:
    """Call `function(job, *args)` on `num_ranks` ranks; what each returned, by global rank.

    Raises AssertionError with the first rank's traceback if one fails, or naming the ranks that hang.
    """
    context = _forkserver()
    store_file = tmp_path / f"store-{time.monotonic_ns()}"
    pipes, processes = [], []
    for rank in range(num_ranks):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(
            target=_run, args=(function, rank, num_ranks, str(store_file), sending, args), daemon=True
        )
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    deadline = time.monotonic() + deadline_seconds
    results: dict[int, Any] = {}
    try:
        while len(results) < num_ranks:
            for rank in set(range(num_ranks)) - results.keys():
                if pipes[rank].poll(0.02):
                    ok, value = pipes[rank].recv()
                    assert ok, f"{function.__name__} failed on rank {rank} of {num_ranks}:\n{value}"
                    results[rank] = value
                elif not processes[rank].is_alive() and not pipes[rank].poll():
                    raise AssertionError(f"{function.__name__}: rank {rank} died (exit {processes[rank].exitcode})")
            missing = sorted(set(range(num_ranks)) - results.keys())
            assert time.monotonic() < deadline, f"{function.__name__} hung on ranks {missing} of {num_ranks}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(num_ranks)]


def train_on_rank(job: Any, argv: Sequence[str]) -> None:
    """For `run_on_ranks`: the training that `launch/run.py` starts with the arguments `argv`."""
    from dpa_ds.cli.session import train
    from dpa_ds.config.load import load_config

    train(load_config(argv), job)


def _forkserver() -> Any:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _run(
    function: Callable[..., Any], rank: int, num_ranks: int, store_file: str, pipe: Any, args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    from dpa_ds.distributed.job_store import JobStore
    from dpa_ds.distributed.launchers import Launch

    try:
        launch = Launch("env", rank, num_ranks, rank, "127.0.0.1", 0)
        job = JobStore(launch, dist.FileStore(store_file, num_ranks))
        job.hosts = [launch.hostname] * num_ranks
        pipe.send((True, function(job, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        time.sleep(LINGER_SECONDS)  # the others may still be connecting to this rank; it is killed with them
        os._exit(0)
