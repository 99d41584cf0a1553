"""Bad recipes, overrides, DeepSpeed JSON and environments: refused in one line, before anything is written."""

import json
from pathlib import Path

import pytest

from tests.launch.bad_input import Case, Place, fifo, folder, link, make_place, refuse, write

pytestmark = pytest.mark.launch
RECIPE = "runs.yaml"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


def recipe(name: str, content: str | bytes, *says: str) -> Case:
    """A row on what is in the recipe."""
    return Case(name, says, spoil=write(RECIPE, content))


def option(name: str, option: str, value: str, *says: str) -> Case:
    """A row on an override."""
    return Case(name, says, (f"--{option}={value}",))


def deepspeed(name: str, content: object, *says: str) -> Case:
    """A row on what is in the DeepSpeed JSON."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    return Case(name, says, ("--engine.deepspeed_config", "{root}/ds.json"), write("ds.json", text))


def environment(name: str, says: str, **variables: str) -> Case:
    """A row on what the launcher leaves."""
    return Case(name, says, ("--cluster.timeout_seconds", "2"), exit_code=3, variables=variables)


RECIPES = [
    recipe("broken YAML", "name: a\ntrain: [\n", "{recipe}, line 3: not a YAML recipe"),
    recipe("YAML bomb", BOMB, "{recipe}, line 1: not a YAML recipe: a recipe has no anchors", "write the value out"),
    recipe("deep nesting", "[" * 100_000, "{recipe}: not a YAML recipe: nested too deeply"),
    recipe("deep nesting in a field", "lora:\n  target_modules: " + "[" * 100_000, "nested too deeply"),
    recipe(
        "field twice", "seed: 1\nname: a\nseed: 2\n", "{recipe}, line 3: seed is given twice (first in line 1): keep"
    ),
    recipe("section twice", "train:\n  batch_size: 1\ntrain:\n", "{recipe}, line 3: train is given twice"),
    recipe("NUL byte", b"name: a\nseed: \0\n", "{recipe}"),
    recipe("NUL byte in a path", 'data:\n  path: "a\\0b"\n', "data.path must be a path (no NUL character, "),
    recipe("invalid UTF-8", b"name: \xff\n", "--config: {recipe} is not text in UTF-8 (byte 6)"),
    recipe("UTF-16", "name: a\n".encode("utf-16"), "--config: {recipe} is not text in UTF-8 (byte 0)"),
    recipe("zero bytes", "", "{recipe}: a recipe is a mapping of sections such as train:, got nothing"),
    recipe("list", "- 1\n- 2\n", "{recipe}: a recipe is a mapping of sections such as train:, got [1, 2]"),
    recipe("huge", b"#" * (2 << 20), "--config: {recipe} is larger than 1 MiB: give a recipe such as"),
    recipe("section without fields", "train: 3\n", "{recipe}, line 1: train is a section: write its fields below it"),
    recipe("key that is no text", "[1, 2]: 3\n", "{recipe}, line 1: ? is not a field"),
    recipe("object of Python", "name: !!python/object:os.system x\n", "{recipe}, line 1: not a YAML recipe"),
    recipe("number too long", f"seed: {'9' * 5000}\n", "{recipe}, line 1: seed must be a whole number, got "),
    recipe("unknown key", "\ntrain:\n  learning_rat: 1\n", "{recipe}, line 3", "did you mean train.learning_rate?"),
    recipe(
        "null", "train:\n  batch_size: null\n", "{recipe}, line 2: train.batch_size must be a whole number, got null"
    ),
    recipe("number for text", "name: 7\n", "{recipe}, line 1: name must be text, got 7 (put it in quotes)"),
    Case("folder", ("--config: {recipe} is a directory: give a recipe",), spoil=folder(RECIPE)),
    Case("symlink loop", ("--config: cannot read", "{recipe}", "give a recipe"), spoil=link(RECIPE, RECIPE)),
    Case("pipe", ("--config: {recipe} is a pipe, not a regular file: give",), spoil=fifo(RECIPE)),
    Case("no permission", ("--config: cannot read", "give a recipe"), spoil=link(RECIPE, "/proc/self/mem")),
    Case("no such file", "--config: no such file: nowhere.yaml (tried", ("--config", "nowhere.yaml")),
]

OPTIONS = [
    option("unknown option", "train.learning_rat", "1", "did you mean train.learning_rate?"),
    option("wrong type", "train.batch_size", "many", "train.batch_size must be a whole number"),
    option("negative", "train.batch_size", "-1", "train.batch_size must be >= 1, got -1"),
    option("fraction", "train.batch_size", "1.5", "train.batch_size must be a whole number, got 1.5"),
    option(
        "out of range", "federation.client_fraction", "1.5", "federation.client_fraction must be in (0, 1], got 1.5"
    ),
    option("not a number", "train.learning_rate", ".nan", "train.learning_rate must be finite, got NaN"),
    option("infinite", "method.alpha", ".inf", "method.alpha must be finite, got Infinity"),
    option("overflow", "train.learning_rate", "1e999", "train.learning_rate must be finite"),
    option(
        "too many rounds", "federation.num_rounds", "1000000000", "federation.num_rounds must be at most 100000, got"
    ),
    option("too large a rate", "train.learning_rate", "1e300", "train.learning_rate must be at most 1e+30, got 1e+300"),
    option("nobody's home", "output_dir", "~nouser/runs", "output_dir must name a home directory that exists (~)"),
    Case("option twice", "--seed is given twice", ("--seed", "1", "--seed", "2")),
    Case("empty recipe name", "--config is empty: give a recipe", ("--config", "")),
    option("negative seed", "seed", "-1", "seed must be >= 0, got -1"),
    option(
        "unthinkable rank",
        "lora.rank",
        "1000000",
        "lora.rank 1000000 is more than the width of the model, 32: lower it",
    ),
    option(
        "seconds beyond the clock",
        "cluster.timeout_seconds",
        "1e300",
        "cluster.timeout_seconds must be at most 31536000",
    ),
    option(
        "other seconds",
        "federation.timeout_seconds",
        "1e300",
        "federation.timeout_seconds must be at most 31536000",
    ),
    option("unknown choice", "method.name", "fedavg", "method.name must be one of feddpa_t, feddpa_f"),
    option("empty list", "lora.target_modules", "[]", "lora.target_modules must name at least one linear layer"),
    option("empty", "model.path", "", "model.path must not be empty (give a model directory"),
    option("section", "train", "3", "train is a section: give its fields"),
    option("name is a path", "name", "../other", "name must be a plain folder name"),
    option("name too long", "name", "n" * 300, "name must be a folder name of at most 200 bytes"),
    option(
        "template without field",
        "data.template",
        "Answer:",
        "data.template must be auto, chat, or a text with {instruction} exactly once",
    ),
    option(
        "no such layer",
        "lora.target_modules",
        "[q_proj, w_proj]",
        "lora.target_modules ['w_proj'] are not linear layers of LlamaForCausalLM; it has ['down_proj', 'gate_proj'",
    ),
    option("examples too long", "data.max_length", "3", "examples fits into data.max_length 3: raise it"),
    Case("no value", "--train.batch_size needs a value: --train.batch_size VALUE", ("--train.batch_size",)),
    Case("no option", 'unexpected argument "fast": options look like --section.field VALUE', ("fast",)),
    Case(
        "ranks that do not fit",
        "job has 1 ranks, not a multiple of cluster.ranks_per_group = 2: use a multiple of 2 ranks, or set "
        "cluster.ranks_per_group to one of [1]",
        ("--cluster.ranks_per_group", "2"),
        exit_code=3,
    ),
    Case(
        "ranks that do not add up",
        "start 3 ranks or change the list",
        ("--cluster.ranks_per_group", "[2, 1]"),
        exit_code=3,
    ),
]

NVME = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}
DEEPSPEED = [
    deepspeed(
        "owned keys",
        {"optimizer": {}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        "{root}/ds.json sets what the recipe owns: optimizer (owned by train.learning_rate, train.weight_decay and "
        "train.adam_*), bf16.enabled (owned by model.precision)",
        "Remove them from {root}/ds.json",
    ),
    deepspeed("NVMe for adapters", NVME, "{root}/ds.json: offload_optimizer.device nvme is not supported", "use cpu"),
    deepspeed(
        "adapters as 8 bits",
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        "{root}/ds.json: zero_optimization.zero_quantized_weights is not supported",
        "remove it",
    ),
    deepspeed(
        "mistyped section of JSON",
        {"zero_optimisation": {"stage": 3}},
        '{root}/ds.json: "zero_optimisation" is not a key that the JSON may have: did you mean zero_optimization?',
    ),
    deepspeed(
        "section of JSON that ends in a traceback", {"amp": {"enabled": True}}, '"amp" is not a key', "remove it"
    ),
    deepspeed("JSON of zero bytes", "", "{root}/ds.json, line 1: not JSON"),
    deepspeed("JSON cut off", '{\n"zero_optimization": {', "{root}/ds.json, line 2: not JSON"),
    deepspeed("JSON with a NUL byte", '{"zero_optimization": \0}', "{root}/ds.json, line 1: not JSON"),
    deepspeed("JSON in invalid UTF-8", b'{"\xff": 1}', "{root}/ds.json is not text in UTF-8", "ds_configs/"),
    deepspeed("JSON list", [1], "{root}/ds.json: a DeepSpeed JSON is an object of keys, got [1]"),
    deepspeed("JSON key twice", '{"a": 1, "a": 2}', "{root}/ds.json: key a is given twice: keep one"),
    deepspeed(
        "JSON nested deeply", '{"a": ' + "[" * 100_000, "{root}/ds.json: not a DeepSpeed JSON: nested too deeply"
    ),
    deepspeed(
        "unknown stage",
        {"zero_optimization": {"stage": 7}},
        "{root}/ds.json: zero_optimization.stage must be a stage, 0 to 3, got 7",
    ),
    deepspeed(
        "stage in words",
        {"zero_optimization": {"stage": "three"}},
        "{root}/ds.json: zero_optimization.stage must be a stage, 0 to 3, got",
    ),
    deepspeed(
        "section that is a list", {"zero_optimization": []}, "{root}/ds.json", "zero_optimization must be an object"
    ),
    deepspeed(
        "offload to nowhere",
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "moon"}}},
        "offload_param.device",
        "{root}/ds.json",
    ),
    deepspeed(
        "negative bucket",
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": -1}},
        "{root}/ds.json: zero_optimization.reduce_bucket_size must be a number >= 0",
    ),
    deepspeed("fp16 that is no object", {"fp16": 3}, "{root}/ds.json", "fp16 must be an object"),
    Case(
        "no such JSON",
        ("engine.deepspeed_config: no such file: zero9.json (tried", "name one of those in ds_configs/"),
        ("--engine.deepspeed_config", "zero9.json"),
    ),
    Case(
        "JSON that is a folder",
        "engine.deepspeed_config: {data} is a directory: name one of those in ds_configs/",
        ("--engine.deepspeed_config", "{data}"),
    ),
    Case(
        "JSON in a symlink loop",
        ("engine.deepspeed_config:", "ds.json", "name one of those in ds_configs/"),
        ("--engine.deepspeed_config", "{root}/ds.json"),
        link("ds.json", "ds.json"),
    ),
]

ENVIRONMENTS = [
    environment("RANK in words", "RANK must be an integer, got 'zero'", RANK="zero", WORLD_SIZE="1"),
    environment("RANK too large", "RANK is 2, but the job has 2 ranks", RANK="2", WORLD_SIZE="2"),
    environment(
        "RANK negative", "RANK is -1, but the job has 1 ranks: RANK must be in 0..0", RANK="-1", WORLD_SIZE="1"
    ),
    environment(
        "WORLD_SIZE 0", "WORLD_SIZE must be the number of ranks of the job, at least 1, got 0", RANK="0", WORLD_SIZE="0"
    ),
    environment(
        "WORLD_SIZE empty", "environment variable WORLD_SIZE must be an integer, got ''", RANK="0", WORLD_SIZE=""
    ),
    environment("WORLD_SIZE missing", "RANK is set, but WORLD_SIZE is not: set both, or neither", RANK="0"),
    environment("LOCAL_RANK in words", "LOCAL_RANK must be an integer", RANK="0", WORLD_SIZE="1", LOCAL_RANK="gpu0"),
    environment("MASTER_ADDR missing", "MASTER_ADDR is not set: set it to", RANK="0", WORLD_SIZE="2"),
    environment(
        "MASTER_PORT in words",
        "MASTER_PORT must be an integer, got 'http'",
        RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="http",
    ),
    environment(
        "MASTER_PORT too large",
        "MASTER_PORT must be a port in 1..65535, got 99999",
        RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="99999",
    ),
    environment(
        "MASTER_PORT negative",
        "MASTER_PORT must be a port in 1..65535, got -5",
        RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="-5",
    ),
    environment(
        "other ranks missing",
        "waited 2 s (cluster.timeout_seconds) in vain for rank 1: look at the output there",
        RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29871",
    ),
    environment("Slurm in words", "SLURM_PROCID must be an integer", SLURM_PROCID="x", SLURM_STEP_NUM_TASKS="2"),
    environment(
        "Slurm hosts in words",
        "SLURM_STEP_NODELIST must be a list of hosts such as n[1-4],login, got 'n[a-b]': set",
        SLURM_PROCID="0",
        SLURM_STEP_NUM_TASKS="2",
        SLURM_STEP_NODELIST="n[a-b]",
    ),
    environment(
        "Slurm hosts without end",
        "SLURM_STEP_NODELIST must be a list of hosts such as n[1-4],login, got 'n[1-9",
        SLURM_PROCID="0",
        SLURM_STEP_NUM_TASKS="2",
        SLURM_STEP_NODELIST="n[1-999999999999]",
    ),
    environment(
        "too many ranks",
        "WORLD_SIZE must be the number of ranks of the job, at most 100000",
        RANK="0",
        WORLD_SIZE="1000000000",
    ),
    environment("no such interface", "GLOO_SOCKET_IFNAME names 'ib9', but this host has", GLOO_SOCKET_IFNAME="ib9"),
    environment("no such accelerator", "DS_ACCELERATOR is 'gpu', but DeepSpeed knows cuda", DS_ACCELERATOR="gpu"),
    environment("MPI in words", "PMI_SIZE must be an integer, got 'two'", PMI_SIZE="two"),
]


@pytest.mark.parametrize("case", [*RECIPES, *OPTIONS, *DEEPSPEED, *ENVIRONMENTS], ids=str)
def test_refused(case: Case, tmp_path: Path, model: Path, federation: Path) -> None:
    place: Place = make_place(tmp_path, model, federation)
    refuse(case, place)
