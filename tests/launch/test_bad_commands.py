"""Bad commands on a trained run, and runs that cannot be used: refused in one line, the run stays as it is."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch.bad_input import (
    LAST,
    Case,
    Place,
    change_json,
    cut,
    fifo,
    link,
    make_run,
    not_finite,
    other_rank,
    refuse,
    remove,
    resealed,
    write,
)

pytestmark = pytest.mark.launch
ADAPTER = f"{LAST}/global/adapter_model.safetensors"
RUN = ("--run", "{run}")
CLIENT = (*RUN, "--client", "0")
GENERATE = (*CLIENT, "--prompt", "red")


def evaluation(name: str, says: str | tuple[str, ...], *arguments: str, exit_code: int = 2, **more: Any) -> Case:
    return Case(name, says, arguments or RUN, exit_code=exit_code, program="launch/evaluate.py", **more)


def generation(name: str, says: str | tuple[str, ...], *arguments: str, exit_code: int = 2, **more: Any) -> Case:
    return Case(name, says, arguments or GENERATE, exit_code=exit_code, program="launch/generate.py", **more)


def comparison(name: str, says: str | tuple[str, ...], *arguments: str, exit_code: int = 2, **more: Any) -> Case:
    return Case(name, says, arguments, exit_code=exit_code, program="launch/compare.py", **more)


EVALUATIONS = [
    evaluation("no run named", "no run: give one with --run runs/NAME", "--alpha", "0.5"),
    evaluation(
        "no such run",
        ("--run {root}/other: no such run", "give a folder that launch/run.py wrote"),
        "--run",
        "{root}/other",
    ),
    evaluation(
        "mistyped run", ("--run {root}/runs/tin: no such run", "runs beside it: tiny"), "--run", "{root}/runs/tin"
    ),
    evaluation("run is a file", "--run {recipe}: no such run", "--run", "{recipe}"),
    evaluation("run in a symlink loop", "--run {run}: no such run", spoil=link("runs/tiny", "tiny")),
    evaluation("no round", "{run} has no complete round yet: train it", spoil=remove("runs/tiny/rounds"), exit_code=4),
    evaluation(
        "no such client",
        "{run} has no client 9: its clients are 0 (client_0 colour0), 1 (client_1 count1)",
        *RUN,
        "--clients",
        "0,9",
    ),
    evaluation("no such task", "the test data has no task ['verse']: its tasks are", *RUN, "--tasks", "verse"),
    evaluation(
        "trained with another value",
        "was trained with another value (lora.rank: 4 -> 8): leave that option out",
        *RUN,
        "--lora.rank",
        "8",
    ),
    evaluation(
        "unknown option of evaluate", "--color is not an option; options are --run, --weighting", *RUN, "--color", "red"
    ),
    evaluation(
        "alpha of no number",
        "weighting.scale must be a number or null",
        *RUN,
        "--weighting",
        "fixed",
        "--alpha",
        "half",
    ),
    evaluation(
        "alpha above 1",
        "weighting.scale must be in [0, 1] with weighting.kind fixed, got 1.5",
        *RUN,
        "--weighting",
        "fixed",
        "--alpha",
        "1.5",
    ),
    evaluation("alpha that has no effect", "--alpha is the weight of --weighting fixed", *RUN, "--alpha", "0.5"),
    evaluation("model is gone", "say where it is with --model.path", spoil=remove("model")),
    evaluation(
        "adapter damaged",
        ("{root}/" + ADAPTER + " is damaged (checksum differs): delete {root}/" + LAST,),
        spoil=cut(ADAPTER, 1),
        exit_code=4,
    ),
    evaluation(
        "adapter of NaN", ("has NaN or infinity in", "delete {root}/" + LAST), spoil=resealed(not_finite), exit_code=4
    ),
    evaluation(
        "adapter of rank 8",
        ("the saved global adapter does not fit", "expected (4, 32): set model.path and lora.*"),
        spoil=resealed(other_rank),
    ),
    evaluation(
        "client's adapter of rank 8",
        ("the saved local adapter does not fit", "expected (4, 32): set model.path and lora.*"),
        spoil=resealed(other_rank, "local/client_01"),
    ),
    evaluation(
        "client's state.json of zero bytes",
        "/local/client_01 cannot be read",
        spoil=write(f"{LAST}/local/client_01/state.json", ""),
        exit_code=4,
    ),
    evaluation(
        "client's state.json changed",
        ("/local/client_00/state.json is damaged", "delete {root}/" + LAST),
        spoil=change_json(f"{LAST}/local/client_00/state.json", info={}),
        exit_code=4,
    ),
    evaluation("answers too long", "lower generation.max_new_tokens", *RUN, "--max_new_tokens", "500"),
    evaluation(
        "no held-out data",
        "evaluation.split held_out needs a run that was trained with data.held_out_fraction",
        *RUN,
        "--split",
        "held_out",
    ),
]

GENERATIONS = [
    generation("no client named", "--client must be the id or name of a client such as 0, got 'nothing'", *RUN),
    generation(
        "client in words",
        "{run} has no client first: its clients are 0 (client_0 colour0), 1 (client_1 count1)",
        *RUN,
        "--client",
        "first",
    ),
    generation(
        "client 9",
        "{run} has no client 9: its clients are 0 (client_0 colour0), 1 (client_1 count1)",
        *RUN,
        "--client",
        "9",
        "--prompt",
        "red",
    ),
    generation(
        "two sources", "--prompt and --input exclude one another: leave one out", *GENERATE, "--input", "{recipe}"
    ),
    generation("no such input", "{root}/prompts.txt: no such file or folder", *CLIENT, "--input", "{root}/prompts.txt"),
    generation(
        "input of zero bytes",
        "{root}/prompts.txt: no prompts: write one a line",
        *CLIENT,
        "--input",
        "{root}/prompts.txt",
        spoil=write("prompts.txt", ""),
    ),
    generation(
        "input in invalid UTF-8",
        "{root}/prompts.txt: byte 0 is not UTF-8: convert",
        *CLIENT,
        "--input",
        "{root}/prompts.txt",
        spoil=write("prompts.txt", b"\xff\n"),
    ),
    generation("input is a folder", "{data}: cannot be read", *CLIENT, "--input", "{data}"),
    generation(
        "input is a pipe",
        "{root}/prompts.txt: is a pipe, not a file",
        *CLIENT,
        "--input",
        "{root}/prompts.txt",
        spoil=fifo("prompts.txt"),
    ),
    generation(
        "input without column",
        "{root}/prompts.jsonl:1: no column 'instruction'",
        *CLIENT,
        "--input",
        "{root}/prompts.jsonl",
        spoil=write("prompts.jsonl", '{"a": 1}'),
    ),
    generation("endless beams", "generation.num_beams must be >= 1", *GENERATE, "--beams", "0"),
    generation("prompt longer than the context", ("context of 192", "shorten"), *CLIENT, "--prompt", "red " * 1000),
]

COMPARISONS = [
    comparison("unknown method", "--methods ['fedavg'] are unknown: choose among", "--methods", "fedavg"),
    comparison("seed in words", "--seeds and --tuning_instances are whole numbers", "--seeds", "one"),
    comparison("negative seed to compare", "seed must be >= 0, got -1", "--methods", "fedit", "--seeds=-1"),
    comparison("unknown weighting", "--weightings", "--weightings", "magic"),
    comparison("scale in words", "--weightings cosine:many: scales are numbers", "--weightings", "cosine:many"),
    comparison(
        "scale that is no number",
        "--weightings fixed:nan: scales of fixed must be in [0, 1]",
        "--weightings",
        "fixed:nan",
    ),
    comparison("no instances to choose by", "--tuning_instances must be >= 1, got 0", "--tuning_instances", "0"),
    comparison("nothing held out", "data.held_out_fraction is 0: set it", "--weightings", "cosine:1|2"),
    comparison("tasks that nobody trains on", "the test data has no task ['verse']", "--evaluation.tasks", "[verse]"),
]


@pytest.mark.parametrize("case", [*EVALUATIONS, *GENERATIONS, *COMPARISONS], ids=str)
def test_refused(case: Case, tmp_path: Path, trained: Place) -> None:
    refuse(case, make_run(tmp_path, trained))
