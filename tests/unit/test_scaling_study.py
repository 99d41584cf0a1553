"""What a scaling study refuses before it starts anything, and the command lines that it composes."""

from pathlib import Path

import pytest

from dpa_ds.config.load import load_config
from dpa_ds.errors import ConfigError
from dpa_ds.experiments.scaling_study import Plan

RECIPE = ("--model.path=m", "--data.path=d", "--name=mine", "--train.batch_size=4")


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """A recipe that gives nothing, and fields on the command line."""
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    return ["--config", str(tmp_path / "recipe.yaml"), *RECIPE]


def plan(recipe: list[str], axis: str, value: str, folder: Path) -> Plan:
    return Plan(recipe, axis, [value], "weak", 1, 1, folder, "python")


def test_the_output_is_a_file(recipe: list[str], tmp_path: Path) -> None:
    file = tmp_path / "scale"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"--output .*scale is a file, not a folder: give another, or move it away"):
        plan(recipe, "ranks_per_group", "1", file).claim_folder()
    assert file.read_text() == "mine"


def test_the_record_of_the_output_is_damaged(recipe: list[str], tmp_path: Path) -> None:
    (tmp_path / "experiment.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"experiment.json cannot be read .*: give another --output, or delete it"):
        plan(recipe, "ranks_per_group", "1", tmp_path).claim_folder()


@pytest.mark.parametrize("value", ["1000000000", "1" * 50, "0", "²", "many"])
def test_ranks_that_nobody_has(value: str, recipe: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--over groups: .* is not a number of groups: give whole numbers in 1\.\.1"):
        plan(recipe, "groups", value, tmp_path).point(value)


def test_each_field_of_a_point_is_given_once(recipe: list[str], tmp_path: Path) -> None:
    config = load_config(plan(recipe, "ranks_per_group", "2", tmp_path).point("2").arguments)
    assert (config.name, config.train.batch_size, config.cluster.ranks_per_group) == ("ranks_per_group_2", 8, 2)
