"""What the speed parts measure: models, sizes and options that fit one card of 80 GB by the plan. Needs no torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import RunConfig
from dpa_ds.planning.hardware import parse_cluster
from dpa_ds.planning.plan import OVERHEAD, Plan, judge, layout_of
from dpa_ds.planning.scenario import Workload, scenario_of
from dpa_ds.planning.shapes import PRESETS, Shape, read_shape

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "paper.yaml"
DEFAULT_GPU = "h100-80g"

TINY = Shape(hidden=64, layers=2, heads=4, kv_heads=4, intermediate=128, vocab=512, head_dim=16)
"""The model of a dry run."""


@dataclass(frozen=True)
class Setting:
    """A base of random weights, the engine's options, and the step of long rows."""

    model: str
    """A preset of the planner, a directory with a config.json, or `tiny`."""
    rows: int
    length: int
    """The step of long rows has `rows` examples of `length` tokens; a quarter of each is the answer."""
    measures: tuple[str, ...]
    """In order of value: those that come last are left out where time is short."""
    precision: str = "bf16"
    quantization: str = "none"
    deepspeed_config: str = "ds_configs/zero1.json"
    dropout: float = 0.0
    recompute: bool = False
    compiled: bool = False
    answer_rows: tuple[int, ...] = (16, 64)
    """Batches of answers."""
    prompt: int = 128
    """Tokens of a prompt."""
    new_tokens: int = 32
    """Tokens of an answer."""
    repeats: int = 3

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        if self.model == "tiny":
            return TINY
        preset = self.model if self.model in PRESETS else None
        return read_shape(self.model, preset)

    def config(self, *overrides: str) -> RunConfig:
        """The paper's recipe with these options."""
        recompute = str(self.recompute).lower()
        return load_config(
            [
                f"--config={RECIPE}",
                f"--model.precision={self.precision}",
                f"--model.quantization={self.quantization}",
                f"--model.gradient_checkpointing={recompute}",
                f"--lora.dropout={self.dropout}",
                f"--engine.deepspeed_config={self.deepspeed_config}",
                *overrides,
            ]
        )

    def plan(self, gpu: str) -> Plan:
        """The planner's judgement of a step of long rows on one `gpu`."""
        config = self.config(f"--train.batch_size={self.rows}")
        zero = load_deepspeed_json(self.deepspeed_config)["zero_optimization"]
        scenario = scenario_of(config, self.shape, zero, Workload(tokens=self.length))
        tokens = self.rows * self.length
        layout = replace(layout_of(scenario, ranks=1), tokens=tokens, labels=self.rows * num_labels(self.length))
        return judge(scenario, parse_cluster(f"gpu={gpu}"), layout)

    def dry(self) -> "Setting":
        """The same on a CPU in a second, to see that every line of it runs."""
        return replace(
            self,
            model="tiny",
            rows=2,
            length=64,
            precision="fp32",
            answer_rows=(2,),
            prompt=8,
            new_tokens=4,
            repeats=1,
        )


def num_labels(length: int) -> int:
    """Tokens of an example that are predicted."""
    return length - num_prompt_tokens(length)


def num_prompt_tokens(length: int) -> int:
    """Tokens of an example's prompt."""
    return round(length * 0.75)


def planned_gb(plan: Plan) -> float:
    """The peak of torch's allocator, in GB: without what the planner adds for the CUDA context."""
    return (plan.total - OVERHEAD) / 1e9


SETTINGS = {
    "speed_7b": Setting(
        "llama-7b",
        rows=4,
        length=2048,
        measures=("long", "short", "attention", "answers", "trainer", "floor", "mixed", "host", "matmul"),
    ),
    # Four rows would need 84 GB.
    "speed_13b": Setting("llama-13b", rows=2, length=2048, measures=("long", "answers", "short"), answer_rows=(64,)),
    "dropout_7b": Setting("llama-7b", rows=4, length=2048, measures=("long",), dropout=0.05),
    "recompute_7b": Setting("llama-7b", rows=8, length=2048, measures=("long",), recompute=True),
    "offload_7b": Setting(
        "llama-7b",
        rows=4,
        length=2048,
        measures=("long",),
        deepspeed_config="ds_configs/zero3_offload_cpu.json",
    ),
    "int8_13b": Setting("llama-13b", rows=3, length=2048, measures=("long",), quantization="int8"),
    "nf4_70b": Setting("llama-70b", rows=4, length=2048, measures=("long",), quantization="nf4", recompute=True),
    "compile_7b": Setting("llama-7b", rows=4, length=2048, measures=("long",), compiled=True),
}
"""By the name of the part."""
