"""What is predicted for one GPU and what was aimed at, beside what was measured. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.results import Result, find_result
from benchmarks.gpu.settings import SETTINGS, planned_gb
from dpa_ds.planning.hardware import GPUS
from dpa_ds.planning.memory import BYTES

PEAK_TOLERANCE = 0.1
"""By how much of the plan a peak of memory may differ from it."""
CPU_TIMES_AS_FAST = 2.4
CPU_OURS_OVER_FLOOR = 1.0
CPU_WEIGHTED_TO_MERGED = 0.97
"""From docs/performance.md: of the local phase, of both phases, and of answers."""
LEAST_MFU = {"speed_13b": 0.55}
"""The aim of the step of long rows, by part."""
MODELS = {"speed_7b": "7B", "speed_13b": "13B"}
"""Parts that answer, too."""
HEADER = ("part", "claim", "against", "aim", "predicted", "measured", "verdict")


@dataclass(frozen=True)
class Claim:
    """One number of the results, with what is expected of it."""

    part: str
    measure: str
    field: str
    text: str
    against: str
    variant: str = ""
    unit: str = ""
    decimals: int = 2
    predicted: float | None = None
    least: float | None = None
    most: float | None = None

    @property
    def aim(self) -> str:
        """The bounds in words; empty where there are none."""
        if self.unit == "%" and self.least == 1.0:
            return "all"
        if self.least is not None and self.most is not None:
            return f"{self.show(self.least)} to {self.show(self.most)}"
        if self.least is not None:
            return f"at least {self.show(self.least)}"
        if self.most is not None:
            return f"at most {self.show(self.most)}"
        return ""

    def show(self, value: float | None) -> str:
        """The number with its unit; empty where there is none."""
        if value is None:
            return ""
        if self.unit == "%":
            return f"{100 * value:.{self.decimals}f} %"
        return f"{value:.{self.decimals}f} {self.unit}".strip()

    def measured(self, results: list[Result]) -> float | None:
        """What the results say; None where they do not."""
        result = find_result(results, self.part, self.measure, self.variant)
        if result is None:
            return None
        return result.get(self.field)

    def verdict(self, value: float | None) -> str:
        """Whether the aim was reached."""
        if value is None:
            return "not measured"
        if not self.aim:
            return ""
        too_low = self.least is not None and value < self.least
        too_high = self.most is not None and value > self.most
        return "missed" if too_low or too_high else "reached"


def all_claims(gpu: str) -> list[Claim]:
    """In the order of the parts, for one card of this kind."""
    claims = [*correctness(), *real_model()]
    for part in MODELS:
        claims += long_rows(part, gpu, MODELS[part])
    claims += short_rows()
    for part in MODELS:
        claims += answers(part, gpu, MODELS[part])
    claims += long_rows("dropout_7b", gpu, "7B, dropout 0.05")
    claims += long_rows("recompute_7b", gpu, "7B, recompute")
    claims += long_rows("offload_7b", gpu, "7B, ZeRO 3, base in the host's memory")
    claims += long_rows("int8_13b", gpu, "13B in int8")
    claims += long_rows("nf4_70b", gpu, "70B in nf4, recompute")
    claims += long_rows("compile_7b", gpu, "7B, torch.compile")
    return claims


def correctness() -> list[Claim]:
    """Runs and answers that must equal the CPU's."""
    claims = []
    for precision, bound in (("fp32", "1e-3 relative"), ("bf16", "cosine 0.95"), ("fp16", "cosine 0.95")):
        claims.append(
            Claim(
                part="check",
                measure="runs",
                variant=precision,
                field="share",
                text=f"{precision} runs, all layouts ({bound})",
                against="the same run on the CPU",
                unit="%",
                decimals=0,
                predicted=1.0,
                least=1.0,
            )
        )
    all_equal = {"part": "check", "field": "share", "unit": "%", "decimals": 0, "predicted": 1.0, "least": 1.0}
    for precision in ("fp32", "bf16"):
        claims.append(
            Claim(
                measure="the same run twice",
                variant=precision,
                text=f"{precision}, dropout: tensors that are equal to the bit",
                against="the same run on the GPU",
                **all_equal,
            )
        )
    claims.append(
        Claim(measure="answers", text="answers that are equal, fp32", against="the same run on the CPU", **all_equal)
    )
    return claims


def real_model() -> list[Claim]:
    """SmolLM2 on the demo's data. In bf16 losses after training differ from fp32's by rounding, on any device."""
    demo = {"part": "demo", "measure": "run", "decimals": 4}
    text = "SmolLM2-135M, gpu"
    after = "held-out losses apart, relative"
    before = "held-out losses before training apart, relative"
    fp32 = {"variant": "gpu fp32", "against": "fp32 on the CPU", **demo}
    bf16 = {"variant": "gpu bf16", "against": "fp32 on the CPU", **demo}
    alike = {"variant": "gpu bf16 against cpu bf16", "against": "bf16 on the CPU", **demo}
    return [
        Claim(field="loss_apart", text=f"{text} fp32: {after}", most=1e-3, **fp32),
        Claim(field="loss_apart", text=f"{text} bf16: {after}", most=2e-2, **bf16),
        Claim(field="loss_apart_before", text=f"{text} bf16: {before}", most=2e-2, **bf16),
        Claim(field="loss_apart", text=f"{text} bf16: {after}", most=2e-2, **alike),
    ]


