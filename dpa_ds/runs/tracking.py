"""Reports numbers and messages: metrics.jsonl, TensorBoard, a progress bar, the log. Logs once, counts always."""

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpa_ds.config.schema import TrackingConfig
from dpa_ds.errors import CheckpointError, storage_errors
from dpa_ds.runs.curves import CurveWriter
from dpa_ds.runs.storage import fsync, write_file
from dpa_ds.runs.trackers import ExperimentTrackers, numbers_of

logger = logging.getLogger("dpa_ds")

RESULT = (logging.INFO + logging.WARNING) // 2
"""Level of what a program was started for: it is shown, however quiet the program is."""
TENSORBOARD = "tensorboard"
"""Folder of the curves in a run folder."""
LIVE_SECONDS = 1.0
"""So often the numbers beside a progress bar on a terminal are renewed."""
ALL_CLIENTS = "rounds"
"""TensorBoard run with the numbers of whole rounds; the others are of single clients."""


def setup_logging(is_coordinator: bool, quiet: bool = False) -> None:
    """Send this package's messages to stdout: everything from the coordinator, warnings from other ranks.

    Args:
        quiet: warnings and results alone; log files, which are handlers of their own, have every line.

    Libraries are kept to warnings: DeepSpeed alone logs some forty lines per rank at start.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(RESULT if quiet else logging.NOTSET)
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_coordinator else logging.WARNING)
    for name in ("DeepSpeed", "deepspeed", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # PEFT imports it wherever it is installed, and it warns of a kernel of the hub that it could not fetch.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Deprecations between peft, torch and transformers: lines from every rank that a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch|dpa_ds)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns after every fork


class LogFile(logging.Handler):
    """What the console says, in a file of the run folder with times: it is there when the terminal is gone.

    Lines of the time before the run exists are kept in memory, until `begin`. A disk that refuses costs the file, and
    not the training.

    Args:
        path: to which lines are appended.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._path = path
        self._waiting: list[str] | None = []

    def begin(self) -> None:
        """Write what was said so far, and from now on every line."""
        waiting = "".join(self._waiting or [])
        self._waiting = None
        self._append(waiting)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        line = f"{self.format(record)}\n"
        if self._waiting is None:
            self._append(line)
        else:
            self._waiting.append(line)

    def _append(self, text: str) -> None:
        """Opened for each text: it is on its way to the disk when the process is killed."""
        try:
            with self._path.open("a") as file:
                file.write(text)
        except OSError as error:
            logger.removeHandler(self)
            logger.warning(f"cannot write {self._path}: {error}; the training continues without its log file")


