"""Bad input for every program, drawn by hypothesis: a command, and what is done to the files that it reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dpa_ds.config.fields import FIELDS

RUN = "runs/tiny"
ROUND = f"{RUN}/rounds/round_000002"
PROGRESS = f"{RUN}/rounds/round_000003.tmp/progress"
"""How far the clients have come in the round that was interrupted: below it the newest folder is taken."""


@dataclass(frozen=True)
class Damage:
    """What is done to one file, by `tests/mutations/harm.py`."""

    kind: str
    """cut, change, put, take, swap, remove, folder; value (JSON or YAML); tensor, shape, key (safetensors)."""
    file: str
    """Relative to the place of the input."""
    at: float = 0.0
    """Where, as a share of the file or of what is in it."""
    value: Any = None
    is_sealed: bool = False
    """All checksums are made right again: malformed, and not damaged."""


@dataclass(frozen=True)
class Input:
    """What a user does."""

    program: str
    words: tuple[str, ...]
    """Of the command line; {root}, {run}, {recipe}, {model} and {data} are filled in."""
    damages: tuple[Damage, ...] = ()
    has_run: bool = True
    """Whether the run is there that was interrupted in its third round."""


RECIPE = ("--config", "{recipe}")
SHORT = ("--max_new_tokens", "2", "--beams", "1")
COMMANDS: dict[str, tuple[str, ...]] = {
    "run": RECIPE,
    "evaluate": ("--run", "{run}", "--instances", "1", *SHORT),
    "generate": ("--run", "{run}", "--client", "0", "--prompt", "red", *SHORT),
    "compare": (*RECIPE, "--methods", "fedit", "--seeds", "0", "--evaluation.instances_per_task", "1"),
    "plan": (*RECIPE, "--cluster", "nodes=1,gpus=1,gpu=cpu"),
    "preflight": RECIPE,
    "prepare_demo": ("--cache", "{model}"),
    "rendezvous": (*RECIPE, "--port", "29777"),
    "scaling_study": (*RECIPE, "--over", "groups=1,2", "--output", "{root}/study", "--launch", "false"),
}
"""A good command of each program; that of the demo's data has a folder of somebody else's."""
ODD_WORDS = st.one_of(
    st.text(max_size=8).filter(lambda word: "\0" not in word),
    st.sampled_from(
        (
            *("", "-", "--", "-1", "0", "1e999", "nan", ".inf", "²", "[", "{a: 1}", "[1, 2]", "null", "&a *a"),
            *("~nobody", "$NOTHING/x", "/dev/null", "/dev/zero", "{root}", "{model}", "{data}", "{recipe}", "9" * 400),
            *("--run", "--config", "--seed", "--help=1", "--no_such", "--lora.rank", "--model", "a=b", "true"),
            *("groups=", "\x1b[31m"),
        )
    ),
)
ODD_VALUES = st.sampled_from(
    (
        *(None, True, 0, -1, 3, 1.5, 10**30, 1e308, float("nan"), float("inf")),
        *("", "x", "../x", "~nobody", "/dev/zero", "²", "\x1b[2J", "red " * 300),
        *([], [1], ["a", "a"], [[]], {}, {"a": 1}),
    )
)
BYTES = st.sampled_from([b"\0", b"\xff", b"[", b"{", b'"', b"9" * 300, b"\n", b"-", b"\xef\xbb\xbf", b"*a", b": "])
TEXT_KINDS = ["cut", "change", "put", "take"]
DATA_FILES = ("data/2/local_training_0.json", "data/2/local_training_1.json", "data/test.jsonl")
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json")
ADAPTERS = ("global", "local/client_00", "local/client_01")
RUN_FILES = (
    f"{RUN}/config.yaml",
    f"{RUN}/model.json",
    f"{RUN}/metrics.jsonl",
    f"{RUN}/adapters",
    f"{ROUND}/meta.json",
    *(f"{ROUND}/{adapter}/state.json" for adapter in ADAPTERS),
    *(f"{ROUND}/{adapter}/adapter_config.json" for adapter in ADAPTERS),
)
TENSOR_FILES = (
    *(f"{ROUND}/{adapter}/adapter_model.safetensors" for adapter in ADAPTERS),
    f"{ROUND}/global/reference_mean.safetensors",
    f"{ROUND}/local/client_00/references.safetensors",
    f"{ROUND}/local/client_00/optimizer.safetensors",
    *(f"{PROGRESS}/client_0{client}/*/local.safetensors" for client in (0, 1)),
    f"{PROGRESS}/client_00/*/update.safetensors",
    f"{PROGRESS}/client_00/*/optimizer.safetensors",
    f"{PROGRESS}/client_00/*/local_optimizer.safetensors",
)
STATE_FILES = (*(f"{ROUND}/{adapter}/state.json" for adapter in ADAPTERS), f"{PROGRESS}/client_00/*/state.json")
DEEPSPEED_KEYS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "gradient_clipping",
    "train_batch_size",
    "amp",
    "steps_per_print",
)
TRAINED = st.sampled_from(["run", "evaluate", "generate"])
READ_RECIPE = st.sampled_from(["run", "run", "compare", "plan", "preflight", "rendezvous", "scaling_study"])


@st.composite
def commands(draw: st.DrawFn) -> Input:
    """A command line with words put in, left out, doubled or replaced, or with a field of the recipe set oddly."""
    program = draw(st.sampled_from(sorted(COMMANDS)))
    words = list(COMMANDS[program])
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(words) - 1)) if words else 0
        match draw(st.sampled_from(["put", "drop", "double", "replace", "replace", "field"])):
            case "put":
                words.insert(at, draw(ODD_WORDS))
            case "drop":
                words = [*words[:at], *words[at + 1 :]]
            case "double":
                words += words[at : at + 2]
            case "replace":
                words = [*words[:at], draw(ODD_WORDS), *words[at + 1 :]]
            case "field":
                words.append(f"--{draw(st.sampled_from(sorted(FIELDS)))}={draw(ODD_WORDS)}")
    if program == "prepare_demo" and "--cache" not in words:  # the default is a cache that tests must not make
        words = ["--cache", "{model}", *words]
    return Input(program, tuple(words), has_run=draw(st.booleans()) or program in ("evaluate", "generate"))


@st.composite
def recipes(draw: st.DrawFn) -> Input:
    """A recipe with an odd value, or with bytes changed."""
    if draw(st.booleans()):
        field = draw(st.sampled_from(sorted(FIELDS)))
        damage = Damage("value", "runs.yaml", value=[field, draw(ODD_VALUES)])
    else:
        damage = draw(texts(("runs.yaml",)))
    program = draw(READ_RECIPE)
    return Input(program, COMMANDS[program], (damage,), has_run=draw(st.booleans()))


@st.composite
def deepspeed(draw: st.DrawFn) -> Input:
    """A DeepSpeed JSON that is odd, or no JSON."""
    damages = [Damage("value", "ds.json", draw(st.floats(0, 0.99)), draw(ODD_VALUES))]
    if draw(st.integers(0, 3)) == 0:
        damages = [draw(texts(("ds.json",)))]
    elif draw(st.booleans()):
        damages.append(Damage("value", "ds.json", value=[draw(st.sampled_from(DEEPSPEED_KEYS)), draw(ODD_VALUES)]))
    program = draw(st.sampled_from(["run", "plan", "preflight"]))
    words = (*COMMANDS[program], "--engine.deepspeed_config", "{root}/ds.json")
    return Input(program, words, tuple(damages), has_run=False)


@st.composite
def data(draw: st.DrawFn) -> Input:
    """Training or test data, for training, evaluation and answers from a file."""
    damage = draw(st.one_of(texts(DATA_FILES), values(DATA_FILES)))
    program = draw(st.sampled_from(["run", "evaluate", "compare", "generate"]))
    words = COMMANDS[program]
    if program == "generate":
        words = ("--run", "{run}", "--client", "0", "--input", "{data}/test.jsonl", *SHORT)
    return Input(program, words, (damage,), has_run=program != "run")


@st.composite
def models(draw: st.DrawFn) -> Input:
    """The directory of the base model."""
    files = tuple(f"model/{name}" for name in MODEL_FILES)
    damage = draw(st.one_of(texts(files), values(files[:3]), removals(files)))
    program = draw(st.sampled_from(["run", "generate", "plan"]))
    return Input(program, COMMANDS[program], (damage,), has_run=program == "generate")


@st.composite
def runs(draw: st.DrawFn) -> Input:
    """A run folder with files cut, changed, swapped or removed."""
    damage = draw(st.one_of(texts(RUN_FILES + TENSOR_FILES), removals(RUN_FILES + TENSOR_FILES), values(RUN_FILES[:3])))
    program = draw(TRAINED)
    return Input(program, COMMANDS[program], (damage,))


@st.composite
def malformed_runs(draw: st.DrawFn) -> Input:
    """A run folder whose checksums are right, and which no run wrote."""
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["shape", "tensor", "key", "dtype"]))
        name, at, value = draw(st.sampled_from(TENSOR_FILES)), draw(st.floats(0, 0.99)), draw(st.integers(0, 3))
        damage = Damage(kind, name, at, value, is_sealed=True)
    else:
        name, at, value = draw(st.sampled_from(STATE_FILES)), draw(st.floats(0, 0.99)), draw(ODD_VALUES)
        damage = Damage("value", name, at, value, is_sealed=True)
    program = draw(TRAINED)
    return Input(program, COMMANDS[program], (damage,))


def texts(files: Sequence[str]) -> st.SearchStrategy[Damage]:
    """Bytes of a file changed."""
    return st.builds(Damage, st.sampled_from(TEXT_KINDS), st.sampled_from(files), st.floats(0, 1), BYTES)


def values(files: Sequence[str]) -> st.SearchStrategy[Damage]:
    """A value of a JSON or YAML file changed."""
    return st.builds(Damage, st.just("value"), st.sampled_from(files), st.floats(0, 0.99), ODD_VALUES)


def removals(files: Sequence[str]) -> st.SearchStrategy[Damage]:
    """Another file, a folder or nothing in the place of a file."""
    kinds = st.sampled_from(["remove", "folder", "swap"])
    return st.builds(Damage, kinds, st.sampled_from(files), st.floats(0, 0.99), st.sampled_from(files))


INPUTS = st.one_of(commands(), recipes(), deepspeed(), data(), models(), runs(), malformed_runs(), malformed_runs())


def draw_inputs(num_inputs: int, number: int) -> list[Input]:
    """The same for the same arguments."""
    drawn: list[Input] = []

    @seed(number)
    @settings(
        max_examples=num_inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(INPUTS)
    def collect(one: Input) -> None:
        drawn.append(one)

    collect()
    return drawn[:num_inputs]


def show(one: Input) -> str:
    """One line."""
    damages = "; ".join(f"{d.kind} {d.file} at {d.at:.3f} {str(d.value)[:60]!r}" for d in one.damages)
    words = json.dumps(list(one.words))[:300] if not one.damages else ""
    return f"{one.program} {words} {damages}{' with a run' if one.has_run else ''}"