def long_rows(part: str, gpu: str, name: str) -> list[Claim]:
    """Speed and memory of the step that the planner knows."""
    setting = SETTINGS[part]
    plan = setting.plan(gpu)
    rate = setting.rows * setting.length / plan.step_seconds
    peak = planned_gb(plan)
    text = f"{name}, {setting.rows} x {setting.length}"
    mfu = Claim(
        part,
        "long",
        "mfu",
        f"{text}: MFU at 4 N FLOPs a token",
        "the peak",
        unit="%",
        decimals=1,
        predicted=4 * setting.shape.parameters * rate / GPUS[gpu].flops,
        least=LEAST_MFU.get(part),
    )
    speed = Claim(part, "long", "tokens_per_second", f"{text}: tokens/s", "the plan", decimals=0, predicted=rate)
    memory = Claim(
        part,
        "long",
        "peak_gb",
        f"{text}: peak of memory",
        "the plan",
        unit="GB",
        decimals=1,
        predicted=peak,
        least=(1 - PEAK_TOLERANCE) * peak,
        most=(1 + PEAK_TOLERANCE) * peak,
    )
    if setting.compiled:  # which tensors a compiler keeps, the planner does not know
        return [speed, mfu]
    return [speed, mfu, memory]


def short_rows() -> list[Claim]:
    """The paper's step of 64 short examples, of 7B. Predicted is what one thread of a CPU gave with SmolLM2-135M."""
    text = "7B, 64 short rows"
    ratio = {"part": "speed_7b", "unit": "x"}
    share = {"part": "speed_7b", "unit": "%", "decimals": 1}
    return [
        Claim(
            measure="trainer",
            field="times_as_fast",
            text=f"{text}: speed",
            against="Trainer + PEFT, its best batch",
            predicted=CPU_TIMES_AS_FAST,
            least=2.0,
            **ratio,
        ),
        Claim(
            part="speed_7b",
            measure="trainer",
            field="loss_apart",
            text=f"{text}: losses apart, relative",
            against="Trainer + PEFT",
            decimals=4,
            most=2e-2,
        ),
        Claim(
            measure="floor",
            field="ours_over_floor",
            text=f"{text}: time",
            against="the frozen base alone",
            predicted=CPU_OURS_OVER_FLOOR,
            most=1.1,
            **ratio,
        ),
        *attention(),
        Claim(measure="short", field="mfu", text=f"{text}: MFU", against="the peak", **share),
        Claim(measure="mixed", field="mfu", text="7B, 64 rows of 40 to 512 tokens: MFU", against="the peak", **share),
        Claim(
            measure="host",
            variant="short",
            field="busy_share",
            text=f"{text}: the GPU computes",
            against="the step's time",
            **share,
        ),
        Claim(
            measure="host",
            variant="long",
            field="busy_share",
            text="7B, 4 x 2048: the GPU computes",
            against="the step's time",
            **share,
        ),
        Claim(
            measure="matmul",
            field="share_of_peak",
            text="a large bf16 matrix product",
            against="the peak",
            **share,
        ),
    ]


def attention() -> list[Claim]:
    """All examples of a row in one call against a call for each segment."""
    claims = []
    for variant, name in (("short", "64 short rows"), ("mixed", "64 rows of 40 to 512 tokens")):
        common = {
            "part": "speed_7b",
            "measure": "attention",
            "variant": variant,
            "against": "attention segment by segment",
        }
        claims += [
            Claim(field="times_as_fast", text=f"7B, {name}: speed", unit="x", least=1.0, **common),
            Claim(field="loss_apart", text=f"7B, {name}: losses apart, relative", decimals=4, most=2e-2, **common),
            Claim(
                field="gradient_norm_apart",
                text=f"7B, {name}: gradient norms apart, relative",
                decimals=4,
                most=2e-2,
                **common,
            ),
        ]
    return claims


def answers(part: str, gpu: str, name: str) -> list[Claim]:
    """Answers with a weight for each row. Predicted is a lower bound: reading all weights once."""
    setting = SETTINGS[part]
    base_bytes = setting.shape.parameters * BYTES[setting.precision]
    floor_ms = 1e3 * base_bytes / GPUS[gpu].memory_bandwidth
    claims = []
    for num_rows in setting.answer_rows:
        variant = f"{num_rows} rows"
        text = f"{name}, {num_rows} answers at once"
        claims.append(
            Claim(
                part,
                "answers",
                "weighted_to_merged",
                f"{text}, each with its weight: speed",
                "one merged adapter",
                variant=variant,
                unit="x",
                predicted=CPU_WEIGHTED_TO_MERGED,
                least=0.8,
            )
        )
        claims.append(
            Claim(
                part,
                "answers",
                "ms_a_pass",
                f"{text}: a token",
                "reading all weights once",
                variant=variant,
                unit="ms",
                decimals=1,
                predicted=floor_ms,
            )
        )
    return claims


def markdown_table(claims: Sequence[Claim], results: list[Result]) -> str:
    """A row for each claim."""
    rows = [HEADER, ("---",) * len(HEADER)]
    for claim in claims:
        value = claim.measured(results)
        verdict = claim.verdict(value) if results else ""
        shown = (claim.show(claim.predicted), claim.show(value), verdict)
        rows.append((claim.part, claim.text, claim.against, claim.aim, *shown))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
