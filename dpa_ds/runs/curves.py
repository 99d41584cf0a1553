"""The TensorBoard curves of a run: every point is there once, whatever ended the processes that drew it.

    <run>/tensorboard/rounds/events.out.tfevents.*      numbers of whole rounds, by the coordinator
                      client_02/events.out.tfevents.*   numbers of one client, by the leader of its group

A process that resumes draws some points again. TensorBoard can hide older ones (`purge_step`), but by one number for
all curves of a folder, where rounds and the steps of two adapters count apart; and of its two readers only one does.
So nothing is hidden here: who begins to write a folder copies what earlier processes drew into a file of its own, and
deletes theirs. Who draws a curve from some step on replaces what it had from there on.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAGS = {
    "held_out_loss": "loss/held_out",
    "P": "scores/P",
    "TTP": "scores/TTP",
    "tokens_per_second": "tokens/per_second",
    "computed_share": "tokens/computed_share",
    # Of run folders that older versions began:
    "held_out/loss": "loss/held_out",
    "global/loss": "loss/global",
    "local/loss": "loss/local",
    "global/grad_norm": "optimizer/global_grad_norm",
    "local/grad_norm": "optimizer/local_grad_norm",
    "global/lr": "optimizer/global_lr",
    "local/lr": "optimizer/local_lr",
}
"""Name in metrics.jsonl, or in an older version, and the tag of its curve. TensorBoard sorts its page by tags: losses
come first, bytes last."""


def tag_of(name: str) -> str:
    """The tag of the curve that shows a number of metrics.jsonl."""
    if name.startswith("bytes_handed/"):
        return name.replace("bytes_handed/", "traffic_bytes/", 1)
    return TAGS.get(name, name)


@dataclass(frozen=True)
class Point:
    """One number of a curve, and when it was drawn, in seconds since 1970."""

    value: float
    wall_time: float


Curves = dict[str, dict[int, Point]]
"""Tag -> step -> point."""


class CurveWriter:
    """Draws the curves of one folder, of which it is the only writer.

    Args:
        folder: where its file goes.
        earlier: other folders that may hold parts of the same curves; they are moved to `folder`.

    Raises:
        OSError: the file system refuses. So may every method.
    """

    def __init__(self, folder: Path, earlier: Sequence[Path] = ()) -> None:
        self._folder = folder
        # The own folder last: of a point that is there twice the later one is kept.
        self._places = [place for place in earlier if place != folder] + [folder]
        self._last_steps: dict[str, int] = {}
        self._writer = self._take_over(outdated=(), first_step=0)

    def draw(self, curves: Mapping[str, Sequence[float]], first_step: int) -> None:
        """Draw each curve from `first_step` on, one point a step, in place of what it had from there on.

        The points are in the file when this returns.
        """
        outdated = [tag for tag in curves if self._last_steps.get(tag, -1) >= first_step]
        if outdated:
            self._writer.close()
            self._writer = self._take_over(outdated, first_step)
        for tag, values in curves.items():
            for step, value in enumerate(values, first_step):
                self._writer.add_scalar(tag, value, step)
                self._last_steps[tag] = step
        self._writer.flush()

    def close(self) -> None:
        """Close the file. May be called again."""
        self._writer.close()

    def _take_over(self, outdated: Sequence[str], first_step: int) -> Any:
        """A writer with a new file, which holds all points that were drawn so far; their files are deleted.

        Args:
            outdated: tags whose points at `first_step` and later are left out.
        """
        # Imported here: runs without TensorBoard need not have it.
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _report_unless_lost_curves
        files = [path for place in self._places for path in event_files(place)]
        curves = read_curves(files)
        for tag in outdated:
            curves[tag] = {step: point for step, point in curves[tag].items() if step < first_step}
        # A TensorBoard that is open forgets what it has read, instead of showing it twice: the new file has all of it.
        writer = SummaryWriter(str(self._folder), purge_step=0 if files else None)
        try:
            for tag, points in curves.items():
                for step in sorted(points):
                    writer.add_scalar(tag, points[step].value, step, walltime=points[step].wall_time)
            writer.flush()
        except OSError:
            for half_written in set(event_files(self._folder)) - set(files):
                half_written.unlink(missing_ok=True)
            raise
        for path in files:
            with contextlib.suppress(OSError):  # it may be another group's; the next writer leaves its points out again
                path.unlink()
        self._last_steps = {tag: max(points) for tag, points in curves.items() if points}
        return writer


def event_files(folder: Path) -> list[Path]:
    """TensorBoard's files in a folder, oldest first."""
    return sorted(folder.glob("events.out.tfevents.*"))


def read_curves(files: Sequence[Path]) -> Curves:
    """The points in TensorBoard's files; of two for the same step that of the later file. A record that was cut off
    ends its file."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    curves: Curves = {}
    for path in files:
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                curve = curves.setdefault(tag_of(value.tag), {})
                curve[event.step] = Point(value.simple_value, event.wall_time)
    return curves


def _report_unless_lost_curves(failed: threading.ExceptHookArgs) -> None:
    """Print the exception that ended a thread. TensorBoard's writer is a thread, raises its error once more in the
    thread that calls it, and is reported there."""
    is_writer = type(failed.thread).__name__ == "_AsyncWriterThread"
    if not (is_writer and isinstance(failed.exc_value, OSError)):
        threading.__excepthook__(failed)
