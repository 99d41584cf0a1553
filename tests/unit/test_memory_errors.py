"""Out of memory is one line with what to lower, and the allocator's settings are the user's where there are any."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dpa_ds.cli import evaluate, generate, train
from dpa_ds.cli.bootstrap import set_allocator_defaults
from dpa_ds.cli.memory import expected_memory, memory_errors, training_remedy
from dpa_ds.config.load import load_config
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.launchers import Launch
from dpa_ds.errors import MemoryLimitError
from tests import tiny

CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.2"


@pytest.fixture
def job() -> JobStore:
    return JobStore(Launch("single", 0, 1, 0, "127.0.0.1", 0))


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    return tiny.recipe(tiny.make_model(tmp_path / "model"), tiny.make_federation(tmp_path / "data"), tmp_path / "runs")


def out_of_memory(*_: Any) -> None:
    """A stand-in for a GPU that is full: torch's own error, which no CPU raises."""
    raise torch.OutOfMemoryError(CUDA_MESSAGE + "\nSee documentation for Memory Management")


def test_training_says_what_to_lower_and_what_was_planned(
    argv: list[str], job: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpa_ds.cli.session.train", out_of_memory)
    _, work = train.prepare(argv)
    with pytest.raises(MemoryLimitError) as caught:
        work(job)
    message = str(caught.value)
    assert message.startswith(f"out of memory: {CUDA_MESSAGE}. The planner expects 2.")
    for word in ("train.micro_batch_tokens (now 128)", "model.gradient_checkpointing", "generation.batch_tokens"):
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("program", "work_of_program", "options"),
    [
        (evaluate, "dpa_ds.evaluation.runner.evaluate", []),
        (generate, "dpa_ds.inference.console.generate", ["--client", "0", "--prompt", "a"]),
    ],
)
def test_a_trained_run_says_what_to_lower(
    argv: list[str],
    job: JobStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: Any,
    work_of_program: str,
    options: list[str],
) -> None:
    from dpa_ds.config.load import to_yaml

    run_dir = tmp_path / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(load_config(argv)))
    monkeypatch.setattr(work_of_program, out_of_memory)
    _, work = program.prepare(["--run", str(run_dir), *options])
    with pytest.raises(MemoryLimitError, match=r"generation\.batch_tokens"):
        work(job)


def test_memory_of_the_host_counts_too() -> None:
    with pytest.raises(MemoryLimitError, match=r"can't allocate memory.*lower it"), memory_errors("lower it"):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(MemoryLimitError, match="the host has none left"), memory_errors("lower it"):
        raise MemoryError


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("lower it"):
        raise RuntimeError("shapes differ")


def test_a_model_that_the_planner_does_not_know_has_no_figure(argv: list[str], job: JobStore, tmp_path: Path) -> None:
    config = load_config([*argv, f"--model.path={tmp_path / 'nowhere'}"])
    assert expected_memory(config, job) == ""
    assert "launch/plan.py" in training_remedy(config.train, config.generation)


@pytest.mark.parametrize(
    ("before", "version", "after"),
    [
        ({}, "2.11.0+cu130", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({}, "2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,pinned_max_cached_size_mb:1"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "2.13.0", {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ],
)
def test_the_users_allocator_settings_win(before: dict[str, str], version: str, after: dict[str, str]) -> None:
    set_allocator_defaults(before, version)
    assert before == after
