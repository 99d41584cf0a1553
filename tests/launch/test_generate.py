"""launch/generate.py as a user starts it: one prompt, a file, a conversation; the same answers as the evaluation's."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.processes import PYTHON, Ended, beside_python, free_port, run, type_into
from tests.plain_inference import PlainClient
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.launch
GENERATE = [PYTHON, "launch/generate.py"]
AND_LIST_IMPORTS = """
import atexit, runpy, sys

def list_imports():
    print("imported:", sorted({"deepspeed", "torchft", "mpi4py", "torch"} & sys.modules.keys()))

atexit.register(list_imports)  # the script ends with sys.exit
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A Python program that runs the script of its first argument, and lists which of these libraries that took."""


@pytest.fixture(scope="module")
def run_dir(model: Path, federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_on_ranks(train_on_rank, 1, folder, tiny.recipe(model, federation, folder / "runs", train__local_epochs=8.0))
    return folder / "runs" / "tiny"


def generate(run_dir: Path, *more: str) -> Ended:
    return run([*GENERATE, "--run", str(run_dir), "--max_new_tokens", "8", *more])


def json_lines(ended: Ended) -> list[dict[str, object]]:
    return [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]


def test_a_file_of_prompts_gives_json_lines_as_the_evaluation_answers(
    run_dir: Path, federation: Path, tmp_path: Path
) -> None:
    ended = generate(run_dir, "--client", "1", "--input", str(federation / "test.jsonl"))
    assert ended.returncode == 0, ended.output
    lines = json_lines(ended)
    rows = [json.loads(line) for line in (federation / "test.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row["instruction"] for row in rows]

    ended = run([PYTHON, "launch/evaluate.py", "--run", str(run_dir), "--beams=1", "--max_new_tokens=8", "--clients=1"])
    assert ended.returncode == 0, ended.output
    answers = [
        json.loads(line)
        for path in run_dir.glob("evaluations/*/answers/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    expected = {(a["task"], a["row"]): a for a in answers}
    seen: dict[str, int] = {}
    for row, line in zip(rows, lines, strict=True):
        number = seen.setdefault(row["category"], 0)
        seen[row["category"]] += 1
        answer = expected[row["category"], number]
        assert (line["answer"], line["alpha"]) == (answer["text"], pytest.approx(answer["alpha"], abs=1e-6))
    assert len({line["alpha"] for line in lines}) > 1, "one weight for all shows nothing"

    # the same prompt alone: streamed, and with its weight
    streamed = generate(run_dir, "--client", "1", "--prompt", rows[0]["instruction"])
    assert streamed.returncode == 0, streamed.output
    assert f"[alpha {lines[0]['alpha']:.3f}: local adapter" in streamed.output


def test_sampled_answers_depend_on_seed_and_prompt_alone(run_dir: Path, tmp_path: Path) -> None:
    """From a file, streamed and typed; greedy answers are others."""
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\nred cat\n")
    from_file = ["--client", "1", "--input", str(tmp_path / "prompts.txt")]
    sampled = ["--temperature", "1.5", "--top_k", "100", "--top_p", "0.95"]
    found = {}
    for name, options in {"greedy": [], "seed 0": sampled, "seed 5": [*sampled, "--sampling_seed", "5"]}.items():
        ended = generate(run_dir, *from_file, *options)
        assert ended.returncode == 0, ended.output
        found[name] = [str(line["answer"]) for line in json_lines(ended)]
        assert found[name][0] == found[name][2], "the same prompt, wherever it stands"
    assert len(set(map(tuple, found.values()))) == 3
    command = [*GENERATE, "--run", str(run_dir), "--client", "1", "--max_new_tokens", "8", *sampled]
    ended = type_into(command, "blue dog\nred cat\n\n")
    assert ended.returncode == 0, ended.stderr
    for answer in found["seed 0"][:2]:
        assert answer in ended.stdout


def test_one_process_needs_no_deepspeed(run_dir: Path, model: Path, federation: Path, tmp_path: Path) -> None:
    """Neither for one answer, which is a plain computation's, nor for an evaluation."""
    command = [PYTHON, "-c", AND_LIST_IMPORTS]
    rows = [json.loads(line) for line in (federation / "test.jsonl").read_text().splitlines()]
    prompts = [row["instruction"] for row in rows[:3]]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    options = ["--run", str(run_dir), "--max_new_tokens", "8"]
    ended = run([*command, "launch/generate.py", *options, "--client", "1", "--input", str(tmp_path / "prompts.txt")])
    assert ended.returncode == 0, ended.output
    assert "imported: ['torch']" in ended.output
    plain = PlainClient(model, run_dir / "adapters", 1)
    lines = json_lines(ended)
    assert len(lines) == len(prompts)
    for prompt, line in zip(prompts, lines, strict=True):
        alpha = plain.alpha(f"{prompt} = ", "centred_cosine", 1.0, "last_token")
        assert line["alpha"] == pytest.approx(alpha, abs=1e-5)
        assert line["answer"] == plain.answer(f"{prompt} = ", alpha, beams=1, new_tokens=8)

    ended = run([*command, "launch/evaluate.py", *options, "--instances", "1", "--beams", "2"])
    assert ended.returncode == 0, ended.output
    assert "imported: ['torch']" in ended.output


