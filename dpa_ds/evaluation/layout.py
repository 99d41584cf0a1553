"""Text in rows and columns: columns of equal width, Markdown tables, and names cut short."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence


def short_names(names: Sequence[str], limit: int) -> list[str]:
    """Each name in at most `limit` characters, all different: the longest words lose their ends, equals get ~1, ~2."""
    short = [_shortened(name, limit) for name in names]
    counts = Counter(short)
    taken = {name for name in short if counts[name] == 1}
    for place, name in enumerate(short):
        # Cut names may collide with each other and with a whole name that looks like a cut one.
        number = 1
        while counts[name] > 1 and short[place] in taken | {name}:
            suffix = f"~{number}"
            short[place] = name[: limit - len(suffix)] + suffix
            number += 1
        taken.add(short[place])
    return short


def aligned(rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines with columns of equal width, the first `left` flush left, the others flush right."""
    cells = list(rows)
    columns = zip(*cells, strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in cells:
        fields = []
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            if place < left:
                fields.append(cell.ljust(width))
            else:
                fields.append(cell.rjust(width))
        lines.append("  ".join(fields).rstrip())
    return lines


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns flush left, the others flush right. Cells are Markdown: see `escape`."""
    num_right = len(header) - left
    rule = ["---"] * left + ["---:"] * num_right
    lines = [f"| {' | '.join(row)} |" for row in [header, rule, *rows]]
    return "\n".join(lines)


def escape(text: str, limit: int = 200, empty: str = "*(empty)*") -> str:
    """Text that Markdown shows as it is, on one line of a table, cut to `limit` characters."""
    # Cut before escaping: a backslash must not lose what it escapes.
    text = text.strip()
    if len(text) > limit:
        text = f"{text[: limit - 1]}…"
    lines = [re.sub(r"([\\`*_\[\]<>|~&#!$])", r"\\\1", line) for line in text.splitlines()]
    return "<br>".join(lines) or empty


def _shortened(name: str, limit: int) -> str:
    """Digits at the end of a word stay: they are what tells task_041 and task_042 apart."""
    parts = re.split(r"([\s_/.:-]+)", " ".join(name.split()) or "-")  # words at even places, separators between
    while sum(map(len, parts)) > limit:
        longest = None
        for place in range(0, len(parts), 2):
            can_be_cut = re.search(r"\D.*\D", parts[place])
            if can_be_cut and (longest is None or len(parts[place]) > len(parts[longest])):
                longest = place
        if longest is None:
            break
        parts[longest] = re.sub(r"\D(\d*)$", r"\1", parts[longest])
    return "".join(parts)[:limit]
