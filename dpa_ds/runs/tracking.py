"""Where numbers and words go: metrics.jsonl, TensorBoard, a progress bar, the log. Log once, count always."""

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpa_ds.config.schema import TrackingConfig
from dpa_ds.errors import storage_errors

logger = logging.getLogger("dpa_ds")


def setup_logging(is_coordinator: bool) -> None:
    """Send this package's messages to stdout: everything from the coordinator, warnings from other ranks.

    Libraries are kept to warnings: DeepSpeed alone logs some forty lines per rank at start.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_coordinator else logging.WARNING)
    for name in ("DeepSpeed", "deepspeed", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Deprecations between peft, torch and transformers: lines from every rank that a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch|dpa_ds)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns after every fork


class Tracker:
    """Numbers of one rank. Leaders write TensorBoard events of their clients, the coordinator the records.

    Args:
        run_dir: folder of the run, or None on ranks that write nothing.
        is_coordinator: this rank writes metrics.jsonl and shows progress.
    """

    def __init__(self, run_dir: Path | None, is_coordinator: bool, config: TrackingConfig) -> None:
        self._run_dir, self._is_main, self._config = run_dir, is_coordinator, config
        self._writers: dict[str, Any] = {}
        self._bar: tqdm[Any] | None = None
        self._last_line = time.monotonic()

    # ---- records ----------------------------------------------------------------------------------------------

    def drop_records_after(self, server_round: int) -> None:
        """Forget records of rounds that will be run again, so that each round is recorded once.

        Before the first complete round that is all of them: round 0, the state before training, is evaluated again.
        """
        path = self._records_path
        if self._is_main and path is not None and path.is_file():
            kept = [record for record in read_records(path) if record["round"] <= server_round and server_round > 0]
            temporary = path.with_suffix(".tmp")
            with storage_errors(path):
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
                temporary.replace(path)

    def record(self, kind: str, server_round: int, **values: Any) -> None:
        """Append one record to metrics.jsonl (coordinator only). Raises CheckpointError if the file system refuses."""
        if self._is_main and self._records_path is not None:
            line = json.dumps({"kind": kind, "round": server_round, **values})
            with storage_errors(self._records_path), self._records_path.open("a") as file:
                file.write(line + "\n")

    @property
    def _records_path(self) -> Path | None:
        return self._run_dir / "metrics.jsonl" if self._run_dir else None

    # ---- TensorBoard ------------------------------------------------------------------------------------------

    def scalars(self, source: str, values: Mapping[str, float | Sequence[float]], first_step: int) -> None:
        """Write scalars, or series of consecutive steps from `first_step`, under the TensorBoard run `source`."""
        if self._run_dir is None or not self._config.tensorboard:
            return
        if source not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step: events of steps that an interrupted attempt wrote, and this one writes again, are hidden
            self._writers[source] = SummaryWriter(str(self._run_dir / "tensorboard" / source), purge_step=first_step)
        for tag, value in values.items():
            series = [value] if isinstance(value, float | int) else value
            for step, number in enumerate(series, first_step):
                self._writers[source].add_scalar(tag, number, step)

    def close(self) -> None:
        """Flush everything to disk."""
        for writer in self._writers.values():
            writer.close()

    # ---- progress ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def progress(self, total_steps: int, unit: str = "step") -> Iterator[None]:
        """Show progress over `total_steps` (optimizer steps of this rank's group), with an ETA, on the coordinator."""
        if self._is_main and total_steps > 0:
            # A bar on a terminal; elsewhere (Slurm logs) a line now and then.
            silent = open(os.devnull, "w") if not sys.stderr.isatty() else None  # noqa: SIM115
            self._bar = tqdm(total=total_steps, unit=unit, dynamic_ncols=True, smoothing=0.05, file=silent)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def advance(self, description: str, steps: int = 1) -> None:
        """So many steps are done."""
        if self._bar is None:
            return
        self._bar.set_description_str(description, refresh=False)
        self._bar.update(steps)
        if not sys.stderr.isatty() and time.monotonic() - self._last_line >= self._config.log_every_seconds:
            self._last_line = time.monotonic()
            meter = {**self._bar.format_dict, "prefix": description, "ncols": 100, "bar_format": None}
            logger.info(tqdm.format_meter(**meter))

    def say(self, message: str) -> None:
        """Log one line without breaking the progress bar."""
        if self._is_main:
            with tqdm.external_write_mode(file=sys.stdout):
                logger.info(message)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a line that is none, such as one cut off by a crash, is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("round"), int) and isinstance(record.get("kind"), str):
            records.append(record)
    return records
