"""Draw the explanatory pictures of the documentation: python docs/pictures/draw.py. (Pictures of measurements
are drawn by benchmarks/.)"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREY, INK = "#3b76b5", "#e08a2e", "#d9dde2", "#222222"


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str, ink: str = "white") -> None:
    """A rounded box with centred text; (x, y) is its lower left corner."""
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2, text, color=ink, ha="center", va="center", fontsize=9.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, style: str = "-|>") -> None:
    """A straight arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=13, color=color, linewidth=1.6))


def blank(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """A figure whose data units are tenths of its inches, without axes."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def two_adapters() -> None:
    """Left: what is shared in training. Right: what a prompt gets at inference."""
    figure, axes = blank(11.7, 4.6)
    axes.text(3.1, 4.3, "Training, every round", ha="center", fontsize=12, color=INK, weight="bold")
    axes.text(9.0, 4.3, "Inference, every prompt", ha="center", fontsize=12, color=INK, weight="bold")
    axes.plot([6.35, 6.35], [0.25, 4.4], color=GREY, linewidth=1.2)

    box(axes, 1.35, 3.45, 3.5, 0.5, BLUE, "average of the global adapters")
    for column, name in enumerate(("client 0: entailment", "client 1: paraphrase", "client 2: questions")):
        left = 0.25 + 2.0 * column
        axes.add_patch(
            FancyBboxPatch(
                (left, 0.25),
                1.8,
                2.45,
                boxstyle="round,pad=0,rounding_size=0.15",
                facecolor="none",
                edgecolor="#9aa3ad",
            )
        )
        box(axes, left + 0.15, 2.0, 1.5, 0.5, BLUE, "global adapter")
        box(axes, left + 0.15, 1.35, 1.5, 0.5, ORANGE, "local adapter")
        box(axes, left + 0.15, 0.7, 1.5, 0.5, GREY, "frozen base", INK)
        axes.text(left + 0.9, 0.45, name, ha="center", va="center", fontsize=9, color=INK)
        arrow(axes, (left + 0.9, 2.52), (2.3 + 0.8 * column, 3.43), BLUE, "<|-|>")
    axes.text(0.25, 3.05, "travels", fontsize=9.5, color=BLUE, style="italic")
    axes.text(0.25, 0.06, "local adapters and data are not exchanged", fontsize=9.5, color=ORANGE, style="italic")

    for row, (prompt, alpha, meaning) in enumerate(
        (
            ("client 0 gets a prompt\nlike its own data", 0.20, "alpha 0.20: the local adapter takes part"),
            ("client 0 gets a prompt\nof another task", 0.024, "alpha 0.02: the shared adapter answers"),
        )
    ):
        y = 3.2 - 1.2 * row
        axes.text(6.6, y + 0.22, prompt, fontsize=9.5, va="center", color=INK)
        width = 3.0
        axes.add_patch(plt.Rectangle((8.4, y), width * (1 - alpha), 0.44, color=BLUE, linewidth=0))
        axes.add_patch(plt.Rectangle((8.4 + width * (1 - alpha), y), width * alpha, 0.44, color=ORANGE, linewidth=0))
        axes.text(
            8.4 + width * (1 - alpha) / 2, y + 0.22, "1 - alpha", color="white", ha="center", va="center", fontsize=9.5
        )
        axes.text(8.4, y - 0.2, meaning, fontsize=9.5, va="center", color=INK)
    formula = r"$h = W_0 x + (1 - \alpha)\, s\, B_g A_g x + \alpha\, s\, B_l A_l x$"
    axes.text(9.0, 1.05, formula, ha="center", fontsize=12.5, color=INK)
    note = "bars: mean alpha of docs/results.md with the default weighting"
    axes.text(9.0, 0.55, note, ha="center", fontsize=8.5, color="#70777f")
    figure.savefig(FOLDER / "two_adapters.png", dpi=150)
    plt.close(figure)


def one_round() -> None:
    """Two rank groups along the time of one round of FedDPA-T."""
    figure, axes = blank(10.4, 3.0)
    for row, (name, lengths) in enumerate((("group 0", (2.2, 2.0)), ("group 1", (2.6, 2.5)))):
        y = 1.95 - 0.75 * row
        first, second = lengths
        axes.text(0.2, y + 0.22, name, fontsize=10, va="center", color=INK)
        box(axes, 1.2, y, first, 0.45, BLUE, "global phase")
        box(axes, 1.2 + first + 0.08, y, second, 0.45, ORANGE, "local phase")
        done = 1.36 + first + second
        box(axes, done, y, 1.9, 0.45, GREY, "held-out loss, save", INK)
        if done + 1.98 < 8.2:
            box(axes, done + 1.98, y, 8.26 - done - 1.98, 0.45, "#f1f2f4", "waits", INK)
    box(axes, 3.88, 0.4, 1.5, 0.45, "#7d5aa6", "all-reduce")
    box(axes, 8.44, 0.4, 1.5, 0.45, "#7d5aa6", "metrics table")
    axes.text(0.2, 0.62, "leaders", fontsize=10, va="center", color=INK)
    axes.text(
        5.2,
        2.75,
        "One round of feddpa_t: the update travels while the local adapters train",
        ha="center",
        fontsize=11,
        color=INK,
    )
    arrow(axes, (1.2, 0.15), (10.2, 0.15), "#9aa3ad")
    axes.text(9.75, 0.25, "time", fontsize=9, color="#70777f")
    figure.savefig(FOLDER / "round.png", dpi=150)
    plt.close(figure)


def differences() -> None:
    """P and TTP less FedIT's, with 95 % intervals: the rows of the table in docs/results.md, read from there."""
    page = (FOLDER.parent / "results.md").read_text(encoding="utf-8")
    table = page[page.index("## P and TTP") : page.index("## Weightings")]
    number = r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]"
    rows = []
    for line in table.splitlines():
        found = re.findall(number, line)
        if len(found) == 2 and "oracle" not in line and "local alone" not in line:
            method, weighting = (cell.strip() for cell in line.split("|")[1:3])
            rows.append((f"{method}, {weighting}", [tuple(float(text) for text in triple) for triple in found]))
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 2.9), sharey=True)
    for panel, (axes, title) in enumerate(zip(panels, ("P - FedIT", "TTP - FedIT"), strict=True)):
        for height, (_, measures) in enumerate(reversed(rows)):
            middle, low, high = measures[panel]
            color = BLUE if low > 0 or high < 0 else "#9aa3ad"
            axes.plot([low, high], [height, height], color=color, linewidth=2.5, solid_capstyle="butt")
            axes.plot([middle], [height], "o", color=color, markersize=6)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel(f"{title}, points of ROUGE-1")
        axes.set_xlim(-6, 13)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    figure.tight_layout()
    figure.savefig(FOLDER / "results.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    two_adapters()
    one_round()
    differences()
