"""What a benchmark measures at the moment, on standard error: its results alone go to standard output."""

import sys
import time

_STARTED = time.monotonic()


def measuring(part: str) -> None:
    """Say that a part begins, and after how many seconds of the benchmark."""
    sys.stderr.write(f"{time.monotonic() - _STARTED:6.0f} s: {part}\n")
    sys.stderr.flush()
