"""What `model.precision: auto` means for a job, found out before anything is built."""

import os
from dataclasses import replace
from pathlib import Path

from dpa_ds.config.load import load_config
from dpa_ds.config.schema import ModelConfig
from dpa_ds.distributed.job_store import JobStore


def settle_precision(model: ModelConfig, run_dir: Path, job: JobStore) -> ModelConfig:
    """`model` with the precision of all ranks in the place of auto. Collective: every rank of the job.

    A run that exists keeps its precision, wherever it is resumed: a round in another one would be another result. A new
    run has bf16 where every rank computes it natively, else fp32.

    Raises:
        ConfigError: the recipe of the run that exists cannot be read.
    """
    if model.precision != "auto":
        return model
    from dpa_ds.distributed.device import device_type  # imports torch: only once config and ranks are in order
    from dpa_ds.model.precision import native_precision

    job.publish(f"native_precision/{job.launch.global_rank}", native_precision(device_type()))

    def decide() -> str:
        recipe = run_dir / "config.yaml"
        if os.path.isfile(recipe):  # unlike Path.is_file it takes any path
            return load_config(["--config", str(recipe)]).model.precision
        found = {str(job.lookup(f"native_precision/{rank}")) for rank in range(job.launch.job_world_size)}
        return "bf16" if found == {"bf16"} else "fp32"

    return replace(model, precision=job.broadcast_from_rank_zero("precision", decide))
