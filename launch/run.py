"""Train federated dual adapters: `deepspeed launch/run.py --config RECIPE [--section.field VALUE ...]`."""

import sys

from dpa_ds.start import run_job


def main() -> None:
    """Entry point under every launcher: deepspeed, torchrun, srun, mpirun, python."""

    def work(config, job):  # type: ignore[no-untyped-def]
        from dpa_ds.train import train  # imports DeepSpeed: only once config and ranks are in order

        train(config, job)

    run_job(sys.argv[1:], work)


if __name__ == "__main__":
    main()
