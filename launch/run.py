"""Train federated dual adapters: `deepspeed launch/run.py --config RECIPE [--section.field VALUE ...]`."""

import os
import sys


def main() -> None:
    """Entry point under every launcher: deepspeed, torchrun, srun, mpirun, python."""

    # torch reads it when it is first imported. Below ERROR each rank adds 40 lines of C++ stack to a peer's one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dpa_ds.cli.bootstrap import run_job

    def work(config, job):  # type: ignore[no-untyped-def]
        from dpa_ds.cli.train import train  # imports DeepSpeed: only once config and ranks are in order

        train(config, job)

    run_job(sys.argv[1:], work)


if __name__ == "__main__":
    main()
