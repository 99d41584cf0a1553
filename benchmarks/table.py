"""What the variants of a benchmark took, as rates and ratios, as text and as a picture; where and when it ran."""

import datetime
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Steps = Sequence[Sequence[int]]


def processor() -> str:
    """Name of this machine's CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call of `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def where_and_when(hardware: str | None = None, packages: Sequence[str] = ("torch", "deepspeed")) -> str:
    """The first line of every benchmark."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{hardware or processor()}; {versions}; {datetime.date.today().isoformat()}"


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


@dataclass
class Variant:
    """One way to do a phase, and what its runs took."""

    name: str
    phase: str
    """global, local, or any where it makes no difference."""
    computed_tokens: int
    """Tokens of all steps, padding included."""
    run: Callable[[Steps], tuple[float, list[float]]]
    """Steps -> seconds, and the loss of every step (none for the floor)."""
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def render(result: dict[str, Any]) -> str:
    """The result as text: where and when, then one line a variant."""
    shortest, mean, longest = result["tokens_per_example"]
    lines = [
        result["where"],
        f"{result['model']}, {result['data']}: {mean} tokens an example ({shortest} to {longest}); {result['setting']}",
        f"first loss, ours against others: {result['first_loss_relative_difference']:.1e} relative",
        f"large matrix product: {result['matmul_peak_flops_per_second'] / 1e9:.1f} GFLOP/s",
        "",
        f"{'phase':8}{'variant':20}{'examples/s':>11}{'tokens/s':>10}{'real/computed':>14}{'GFLOP/s':>9}{'of peak':>9}"
        f"   ours / this (lowest to highest)",
    ]
    for v in result["variants"]:
        ratios = []
        for phase, (median, low, high) in v["ours_over_this"].items():
            ratios.append(f"{phase} {median:.2f} ({low:.2f} to {high:.2f})")
        lines.append(
            f"{v['phase']:8}{v['name']:20}{v['examples_per_second']:11.2f}{v['tokens_per_second']:10.0f}"
            f"{v['real_over_computed']:14.2f}{v['flops_per_second'] / 1e9:9.1f}{v['share_of_peak']:9.0%}   "
            f"{'; '.join(ratios)}"
        )
    return "\n".join(lines)


def summarize(
    variants: Sequence[Variant], num_examples: int, real_tokens: int, flops: float, peak: float
) -> list[dict[str, Any]]:
    """One entry a variant; ratios are taken within a repeat, and their median, lowest and highest are kept."""
    ours = {variant.phase: variant for variant in variants if variant.name == "ours"}
    summaries = []
    for v in variants:
        seconds = statistics.median(v.seconds)
        ratios = {}
        for phase, own in ours.items():
            if v.phase in (phase, "any"):
                ratios[phase] = _ratios(v, own)
        summaries.append(
            {
                "phase": v.phase,
                "name": v.name,
                "seconds": v.seconds,
                "losses": v.losses,
                "examples_per_second": num_examples / seconds,
                "tokens_per_second": real_tokens / seconds,
                "real_over_computed": real_tokens / v.computed_tokens,
                "flops_per_second": flops / seconds,
                "share_of_peak": flops / seconds / peak,
                "ours_over_this": ratios,
            }
        )
    return summaries


def _ratios(this: Variant, own: Variant) -> list[float]:
    """Median, lowest and highest of the seconds of `this` by those of `own`."""
    ratios = [one / other for one, other in zip(this.seconds, own.seconds, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar a variant: examples/s, with the range of its repeats."""
    from matplotlib.figure import Figure

    variants = result["variants"]
    figure = Figure(figsize=(7, 0.45 * len(variants) + 1), layout="constrained")
    axes = figure.subplots()
    for place, v in enumerate(variants):
        rate = v["examples_per_second"]
        num_examples = rate * statistics.median(v["seconds"])
        rates = [num_examples / seconds for seconds in v["seconds"]]
        color = {"ours": "tab:blue", "floo": "0.5"}.get(v["name"][:4], "tab:orange")
        axes.barh(place, rate, color=color, xerr=[[rate - min(rates)], [max(rates) - rate]], capsize=3)
    axes.set_yticks(range(len(variants)), [f"{v['name']}, {v['phase']} phase" for v in variants], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(f"examples/s, {result['model']}, {result['data']}", fontsize="small")
    figure.savefig(path, dpi=110)
