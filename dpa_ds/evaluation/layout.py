"""Text placed out: columns of equal width, Markdown tables, names cut short, and labels that keep clear of each other."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""
_DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
_DISTANCES = (8, 18, 30, 44, 60)
_GAP = 2
"""Free space around a label, in points."""


def short_names(names: Sequence[str], limit: int) -> list[str]:
    """Each name in at most `limit` characters, all different: the longest words lose their ends, equals get ~1, ~2."""
    short = [_shortened(name, limit) for name in names]
    counts = Counter(short)
    taken = {name for name in short if counts[name] == 1}
    for place, name in enumerate(short):
        number = 1
        while counts[name] > 1 and short[place] in taken | {name}:
            short[place] = f"{name[: limit - len(f'~{number}')]}~{number}"
            number += 1
        taken.add(short[place])
    return short


def aligned(rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines with columns of equal width, the first `left` flush left, the others flush right."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    fields = [f"{'<' if place < left else '>'}{width}" for place, width in enumerate(widths)]
    return ["  ".join(map(format, row, fields)).rstrip() for row in cells]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns flush left, the others flush right. Cells are Markdown: see `escape`."""
    rule = ["---" if place < left else "---:" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def escape(text: str, limit: int = 200, empty: str = "*(empty)*") -> str:
    """Text that Markdown shows as it is, on one line of a table, cut to `limit` characters."""
    text = text.strip()
    cut = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return "<br>".join(re.sub(r"([\\`*_\[\]<>|~&#!$])", r"\\\1", line) for line in cut.splitlines()) or empty


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    canvas: Box,
    scale: float = 1.0,
) -> list[tuple[float, float]]:
    """Where to put the middle of each label, as seen from its anchor; all in pixels, `scale` pixels a point.

    The nearest of 40 places on the canvas where the label touches neither `taken` nor an earlier label with its line, and
    its own line none of those labels; else the one that touches fewest.
    """
    obstacles, labels, offsets = list(taken), list[Box](), list[tuple[float, float]]()
    for (x, y), size in zip(anchors, sizes, strict=True):
        width, height = (side + 2 * _GAP * scale for side in size)
        candidates: list[tuple[int, int, tuple[float, float], Box, list[Box]]] = []
        for distance, (right, up) in itertools.product(_DISTANCES, _DIRECTIONS):
            dx, dy = right * (distance * scale + width / 2), up * (distance * scale + height / 2)
            box = (x + dx - width / 2, y + dy - height / 2, x + dx + width / 2, y + dy + height / 2)
            # The line from the anchor to the label, as ten points of it.
            line = [(x + dx * k / 10, y + dy * k / 10) * 2 for k in range(2, 11)]
            outside = box[0] < canvas[0] or box[1] < canvas[1] or box[2] > canvas[2] or box[3] > canvas[3]
            touched = sum(_overlap(box, other) for other in obstacles + labels)
            touched += any(_overlap(spot, other) for spot in line for other in labels)
            candidates.append((touched + 1000 * outside, len(candidates), (dx, dy), box, line))
        _, _, offset, box, line = min(candidates)
        offsets.append(offset)
        labels.append(box)
        obstacles += line
    return offsets


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _shortened(name: str, limit: int) -> str:
    """Digits at the end of a word stay: they are what tells task_041 and task_042 apart."""
    parts = re.split(r"([\s_/.:-]+)", " ".join(name.split()) or "-")
    while sum(map(len, parts)) > limit:
        words = [place for place in range(0, len(parts), 2) if re.search(r"\D.*\D", parts[place])]
        if not words:
            break
        longest = max(words, key=lambda place: len(parts[place]))
        parts[longest] = re.sub(r"\D(\d*)$", r"\1", parts[longest])
    return "".join(parts)[:limit]
