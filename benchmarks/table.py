"""What the variants of a benchmark took, as rates and ratios, and as text."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Steps = Sequence[Sequence[int]]


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
        f"{result['hardware']}; {result['date']}",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        f"{result['model']}, {result['data']}: {mean} tokens an example ({shortest} to {longest}); {result['setting']}",
        f"first loss, ours against Trainer: {result['first_loss_relative_difference']:.1e} relative",
        f"large matrix product: {result['matmul_peak_flops_per_second'] / 1e9:.1f} GFLOP/s",
        "",
        f"{'phase':8}{'variant':20}{'examples/s':>11}{'tokens/s':>10}{'real/computed':>14}{'GFLOP/s':>9}{'of peak':>9}"
        f"   ours / this (lowest to highest)",
    ]
    for v in result["variants"]:
        ratios = "; ".join(
            f"{phase} {median:.2f} ({low:.2f} to {high:.2f})"
            for phase, (median, low, high) in v["ours_over_this"].items()
        )
        lines.append(
            f"{v['phase']:8}{v['name']:20}{v['examples_per_second']:11.2f}{v['tokens_per_second']:10.0f}"
            f"{v['real_over_computed']:14.2f}{v['flops_per_second'] / 1e9:9.1f}{v['share_of_peak']:9.0%}   {ratios}"
        )
    return "\n".join(lines)


def summarize(
    variants: Sequence[Variant], num_examples: int, real_tokens: int, flops: float, peak: float
) -> list[dict[str, Any]]:
    """One entry a variant; ratios are taken within a repeat, and their median, lowest and highest are kept."""
    ours = {v.phase: v for v in variants if v.name == "ours"}
    summaries = []
    for v in variants:
        seconds = statistics.median(v.seconds)
        ratios = {
            phase: [this / own for this, own in zip(v.seconds, ours[phase].seconds, strict=True)]
            for phase in (ours if v.phase == "any" else (v.phase,))
        }
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
                "ours_over_this": {p: [statistics.median(r), min(r), max(r)] for p, r in ratios.items()},
            }
        )
    return summaries