class Tracker:
    """Reports the numbers of one rank.

    Leaders write the TensorBoard events of their clients; the coordinator writes the records and shows progress.

    Args:
        run_dir: folder of the run, or None on ranks that write nothing.
        is_coordinator: whether this rank is the job's coordinator.
        clients_dir: where the curves of single clients go; None: to `run_dir`.
        earlier_clients_dirs: where they may have gone when a client had another rank group.
        trackers: services that get copies of the records.

    Raises:
        CheckpointError: something else is where the TensorBoard events belong.
    """

    def __init__(
        self,
        run_dir: Path | None,
        is_coordinator: bool,
        config: TrackingConfig,
        clients_dir: Path | None = None,
        earlier_clients_dirs: Sequence[Path] = (),
        trackers: ExperimentTrackers | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._clients_dir = clients_dir or run_dir
        self._earlier_clients_dirs = earlier_clients_dirs
        self._trackers = trackers
        self._unpublished: list[dict[str, Any]] | None = None
        """Records since the last round that was published; None: those of the file are not read yet."""
        self._is_coordinator = is_coordinator
        self._config = config
        self._writers: dict[str, CurveWriter] = {}
        self._lost_curves = False
        self._bar: tqdm[Any] | None = None
        self._last_line = time.monotonic()

    def drop_records_after(self, server_round: int) -> None:
        """Delete the records of rounds that will be run again, so that each round is recorded once.

        A run without a complete round loses all: round 0, the state before training, is evaluated again.
        """
        self._keep_records(lambda number: server_round > 0 and number <= server_round)

    def drop_records_of(self, server_round: int) -> None:
        """Delete the records of one round, and a line that was cut off: another coordinator was lost as it wrote."""
        self._keep_records(lambda number: number != server_round)

    def _keep_records(self, is_kept: Callable[[int], bool]) -> None:
        """Keep the records of some rounds only (coordinator).

        Args:
            is_kept: by a round's number.
        """
        path = self._records_path
        if not self._is_coordinator or path is None or not path.is_file():
            return
        self._unpublished = None
        lines = [json.dumps(record) + "\n" for record in read_records(path) if is_kept(record["round"])]
        write_file(path, "".join(lines))

    def record(self, kind: str, server_round: int, **values: Any) -> None:
        """Append one record to metrics.jsonl (coordinator only). Raises CheckpointError if the file system refuses."""
        if self._is_coordinator and self._records_path is not None:
            record = {"kind": kind, "round": server_round, **values}
            line = json.dumps(record)
            with storage_errors(self._records_path), self._records_path.open("a") as file:
                file.write(line + "\n")
            if self._unpublished is not None:
                self._unpublished.append(record)

    def sync_records(self) -> None:
        """Wait until all records are on the disk (coordinator only).

        Raises:
            CheckpointError: the file system refuses.
        """
        if self._is_coordinator and self._records_path is not None:
            with storage_errors(self._records_path):
                fsync(self._records_path)

    def publish(self) -> None:
        """Send the records of rounds that count now, and were not sent yet, to the services of the recipe. The
        coordinator of all leaders does."""
        if self._trackers is None or not self._trackers.is_used or self._records_path is None:
            return
        if self._unpublished is None:  # earlier processes may have been lost before they sent theirs
            self._unpublished = read_records(self._records_path)
        self._trackers.publish(numbers_of(self._unpublished))
        self._unpublished = []

    @property
    def _records_path(self) -> Path | None:
        return self._run_dir / "metrics.jsonl" if self._run_dir else None

    def scalars(self, source: str, values: Mapping[str, float | Sequence[float]], first_step: int) -> None:
        """Write scalars, or series of consecutive steps from `first_step`, under the TensorBoard run `source`, in place
        of what an earlier process wrote there of these steps or later ones.

        They are in the file when this returns. So what is saved later, and says that these steps are done, is never on
        disk without them: a process that is killed would leave a gap that nobody writes again.
        """
        if self._run_dir is None or not self._config.tensorboard or self._lost_curves:
            return
        curves = {tag: [value] if isinstance(value, float | int) else value for tag, value in values.items()}
        with self._losing_curves():
            self._writer(source).draw(curves, first_step)

    def leave_curves(self, source: str) -> None:
        """Close a TensorBoard run that another process writes from now on. If this one writes to it again, it takes
        over what the other one wrote."""
        writer = self._writers.pop(source, None)
        if writer is not None:
            with self._losing_curves():
                writer.close()

    def close(self) -> None:
        """Write all TensorBoard events to disk, and send what is left to send. May be called again."""
        if self._trackers is not None:
            self._trackers.close()
        for writer in self._writers.values():
            with self._losing_curves():
                writer.close()

    def _writer(self, source: str) -> CurveWriter:
        if source not in self._writers:
            folder = self._run_dir
            earlier: list[Path] = []
            if source != ALL_CLIENTS:
                folder = self._clients_dir
                earlier = [place / TENSORBOARD / source for place in self._earlier_clients_dirs]
            assert folder is not None, "a rank that writes"
            self._writers[source] = CurveWriter(folder / TENSORBOARD / source, earlier)
        return self._writers[source]

    @contextlib.contextmanager
    def _losing_curves(self) -> Iterator[None]:
        """Where the disk of the TensorBoard events is full or refuses, curves are lost, and the training is not."""
        try:
            yield
        except OSError as error:
            if not self._lost_curves:
                logger.warning(
                    f"cannot write {self._run_dir}/tensorboard: {error}; the training continues without TensorBoard "
                    "curves; metrics.jsonl has the numbers of every round"
                )
            self._lost_curves = True

    @contextlib.contextmanager
    def progress(self, total_steps: int, unit: str = "step") -> Iterator[None]:
        """Show progress over `total_steps` (optimizer steps of this rank's group), with an ETA, on the coordinator."""
        if self._is_coordinator and total_steps > 0 and not self._config.quiet:
            # A bar on a terminal; elsewhere (Slurm logs) a line now and then, which `advance` formats by a silent bar.
            silent = open(os.devnull, "w") if not sys.stderr.isatty() else None  # noqa: SIM115
            self._bar = tqdm(total=total_steps, unit=unit, dynamic_ncols=True, smoothing=0.05, file=silent)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def advance(self, description: str, steps: int = 1, numbers: Callable[[], str] | None = None) -> None:
        """Count `steps` as done, and show it.

        Args:
            numbers: what is to be shown beside it. Called only now and then: it may wait for the device.
        """
        if self._bar is None:
            return
        is_live = sys.stderr.isatty()
        self._bar.set_description_str(description, refresh=False)
        every_seconds = LIVE_SECONDS if is_live else self._config.log_every_seconds
        is_due = time.monotonic() - self._last_line >= every_seconds
        if numbers is None:  # those of another client
            self._bar.set_postfix_str("", refresh=False)
        elif is_due:
            self._bar.set_postfix_str(numbers(), refresh=False)
        self._bar.update(steps)
        if is_due:
            self._last_line = time.monotonic()
        if is_due and not is_live:
            meter = {**self._bar.format_dict, "prefix": description, "ncols": None, "bar_format": None}
            logger.info(tqdm.format_meter(**meter))

    def say(self, message: str) -> None:
        """Log one line without breaking the progress bar."""
        if self._is_coordinator:
            with tqdm.external_write_mode(file=sys.stdout):
                logger.info(message)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl. A line that is not a record, such as one cut off by a crash, is left out.

    Raises:
        CheckpointError: the file is missing or cannot be read.
    """
    records = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): restore it; the adapters of the run are not affected"
        ) from error
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("round"), int) and isinstance(record.get("kind"), str):
            records.append(record)
    return records