def test_a_conversation_ends_with_an_empty_line(run_dir: Path) -> None:
    command = [*GENERATE, "--run", str(run_dir), "--client", "0", "--beams", "2", "--max_new_tokens", "4"]
    ended = type_into(command, f"red cat\n{'red ' * 5000}\nblue dog\n\nnot asked\n")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("[alpha ") == 2
    assert ended.stdout.count("lower generation.max_new_tokens, or shorten or remove it\n> ") == 1
    assert ended.stdout.startswith("client_0 colour0 after round 2, centred_cosine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--client must be the id or name of a client such as 0, got 'nothing'"),
        (["--client", "7"], "has no client 7: its clients are 0 (client_0 colour0), 1 (client_1 count1)"),
        (["--client", "0", "--prompt", " "], "--prompt is empty: write a question"),
        (["--client", "0", "--prompt", "red " * 5000], "context of 192: lower generation.max_new_tokens, or shorten"),
        (["--client", "0", "--prompt", "x", "--input", "y"], "--prompt and --input exclude one another"),
        (["--client", "0", "--chat", "--prompt", "x"], "--chat is for what you type: leave it out"),
        (["--client", "0", "--chat"], "--chat and --system need the model's chat template, but this run was trained"),
        (["--client", "0", "--temperature", "1", "--beams", "2"], "samples one answer, and generation.num_beams 2"),
        (["--client", "0", "--top_p", "0.9"], "generation.top_p 0.9 has no effect with generation.temperature 0"),
        (["--client", "0", "--chat=yes"], "--chat is a flag: --chat, or --chat=false, got 'yes'"),
        (["--client", "0", "--input", "no_such.txt"], "no_such.txt: no such file or folder"),
        (["--client", "0", "--input", "hostfile.example", "--weighting", "dot"], "weighting.kind must be one of auto,"),
    ],
)
def test_bad_input(run_dir: Path, options: list[str], message: str) -> None:
    ended = generate(run_dir, *options)
    assert ended.returncode == 2, ended.output
    (error,) = ended.errors
    assert message in error
    assert ended.num_tracebacks == 0


def test_more_ranks_than_one_are_refused(run_dir: Path) -> None:
    launcher = [beside_python("deepspeed"), "--master_port", str(free_port())]
    command = [*launcher, *GENERATE[1:], "--run", str(run_dir), "--client", "0", "--prompt", "x"]
    ended = run(command, LOCAL_SIZE="2")
    assert ended.returncode == 3, ended.output
    (error,) = ended.errors
    assert "launch/generate.py is one process: start it with python, without a launcher" in error
