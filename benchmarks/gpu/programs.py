"""Runs programs of the project as a user would, each with a deadline, on the device or on the CPU alone."""

from collections.abc import Sequence

from tests.launch.processes import Forked, Running


class Programs:
    """Starts commands. A dry run imports the libraries once for all of them."""

    def __init__(self, dry: bool, deadline_seconds: float) -> None:
        self.device = "cpu" if dry else "auto"
        """`cluster.device` of what is compared with the CPU."""
        # A dry run starts no program but forks it, which spares each the imports: most of its time. With a GPU that is
        # not possible: DeepSpeed's import starts CUDA, which does not survive a fork.
        self._kind = Forked if dry else Running
        self._deadline_seconds = deadline_seconds

    def run(self, command: Sequence[str], device: str, **variables: str) -> None:
        """Wait for its end. Raises AssertionError, with the end of its output, if it fails or hangs."""
        if device == "cpu":
            variables["CUDA_VISIBLE_DEVICES"] = ""
        with self._kind(command, **variables) as running:
            ended = running.wait(self._deadline_seconds)
        assert ended.returncode == 0, ended.output[-1500:]
