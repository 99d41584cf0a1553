"""Recipes, overrides, help and the DeepSpeed JSON: what is read, what is refused and what the message says."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpa_ds.config.deepspeed_json import check_deepspeed_owner, load_deepspeed_json
from dpa_ds.config.fields import FIELDS, RENAMED, REQUIREMENTS, alternatives
from dpa_ds.config.load import load_config, to_yaml, with_overrides
from dpa_ds.config.paths import expand
from dpa_ds.config.ranges import within
from dpa_ds.config.schema import (
    ClusterConfig,
    DataConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from dpa_ds.config.validate import diff_configs, fingerprint_sections, flatten, validate
from dpa_ds.errors import ConfigError

BASE = "model: {path: m}\ndata: {path: d}\n"
TABLE = "data: {path: d, format: table, partition: %s}\nmodel: {path: m}\n"
VALID = RunConfig(model=ModelConfig(path="m"), data=DataConfig(path="d"))


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    """A recipe file with `text`, read with `overrides`."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    return load_config(["--config", str(recipe), *overrides])


def refuse(tmp_path: Path, text: str, *overrides: str) -> str:
    """Message of the ConfigError: one or two lines, nothing of jsonargparse."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert message.count("\n") <= 1
    assert not re.search(r"Traceback|<class|Parser key|usage:", message)
    return message


# Overrides on a valid recipe, and what the message must contain.
BAD_OVERRIDES = [
    (
        ["--train.learning_rat=1"],
        "--train.learning_rat is not a field of the recipe: did you mean train.learning_rate?",
    ),
    (["--learning_rat=1"], "did you mean train.learning_rate?"),
    (["--train.learning-rate=1"], "did you mean train.learning_rate?"),
    (["--deepspeed_config=x"], "did you mean engine.deepspeed_config?"),
    (["--federation.rounds=1"], "did you mean federation.num_rounds?"),
    (["--lora.use_rslora=true"], "--lora.use_rslora is not a field of the recipe: write lora.scaling: rslora"),
    (["--lora.use_dora=true"], "DoRA divides by the norm of weight and adapter together: set lora.scaling rslora"),
    (["--lora.bias=all"], "only the adapters' A and B are trained, averaged and mixed, over one base that all clients"),
    (["--lora.modules_to_save=[lm_head]"], "name those linear layers in lora.target_modules"),
    (["--lora.init_lora_weights=pissa"], "PiSSA, OLoRA and the like change the base, which is frozen and shared"),
    (["--lora.rank_pattern={}"], "an adapter has one rank and one scale in all layers: set lora.rank"),
    (["--lora.lora_alpha=8"], "did you mean lora.alpha?"),
    (
        ["--generation.temperature=0.7"],
        "generation.temperature 0.7 samples one answer, and generation.num_beams 4 searches for the likeliest: set "
        "num_beams 1 (--beams 1), or temperature 0",
    ),
    (["--generation.temperature=1e-9"], "generation.temperature must be 0 (nothing is sampled) or in [0.001, 1000]"),
    (["--generation.temperature=-1"], "generation.temperature must be 0 (nothing is sampled) or in [0.001, 1000]"),
    (["--generation.top_p=0"], "generation.top_p must be in (0, 1], got 0.0"),
    (["--generation.top_k=-1"], "generation.top_k must be >= 0 (0: of all), got -1"),
    (["--generation.top_p=0.9"], "generation.top_p 0.9 has no effect with generation.temperature 0"),
    (["--generation.top_k=5"], "generation.top_k 5 has no effect with generation.temperature 0"),
    (["--generation.seed=5"], "generation.seed 5 has no effect with generation.temperature 0, which samples nothing"),
    (["--generation.do_sample=true"], "a generation.temperature above 0 samples, and 0 does not: set that"),
    (["--lora.scaling=sqrt"], 'lora.scaling must be one of standard, rslora, got "sqrt"'),
    (["--train.warmup_steps=5"], "clients have different numbers of steps: write train.warmup_ratio"),
    (["--train.warmup_ratio=1"], "train.warmup_ratio must be in [0, 1), got 1.0"),
    (["--train.lr=1"], "train has batch_size, micro_batch_tokens"),
    (["--zzz=1"], "see --help for all fields"),
    (["--train=1"], "--train is a section: give its fields, such as --train.batch_size"),
    (["--data.partition={}"], "such as --data.partition.kind"),
    (["train.batch_size=1"], 'unexpected argument "train.batch_size=1"'),
    (["--"], 'unexpected argument "--"'),
    (["-x"], 'unexpected argument "-x"'),
    (["--train.batch_size"], "--train.batch_size needs a value"),
    (["--train.batch_size", "--seed=1"], "--train.batch_size needs a value"),
    (["--config"], "--config needs a value"),
    (["--name=\udcff"], r"'--name=\udcff' on the command line is not UTF-8 (character 7): type it in a terminal"),
    (["--config", ""], "--config is empty: give a recipe such as those in launch/recipes/"),
    (["--config= "], "--config is empty"),
    (["--seed=1", "--seed", "2"], 'command line: --seed is given twice ("1" and "2"): keep one'),
    (["--profile", "--tracking.profile=false"], '--tracking.profile is given twice ("true" and "false"): keep one'),
    (
        ["--cluster.rendezvous=node1:0", "--cluster.group=0"],
        "cluster.rendezvous must be host:port, such as node1:29600",
    ),
    (["--cluster.rendezvous=node1:99999", "--cluster.group=0"], "cluster.rendezvous must be host:port, such as node1"),
    (["--cluster.rendezvous=node1:٣", "--cluster.group=0"], "cluster.rendezvous must be host:port"),
    (["--cluster.rendezvous=::1:29600", "--cluster.group=0"], "such as node1:29600 or [::1]:29600, got"),
    (["--cluster.rendezvous=[::1]", "--cluster.group=0"], "cluster.rendezvous must be host:port"),
    (["--print_config=nonsense"], 'Invalid option "nonsense"'),
    (["--train.batch_size=true"], "command line: train.batch_size must be a whole number, got true"),
    (["--seed=1:30"], 'seed must be a whole number, got "1:30"'),
    (["--train.batch_size=1.5"], "must be a whole number, got 1.5"),
    (["--train.batch_size=null"], "must be a whole number, got null"),
    (["--train.batch_size="], "train.batch_size must be a whole number"),
    (["--train.learning_rate=fast"], 'train.learning_rate must be a number, got "fast"'),
    (["--train.learning_rate=true"], "train.learning_rate must be a number, got true"),
    (["--train.learning_rate=.nan"], "train.learning_rate must be finite, got NaN"),
    (["--train.learning_rate=nan"], "train.learning_rate must be a number, got"),
    (["--train.learning_rate=1e400"], "train.learning_rate must be finite, got Infinity"),
    (["--train.learning_rate=1" + "0" * 400], 'train.learning_rate must be a number, got "1000'),
    (["--train.learning_rate=1" + "0" * 5000], 'train.learning_rate must be a number, got "1000'),
    (["--train.max_steps=many"], "train.max_steps must be a whole number or null, got"),
    (["--train.adam_betas=[0.9]"], "train.adam_betas must be a list of 2 numbers, got [0.9]"),
    (["--train.adam_betas=[0.9, true]"], "train.adam_betas must be a list of 2 numbers"),
    (["--train.adam_betas=[0.9, .inf]"], "train.adam_betas must be finite"),
    (["--train.keep_optimizer_state=1"], "train.keep_optimizer_state must be true or false, got 1"),
    (["--model.precision=fp8"], 'model.precision must be one of auto, fp32, bf16, fp16, got "fp8"'),
    (
        ["--lora.target_modules=q_proj"],
        'lora.target_modules must be a list of names such as [q_proj] or all-linear, got "q_proj"',
    ),
    (["--model.gradient_checkpointing=yes"], "model.gradient_checkpointing must be true or false"),
    (["--lora.target_modules+=k_proj"], "did you mean lora.target_modules?"),
    (["--lora.target_modules=[1]"], "lora.target_modules must be a list of names"),
    (["--cluster.ranks_per_group=true"], "must be a whole number or a list of whole numbers or auto, got true"),
    (["--cluster.ranks_per_group=[true]"], "cluster.ranks_per_group must be a whole number or a list"),
    (["--federation.num_rounds=0"], "federation.num_rounds must be >= 1, got 0"),
    (["--federation.client_fraction=0"], "federation.client_fraction must be in (0, 1], got 0.0"),
    (["--federation.client_fraction=1.01"], "federation.client_fraction must be in (0, 1], got 1.01"),
    (["--federation.timeout_seconds=0"], "federation.timeout_seconds must be > 0"),
    (["--cluster.timeout_seconds=-1"], "cluster.timeout_seconds must be > 0, got -1.0"),
    (["--cluster.ranks_per_group=0"], "cluster.ranks_per_group must be auto, a number >= 1 or a list of them"),
    (["--cluster.ranks_per_group=[]"], "cluster.ranks_per_group must be auto, a number >= 1 or a list of them"),
    (["--cluster.ranks_per_group=[2, 0]"], "such as [2, 2, 1], got [2, 0]"),
    (["--train.batch_size=0"], "train.batch_size must be >= 1, got 0"),
    (["--train.micro_batch_tokens=0"], "train.micro_batch_tokens must be >= 1"),
    (["--train.local_epochs=0"], "train.local_epochs must be > 0"),
    (["--train.max_steps=0"], "train.max_steps must be >= 1, or null to train for train.local_epochs, got 0"),
    (["--train.learning_rate=0"], "train.learning_rate must be > 0"),
    (["--train.weight_decay", "-1e-3"], "train.weight_decay must be >= 0, got -0.001"),
    (["--train.adam_betas=[0.9, 1]"], "train.adam_betas must both be in [0, 1), got [0.9, 1.0]"),
    (["--train.adam_epsilon=0"], "train.adam_epsilon must be > 0"),
    (["--train.max_grad_norm=-1"], "train.max_grad_norm must be >= 0 (0 turns clipping off)"),
    (["--lora.rank=0"], "lora.rank must be >= 1"),
    (["--lora.alpha=0"], "lora.alpha must be > 0"),
    (["--lora.dropout=1"], "lora.dropout must be in [0, 1)"),
    (["--lora.local_rank=0"], "lora.local_rank must be >= 1, or null for lora.rank"),
    (["--lora.target_modules=[]"], "lora.target_modules must name at least one linear layer"),
    (["--lora.target_modules=['']"], "lora.target_modules must name at least one linear layer"),
    (["--method.alpha=1.1"], "method.alpha must be in [0, 1]"),
    (["--method.alpha=0"], "method.alpha must be in (0, 1] for feddpa_t, got 0"),
    (
        ["--method.name=fedlora", "--lora.local_rank=2"],
        "fedlora starts the local adapter from the global one of rank 8",
    ),
    (["--data.held_out_fraction=1"], "data.held_out_fraction must be in [0, 1)"),
    (["--data.max_length=1"], "data.max_length must be >= 2"),
    (["--data.template=x"], 'data.template must be auto, chat, or a text with {instruction} exactly once, got "x"'),
    (
        ["--data.template={instruction}{instruction}"],
        "data.template must be auto, chat, or a text with {instruction} exactly once",
    ),
    (["--data.num_clients=0"], "data.num_clients must be >= 1"),
    (["--data.path="], "data.path must not be empty"),
    (["--model.path="], "model.path must not be empty (give a model directory"),
    (["--engine.deepspeed_config="], "engine.deepspeed_config must not be empty"),
    (["--seed=-1"], "seed must be >= 0"),
    (["--evaluation.max_examples=0"], "evaluation.max_examples must be >= 1"),
    (["--evaluation.every_rounds=-1"], "evaluation.every_rounds must be >= 0"),
    (["--name="], "name must be a plain folder name"),
    (["--name=.."], 'got ".."'),
    (["--name=."], 'got "."'),
    (["--name=a/b"], 'without / or \\, got "a/b"'),
    (["--name=a\\b"], "name must be a plain folder name"),
    (["--name=a\nb"], "name must be a plain folder name"),
    (["--federation.aggregation=median"], 'federation.aggregation must be mean, got "median"'),
    (["--federation.server_optimizer=adam"], 'federation.server_optimizer must be one of sgd, momentum, got "adam"'),
    (["--federation.server_learning_rate=0"], "federation.server_learning_rate must be > 0, got 0.0"),
    (["--federation.server_momentum=1"], "federation.server_momentum must be in [0, 1), got 1.0"),
    (["--federation.server_momentum=-0.1"], "federation.server_momentum must be in [0, 1), got -0.1"),
    (["--method.name=fedit", "--method.phase_order=local_first"], "method.phase_order: local_first has no effect with"),
    (["--method.name=feddpa_f", "--method.global_source=aggregated"], "aggregated has no effect with method feddpa_f"),
    (["--method.phase_order=local_first", "--method.global_source=aggregated"], "contradicts method.phase_order"),
]

# Whole recipes, and what the message must contain.
BAD_RECIPES = [
    (BASE + "train:\n  learning_rat: 3e-4\n", "recipe.yaml, line 4: train.learning_rat is not a field"),
    (BASE + "trian: {batch_size: 3}\n", "line 3: trian is not a field of the recipe: did you mean train?"),
    (BASE + "train: 3\n", "line 3: train is a section: write its fields below it, indented"),
    (BASE + "train:\n- batch_size: 3\n", "train is a section"),
    (BASE + "train:\n  batch_size: true\n", "recipe.yaml, line 4: train.batch_size must be a whole number, got true"),
    (BASE + "train:\n  batch_size: {a: 1}\n", 'train.batch_size must be a whole number, got {"a": 1}'),
    (BASE + "seed: 1:30\n", 'seed must be a whole number, got "1:30"'),
    (BASE + "seed: 010\n", 'seed must be a whole number, got "010"'),
    (BASE + "seed: '8'\n", 'seed must be a whole number, got "8"'),
    (BASE + "tracking: {tensorboard: yes}\n", 'tracking.tensorboard must be true or false, got "yes"'),
    (BASE + "cluster: {ranks_per_group: '8'}\n", 'or auto, got "8"'),
    (BASE + "train: {batch_size: null}\n", "train.batch_size must be a whole number, got null"),
    (BASE + "data.partition.kind:\n", "data.partition.kind must be one of column, iid, dirichlet, got null"),
    (BASE + "name: 12\n", "name must be text, got 12 (put it in quotes)"),
    (BASE + "name: null\n", "name must be text, got null"),
    (BASE + "name: {class_path: os.system}\n", "name must be text"),
    (BASE + "name: !!python/object/apply:os.system [ls]\n", "line 3: not a YAML recipe: could not determine"),
    (BASE + "model: {path: n}\n", "recipe.yaml, line 3: model is given twice (first in line 1): keep one"),
    (BASE + "train: {batch_size: 1, batch_size: 2}\n", "train.batch_size is given twice"),
    (BASE + "train: {batch_size: 1}\ntrain.batch_size: 2\n", "train.batch_size is given twice"),
    (BASE + "lora: &x {rank: 2}\n", "line 3: not a YAML recipe: a recipe has no anchors or aliases"),
    (BASE + "lora: *x\n", "a recipe has no anchors or aliases"),
    ("a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]\n", "a recipe has no anchors or aliases"),
    (BASE + "? [1, 2]\n: 3\n", "is not a field of the recipe"),
    (BASE + "1: 2\n", "1 is not a field of the recipe"),
    (BASE + "<<: {seed: 1}\n", "<< is not a field of the recipe"),
    (BASE + "--- {}\n", "not a YAML recipe: expected a single document"),
    ("model:\n\tpath: m\n", "line 2: not a YAML recipe: while scanning for the next token"),
    ("model: [\n", "not a YAML recipe: while parsing a flow node"),
    ("[" * 3000, "not a YAML recipe: nested too deeply"),
    ("a\0b", "not a YAML recipe"),
    ("[1]", "a recipe is a mapping of sections such as train:, got [1]"),
    ("text", 'a recipe is a mapping of sections such as train:, got "text"'),
    ("", "got nothing"),
    ("# only a comment\n", "got nothing"),
    ("#" * (1 << 20) + "\n", "is larger than 1 MiB"),
    ("model: {path: m}\n", "data.path must not be empty"),
    ('data: {path: "a\\0b"}\n', "data.path must be a path (no NUL character"),
    ("data: {path: m}\n", "model.path must not be empty"),
    (BASE + "train: {learning_rate: .inf}\n", "train.learning_rate must be finite"),
    (BASE + "train: {learning_rate: 1" + "0" * 400 + "}\n", "train.learning_rate must be a number"),
    (BASE + "seed: 1" + "0" * 5000 + "\n", "seed must be a whole number"),
    (TABLE % "{}", "data.partition.column is missing: data.partition.kind column needs the name of a column"),
    (TABLE % "{kind: iid}", "data.partition.num_clients must be >= 1 with data.partition.kind iid, got null"),
    (TABLE % "{kind: iid, num_clients: 0}", "data.partition.num_clients must be >= 1"),
    (TABLE % "{kind: dirichlet, num_clients: 2}", "data.partition.column is missing"),
    (TABLE % "{kind: dirichlet, column: c}", "data.partition.num_clients must be >= 1"),
    (TABLE % "{kind: dirichlet, column: c, num_clients: 2, concentration: 0}", "concentration must be > 0, got 0.0"),
]


@pytest.mark.parametrize(("overrides", "fragment"), BAD_OVERRIDES, ids=lambda case: str(case)[:60])
def test_bad_override(overrides: list[str], fragment: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fragment in refuse(tmp_path, BASE, *overrides)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("text", "fragment"), BAD_RECIPES, ids=lambda case: str(case)[:60])
def test_bad_recipe(text: str, fragment: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = refuse(tmp_path, text)
    assert fragment in message
    assert len(message) < 500
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_is_refused_with_its_new_name(old: str, new: str, tmp_path: Path) -> None:
    assert new in FIELDS
    section, _, name = old.partition(".")
    in_a_file = refuse(tmp_path, f"{BASE}{section}:\n  {name}: 1\n")
    assert in_a_file == f"{tmp_path}/recipe.yaml, line 4: {old} was renamed: write {new} instead"
    on_the_command_line = refuse(tmp_path, BASE, f"--{old}=1")
    assert on_the_command_line == f"command line: --{old} was renamed: write {new} instead"


def test_the_four_renamed_keys() -> None:
    assert set(RENAMED.values()) == {
        "cluster.heartbeat_timeout_seconds",
        "federation.compression",
        "federation.aggregation_weights",
        "method.global_source",
    }


def test_a_server_optimizer_with_momentum_is_accepted(tmp_path: Path) -> None:
    text = BASE + "federation: {server_optimizer: momentum, server_momentum: 0.5, server_learning_rate: 0.1}\n"
    federation = load(tmp_path, text).federation
    assert (federation.server_optimizer, federation.server_momentum) == ("momentum", 0.5)
    assert federation.server_learning_rate == 0.1


def test_a_field_says_in_words_what_it_demands() -> None:
    demanded = {item.name: item.metadata.get("requirement") for item in fields(ClusterConfig)}
    assert demanded["timeout_seconds"] == "must be > 0 and must be at most 31536000"
    assert demanded["group"] == "must be >= 0, or null for all groups in one job and must be at most 1000000"
    assert demanded["device"] is None


@given(st.integers(-3, 3), st.integers(1, 3), st.sampled_from("[("), st.sampled_from("])"), st.integers(-8, 8))
def test_an_interval_is_tested_as_it_is_written(low: int, width: int, left: str, right: str, halves: int) -> None:
    value, high = halves / 2, low + width
    is_inside = (value >= low if left == "[" else value > low) and (value <= high if right == "]" else value < high)
    demand = within(f"{left}{low}, {high}{right}")
    assert demand["requirement"] == f"must be in {left}{low}, {high}{right}"
    assert [check.holds(value) for check in demand["checks"]] == [is_inside]


@pytest.mark.parametrize("address", ["node1:29600", "10.0.0.1:1", "[::1]:29600", "[fe80::1%eth0]:65535"])
def test_addresses_of_a_rendezvous(address: str, tmp_path: Path) -> None:
    assert load(tmp_path, BASE, "--cluster.group=0", f"--cluster.rendezvous={address}").cluster.rendezvous == address


def test_a_composed_command_line_gives_each_field_once(tmp_path: Path) -> None:
    words = with_overrides(
        ["--config", "a.yaml", "--seed", "1", "--name=x", "--config=b.yaml"], {"seed": 2, "lora.rank": 4}
    )
    assert words == ["--config=a.yaml", "--config=b.yaml", "--name=x", "--seed=2", "--lora.rank=4"]


def test_every_number_of_a_recipe_has_an_upper_bound() -> None:
    """One too many zeros must not fill memory or hours without a word."""
    numbers = [key for key, kind in FIELDS.items() if int in alternatives(kind) or float in alternatives(kind)]
    numbers.remove("cluster.ranks_per_group")  # compared with the ranks that there are
    assert len(numbers) > 35
    unbounded = [key for key in numbers if all(demand.holds(10**31) for demand in REQUIREMENTS.get(key, ()))]
    assert unbounded == []


HUGE = ("federation.num_rounds", "train.max_steps", "train.local_epochs", "data.partition.num_clients")


@pytest.mark.parametrize("key", HUGE)
def test_a_huge_number_is_refused_with_its_bound(key: str, tmp_path: Path) -> None:
    assert re.search(
        rf"{re.escape(key)} must be at most \d+, got 1000000000", refuse(tmp_path, BASE, f"--{key}=1000000000")
    )


def test_paths_begin_at_home_and_hold_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    text = "model: {path: ~/m}\ndata: {path: $SCRATCH/d, test_path: '${SCRATCH}/t.json'}\noutput_dir: $HOME/x\n"
    config = load(tmp_path, text, "--engine.deepspeed_config=~/ds.json")
    assert str(config.run_dir) == "/home/me/x/run"
    assert (config.model.path, config.data.path, config.data.test_path) == (
        "/home/me/m",
        "/scratch/d",
        "/scratch/t.json",
    )
    assert config.engine.deepspeed_config == "/home/me/ds.json"
    assert config.data.cache_dir == "~/.cache/dpa_ds"  # of each host
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize("key", ["output_dir", "model.path", "data.path", "data.test_path", "engine.deepspeed_config"])
@pytest.mark.parametrize("path", ["~nouser/x", "$DPA_DS_NOT_SET/x", "a/${DPA_DS_NOT_SET}"])
def test_no_folder_is_called_like_a_variable(key: str, path: str, tmp_path: Path) -> None:
    message = refuse(tmp_path, BASE, f"--{key}={path}")
    assert f"{key} must name a home directory that exists (~) and variables that are set ($NAME), got" in message


def test_a_path_on_the_command_line_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--run: ~nouser is no home directory here: .* got '~nouser/runs'"):
        expand("~nouser/runs", "--run")
    with pytest.raises(ConfigError, match=r"--run: \$DPA_DS_NOT_SET is not set: set it, or write the path out"):
        expand("$DPA_DS_NOT_SET/x", "--run")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])  # a container with a user that nobody knows
    with pytest.raises(ConfigError, match=r"data.cache_dir: ~ is no home directory here"):
        expand("~/.cache", "data.cache_dir")
    with pytest.raises(ConfigError, match="--run: must be a path, got ''"):
        expand("", "--run")
    assert expand("./~x/a$", "--run") == Path("~x/a$")


def test_no_recipe_says_how_to_give_one() -> None:
    with pytest.raises(
        ConfigError, match=re.escape("give one with --config RECIPE.yaml, or --recipe NAME for one of launch/rec")
    ):
        load_config(["--local_rank=0"])


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("missing.yaml", "no such file"),
        (".", "is a directory"),
        ("binary", "not text in UTF-8"),
        ("a\0b", "cannot read"),
        ("/dev/zero", "is a device, not a regular file"),
    ],
)
def test_recipe_that_cannot_be_read(name: str, fragment: str, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=f"--config: .*{fragment}.*launch/recipes/"):
        load_config(["--config", str(tmp_path / name)])


@pytest.mark.parametrize("spelling", ["3e-4", "3E-4", "3.0e-4", "0.0003", ".0003"])
def test_numbers_that_yaml_1_1_reads_as_text(spelling: str, tmp_path: Path) -> None:
    assert load(tmp_path, f"{BASE}train: {{learning_rate: {spelling}}}\n").train.learning_rate == 3e-4
    assert load(tmp_path, BASE, "--train.learning_rate", spelling).train.learning_rate == 3e-4


def test_types_that_are_accepted(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        BASE
        + """
