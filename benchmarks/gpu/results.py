"""The results of the kit: JSON objects, a line each, appended as they are found: a run that is cut off keeps them."""

import json
import time
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""A line: `part` and `measure` name it, `variant` tells several of one measure apart."""


class Results:
    """Appends the results of one part to a file, and shows them."""

    def __init__(self, path: Path, part: str) -> None:
        self._path = path
        self._part = part
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.monotonic() - self._started

    def put(self, measure: str, variant: str = "", **fields: Any) -> None:
        """Append one line."""
        result: Result = {
            "part": self._part,
            "measure": measure,
            "variant": variant,
            "at_seconds": round(self.seconds, 1),
        }
        line = json.dumps(result | fields)
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


def read_results(path: Path) -> list[Result]:
    """All lines; one that was cut off is left out."""
    results = []
    for line in path.read_text().splitlines():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


def find_result(results: list[Result], part: str, measure: str, variant: str = "") -> Result | None:
    """The last line of that name, or None."""
    found = None
    for result in results:
        if (result.get("part"), result.get("measure"), result.get("variant")) == (part, measure, variant):
            found = result
    return found
