"""Every recipe that we ship parses, and trains a step, with a tiny model and data in place of its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dpa_ds.config.load import load_config
from dpa_ds.config.schema import PAPER_TEMPLATE, DataConfig
from tests import tiny
from tests.launch.processes import REPOSITORY, adapters, run_forked

pytestmark = pytest.mark.launch
WITHOUT_RECIPE = {"zero3_offload_nvme", "zeropp"}
"""DeepSpeed JSONs for machines that no recipe is for: a local NVMe disk, several hosts a rank group."""
RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))


def write_table(path: Path, data: DataConfig) -> Path:
    """Rows with the columns that the recipe names, three labels in turn."""
    columns = (data.instruction_column, data.input_column, data.output_column, data.task_column, data.partition.column)
    rows = [{column: f"{column} {i % 3}" for column in columns if column} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_chat_template(model: Path, copy: Path) -> Path:
    """The model with a chat template, as instruct models have one."""
    shutil.copytree(model, copy)
    (copy / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return copy


def write_chats(folder: Path) -> Path:
    """A file of conversations for each of two clients; the pattern that names them."""
    folder.mkdir()
    for client in ("first", "second"):
        turns = [{"role": "user", "content": f"red {client}"}, {"role": "assistant", "content": "blue"}] * 2
        (folder / f"{client}.jsonl").write_text(f"{json.dumps({'messages': turns, 'category': client})}\n" * 4)
    return folder / "{client}.jsonl"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_a_step(path: Path, tmp_path: Path, model: Path, federation: Path) -> None:
    config = load_config(["--config", str(path)])
    data = federation
    further: dict[str, object] = {}
    if config.data.template == "chat":
        model, data = with_chat_template(model, tmp_path / "model"), write_chats(tmp_path / "chats")
        further["data.test_path"] = tmp_path / "chats" / "first.jsonl"
    elif config.data.format == "table":
        data = write_table(tmp_path / "own.jsonl", config.data)
    changes = {
        "output_dir": tmp_path / "runs",
        "cluster.device": "cpu",
        "cluster.ranks_per_group": "auto",
        "model.path": model,
        "data.path": data,
        "data.cache_dir": tmp_path / "cache",
        "federation.num_rounds": 1,
        "train.max_steps": 1,
        "train.batch_size": 2,
        "evaluation.max_examples": 2,
        **further,
    }
    argv = ["--config", str(path), *(f"--{key}={value}" for key, value in changes.items())]
    ended = run_forked(argv)
    assert ended.returncode == 0, ended.output
    run_dir = tmp_path / "runs" / config.name
    assert adapters(run_dir)
    results = json.loads((run_dir / "results.json").read_text())
    courses = [client["held_out_loss"] for client in results["clients"]]
    assert any(len(course) == 2 for course in courses), "a recipe shows held-out loss, before and after"
    # A Dirichlet client of a single example has none to hold out; all others have both.
    assert {len(course) for course in courses} <= ({0, 2} if config.data.format == "table" else {2})


def test_names_differ() -> None:
    names = [load_config(["--config", str(path)]).name for path in RECIPES]
    assert len(set(names)) == len(names), "two recipes would share a folder"


def test_every_deepspeed_json_has_a_recipe() -> None:
    used = {load_config(["--config", str(path)]).engine.deepspeed_config for path in RECIPES}
    shipped = {f"ds_configs/{path.name}" for path in (REPOSITORY / "ds_configs").glob("*.json")}
    assert shipped == used | {f"ds_configs/{name}.json" for name in WITHOUT_RECIPE}


@pytest.mark.skipif(Path("/usr/include/libaio.h").exists(), reason="libaio is installed: nothing is missing")
def test_offload_to_nvme_without_libaio_is_one_error(tmp_path: Path, model: Path, federation: Path) -> None:
    """As far as it goes here: the file loads, DeepSpeed takes it, and then asks for an operator."""
    argv = tiny.recipe(
        model, federation, tmp_path / "runs", engine__deepspeed_config="ds_configs/zero3_offload_nvme.json"
    )
    ended = run_forked(argv)
    assert ended.returncode == 2, ended.output
    assert len(ended.errors) == 1, ended.output
    assert "async_io" in ended.errors[0]
    assert ended.num_tracebacks == 0, ended.output


def test_paper_is_the_papers_setting() -> None:
    config = load_config(["--config", str(REPOSITORY / "launch" / "recipes" / "paper.yaml")])
    lora, train = config.lora, config.train
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (8, 16, 0.05, ["q_proj", "v_proj"])
    assert (train.batch_size, train.local_epochs, train.learning_rate, train.max_grad_norm) == (64, 10, 3e-4, 1.0)
    assert (train.max_steps, train.lr_schedule, train.weight_decay) == (None, "linear", 0.0)
    assert (config.federation.num_rounds, config.federation.client_fraction) == (20, 1.0)
    assert replace(config.data, path="") == DataConfig(max_length=512, template=PAPER_TEMPLATE)