name: 2026-01-01
train: {learning_rate: 1, max_steps: null, adam_betas: [0, 0.5]}
cluster: {ranks_per_group: [2, 2, 1]}
tracking:
evaluation.every_rounds: 3
""",
        "--lora.local_rank=null",
        "--data.task_column=null",
        "--model.gradient_checkpointing=true",
        "--lora.target_modules=[q_proj, 'k_proj']",
    )
    assert config.name == "2026-01-01"
    assert type(config.train.learning_rate) is float
    assert config.train.adam_betas == (0.0, 0.5)
    assert config.cluster.ranks_per_group == [2, 2, 1]
    assert config.evaluation.every_rounds == 3
    assert (config.train.max_steps, config.lora.local_rank, config.data.task_column) == (None, None, None)
    assert config.model.gradient_checkpointing is True
    assert config.lora.target_modules == ["q_proj", "k_proj"]


def test_partitions_that_are_accepted(tmp_path: Path) -> None:
    for partition in ("{column: c}", "{kind: iid, num_clients: 1}", "{kind: dirichlet, column: c, num_clients: 2}"):
        load(tmp_path, TABLE % partition)


def test_overrides_win_over_recipes_and_later_recipes_over_earlier(tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("train: {batch_size: 2, max_steps: 2}\n")
    text = BASE + "train: {batch_size: 1, max_steps: 1, learning_rate: 0.5}\nlora: {rank: 4}\n"
    config = load(tmp_path, text, "--train.max_steps=3", "--config", str(second), "--seed", "2")
    assert (config.train.batch_size, config.train.max_steps, config.train.learning_rate) == (2, 3, 0.5)
    assert (config.lora.rank, config.lora.alpha, config.seed) == (4, 16.0, 2)
    assert type(config.train) is TrainConfig


@pytest.mark.parametrize(
    "spelling", [["--local_rank=0"], ["--local_rank", "0"], ["--local-rank=0"], ["--local-rank", "0"]]
)
def test_local_rank_of_the_launcher_is_swallowed(spelling: list[str], tmp_path: Path) -> None:
    assert load(tmp_path, BASE, *spelling) == load(tmp_path, BASE)


def test_help_teaches_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as caught:
            load_config([flag])
        assert caught.value.code == 0
    text = capsys.readouterr().out
    source = (Path(__file__).parents[2] / "dpa_ds" / "config" / "schema.py").read_text()
    field = r'^    (\w+): (?!\w*Config = field).*\n(?:        .*\n    \)\n)?    """(.*)"""$'
    docstrings = re.findall(field, source, flags=re.MULTILINE)
    assert len(docstrings) == len(flatten(RunConfig()))
    for (name, docstring), key in zip(sorted(docstrings), sorted(flatten(RunConfig()), key=leaf), strict=True):
        assert name == leaf(key)
        assert re.search(rf"--{re.escape(key)}[ ,]", text)
        assert docstring in text
    for command in ("deepspeed launch/run.py --config", "--hostfile hostfile", "torchrun", "srun", "--print_config >"):
        assert command in text
    assert "default: 0.0003" in text
    assert "--train CONFIG" not in text
    assert "modules+" not in text


def leaf(key: str) -> str:
    return key.rpartition(".")[2]


def test_print_config_is_the_complete_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(tmp_path, BASE, "--train.batch_size=3", "--print_config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed == to_yaml(load(tmp_path, BASE, "--train.batch_size=3"))
    with pytest.raises(SystemExit):
        load_config(["--print_config"])
    assert capsys.readouterr().out == to_yaml(RunConfig())


NASTY_TEXTS = [
    "1e-3", "3e4", "010", "1:30", "yes", "null", "~", "2026-01-01", "1_0", ".5", ".nan", "[a]", "{a}", "&a", "*a", "!a",
    "# a", "a # b", "a: b", " a ", "'", '"', "%a", "@a", "- a", "é 漢 🦊", "=", "<<", "x" * 120 + " y" * 60,
]  # fmt: skip
NASTY_TEMPLATES = [
    "{instruction}\n",
    "\n{instruction}",
    " a\n{instruction} \n\n",
    "\ta\r\n{instruction}\x85\u2028",
    "{instruction}\n#",
]


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_text_survives_yaml(text: str, tmp_path: Path) -> None:
    columns = replace(VALID.data, instruction_column=text)
    config = replace(VALID, data=columns, lora=LoraConfig(target_modules=[text, text]))
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize("template", NASTY_TEMPLATES)
def test_template_survives_yaml(template: str, tmp_path: Path) -> None:
    config = replace(VALID, data=DataConfig(path="d", template=template))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(to_yaml(config).encode())
    assert load_config(["--config", str(recipe)]) == config


def test_config_survives_yaml(tmp_path: Path) -> None:
    config = replace(
        VALID,
        seed=7,
        cluster=ClusterConfig(ranks_per_group=[2, 1], timeout_seconds=1e7),
        train=TrainConfig(learning_rate=1e-5, adam_betas=(0.0, 0.95), max_steps=3, keep_optimizer_state=True),
    )
    assert load(tmp_path, to_yaml(config)) == config
    assert type(load(tmp_path, to_yaml(config)).train.adam_betas) is tuple


def test_validate_takes_configs_built_in_code() -> None:
    validate(VALID)
    with pytest.raises(ConfigError, match=r"lora\.rank must be >= 1, got 0"):
        validate(replace(VALID, lora=LoraConfig(rank=0)))


def test_fingerprint_holds_what_determines_the_result() -> None:
    fingerprint = fingerprint_sections(VALID)
    assert fingerprint == json.loads(json.dumps(fingerprint))
    left_out = set(flatten(VALID)) - set(fingerprint)
    assert left_out == {
        *("name", "output_dir", "private_dir", "metrics.share", "data.cache_dir", "train.micro_batch_tokens"),
        *(f"federation.{key}" for key in ("num_rounds", "timeout_seconds", "min_clients")),
        *("federation.max_update_norm", "federation.on_bad_update", "resume", "model.attention"),
        *(f"weighting.{key}" for key in ("kind", "scale", "representation", "encoder")),
        *(
            key
            for key in flatten(VALID)
            if key.startswith(("checkpoint.", "cluster.", "engine.", "generation.", "evaluation.", "tracking."))
        ),
    }
    assert {"seed", "federation.stratify_by_group", "data.partition.kind", "method.name"} <= set(fingerprint)
    server = {"aggregation", "server_optimizer", "server_learning_rate", "server_momentum"}
    assert {f"federation.{name}" for name in server} <= set(fingerprint)


def test_diff_names_key_old_and_new() -> None:
    new = replace(VALID, train=TrainConfig(learning_rate=1e-3, max_steps=5), method=MethodConfig(name="fedit"))
    assert diff_configs(fingerprint_sections(VALID), fingerprint_sections(new)) == [
        'method.name: "feddpa_t" -> "fedit"',
        "train.max_steps: null -> 5",
        "train.learning_rate: 0.0003 -> 0.001",
    ]
    assert diff_configs(fingerprint_sections(new), fingerprint_sections(new)) == []
    assert diff_configs({"a": 1}, {"b": None}) == ["a: 1 -> absent", "b: absent -> null"]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ('{\n"zero_optimization": {,}\n}', "ds.json, line 2: not JSON"),
        ("", "ds.json, line 1: not JSON"),
        ("[1]", r"a DeepSpeed JSON is an object of keys, got \[1\]"),
        ('{"a": 1, "a": 2}', "ds.json: key a is given twice"),
        ("[" * 100_000, "nested too deeply"),
        (
            '{"bf16": {"enabled": true}}',
            r"ds.json sets what the recipe owns: bf16.enabled \(owned by model.precision\)",
        ),
    ],
)
def test_bad_deepspeed_json(content: str, fragment: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(ConfigError, match=fragment):
        load_deepspeed_json(str(tmp_path / "ds.json"))


# DeepSpeed counts the first three as stage 0, and ends in a traceback at others.
NOT_ALLOWED = [
    (
        {"zero_optimisation": {"stage": 3}},
        '"zero_optimisation" is not a key that the JSON may have: did you mean zero_opt',
    ),
    ({"zero_optimization": {"stge": 3}}, '"zero_optimization.stge" is not .*: did you mean zero_optimization.stage?'),
    ({"zero_optimization.stage": 3}, '"zero_optimization.stage" is not .*: did you mean zero_optimization.stage?'),
    ({"stage": 3}, '"stage" is not a key .*: did you mean zero_optimization.stage?'),
    ({"zero_optimization": {"offload_params": {}}}, "did you mean zero_optimization.offload_param?"),
    ({"bfloat16": {}}, '"bfloat16" is not a key that the JSON may have: .*the JSON may have aio, bf16, comm'),
    ({"aio": {"zzz": 1}}, '"aio.zzz" is not a key .*: remove it; aio may have block_size, intra_op_parallelism'),
    ({"amp": {"enabled": True}}, '"amp" is not a key that the JSON may have'),
    ({"elasticity": {"enabled": True}}, '"elasticity" is not a key'),
    ({"autotuning": {"enabled": True}}, '"autotuning" is not a key'),
    ({"curriculum_learning": {"enabled": True}}, '"curriculum_learning" is not a key'),
    ({"sparse_gradients": True}, '"sparse_gradients" is not a key'),
    ({"compression_training": {}}, '"compression_training" is not a key'),
    ({"hybrid_engine": {"enabled": True}}, '"hybrid_engine" is not a key'),
    ({"tensor_parallel": {"autotp_size": 2}}, '"tensor_parallel" is not a key'),
    ({"wandb": {"enabled": True}}, '"wandb" is not a key'),
    ({"activation_checkpointing": {}}, r"activation_checkpointing \(owned by model.gradient_checkpointing\)"),
    ({"communication_data_type": "int8"}, 'communication_data_type must be one of fp32, bf16, fp16, got "int8"'),
    ({"communication_data_type": ["fp32"]}, "communication_data_type must be one of fp32, bf16, fp16, got"),
    ({"data_types": {"grad_accum_dtype": 16}}, "data_types.grad_accum_dtype must be one of fp32, bf16, fp16, got 16"),
    ({"data_types": "fp32"}, 'data_types must be an object of keys, got "fp32"'),
    ({"aio": {"block_size": "large"}}, "aio.block_size must be a whole number in 1..1099511627776"),
    ({"aio": {"queue_depth": True}}, "aio.queue_depth must be a whole number"),
    ({"zero_force_ds_cpu_optimizer": "no"}, "zero_force_ds_cpu_optimizer must be true or false"),
    ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage must be a stage, 0 to 3, got "auto"'),
    ({"zero_optimization": {"offload_param": None}}, "offload_param must be an object of keys, got null"),
    ({"fp16": {"loss_scale": float("nan")}}, "not JSON: NaN is no number"),
    ({"k" * 100_000: 1}, "is not a key that the JSON may have"),
]


@pytest.mark.parametrize(("content", "fragment"), NOT_ALLOWED, ids=lambda case: str(case)[:60])
def test_deepspeed_json_is_an_allow_list(content: dict[str, object], fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=fragment) as caught:
        load_deepspeed_json(str(path))
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 700


def test_shipped_deepspeed_json_is_allowed() -> None:
    shipped = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
    assert len(shipped) >= 7
    for path in shipped:
        assert load_deepspeed_json(str(path)) == json.loads(path.read_text())


def test_deepspeed_json_is_sought_in_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    repository = Path(__file__).parents[2]
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_json("ds_configs/none.json")
    assert str(tmp_path / "ds_configs/none.json") in str(caught.value)
    assert str(repository / "ds_configs/none.json") in str(caught.value)
    with pytest.raises(ConfigError, match="is a directory"):
        load_deepspeed_json("ds_configs")  # found in the repository
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert load_deepspeed_json("mine.json") == {"zero_optimization": {"stage": 2}}


def test_keys_of_the_recipe_are_one_error() -> None:
    clashing = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW"},
        "scheduler": {},
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
        "tensorboard": {},
        "managed_gradient_accumulation": True,
    }
    with pytest.raises(ConfigError) as caught:
        check_deepspeed_owner(clashing, "ds.json")
    for key in clashing:
        assert key in str(caught.value)
    for owner in ("train.batch_size", "train.micro_batch_tokens", "train.max_grad_norm", "model.precision"):
        assert owner in str(caught.value)
    assert str(caught.value).endswith("Remove them from ds.json.")
    check_deepspeed_owner(
        {"fp16": {"loss_scale": 0, "initial_scale_power": 8}, "steps_per_print": 9, "zero_optimization": {"stage": 1}},
        "ds.json",
    )


OWN_FILES = "model: {path: m}\ndata: {format: table, path: 'd/{client}.jsonl', %s}\n"
OWN_TESTS = "test_path: 't/{client}.jsonl', clients: [b, a]"
BAD_CLIENT_FILES = [
    (OWN_FILES.replace("format: table, ", "") % "", [], "data.format feddpa does not know: set data.format table"),
    (OWN_FILES % "partition: {column: c}", [], "data.partition has no effect where {client} in data.path"),
    (OWN_FILES % "clients: []", [], "data.clients must be different names of files or folders"),
    (OWN_FILES % "clients: [a, a]", [], "data.clients must be different names of files or folders"),
    (OWN_FILES % "clients: [../a]", [], "data.clients must be different names of files or folders"),
    (OWN_FILES % "test_path: '{client}/{client}'", [], "data.path and data.test_path may have {client} once each"),
    (BASE, ["--data.clients=[a]"], "data.clients has no effect without {client} in data.path"),
    (BASE, ["--data.test_path={client}.csv"], "data.test_path has {client}, and data.path has none"),
    (OWN_FILES % "clients: [a]", ["--method.name=centralized"], "method centralized trains on all clients' data, and"),
    (OWN_FILES % "", ["--cluster.group=0", "--cluster.rendezvous=n1:29600"], "data.clients is missing: groups with"),
    (OWN_FILES % OWN_TESTS, ["--evaluation.scores_every_rounds=1"], "set it to 0, or give one data.test_path without"),
    (
        OWN_FILES % "clients: [a], held_out_fraction: 0.1",
        ["--evaluation.scores_every_rounds=1", "--evaluation.split=held_out"],
        "evaluation.scores_every_rounds scores every client on the test rows of all, and data.clients says",
    ),
]


@pytest.mark.parametrize(("text", "options", "message"), BAD_CLIENT_FILES)
def test_files_of_clients_that_cannot_be(tmp_path: Path, text: str, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, text, *options)


def test_files_of_clients_that_are_accepted(tmp_path: Path) -> None:
    config = load(tmp_path, OWN_FILES % OWN_TESTS)
    assert config.data.clients == ["b", "a"]
    load(tmp_path, OWN_FILES % "clients: [a], test_path: t.jsonl", "--evaluation.scores_every_rounds=1")
