"""Scores of a trained run: the same on any ranks and after an interruption, and equal to a plain second computation."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.plain_inference import PlainClient
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank
Question = tuple[int, str, int]
"""Client, task, row."""
SIZES, NUM_TEST, NUM_REFERENCES, NEW_TOKENS = (7, 5, 9, 6), 3, 6, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS, UNSEEN = ("animal2", "colour0", "count1", "verb3"), ("which cat sings", "b")


def evaluate_on_rank(job: Any, argv: Sequence[str]) -> str:
    """The evaluation that `launch/evaluate.py` starts with the arguments `argv`; the folder of the report."""
    from dpa_ds.cli.evaluate import load
    from dpa_ds.evaluation.runner import evaluate

    return str(evaluate(load(argv), job) or "")


@dataclass(frozen=True)
class Run:
    """A trained run, the base it was trained over and its data."""

    folder: Path
    model: Path
    data: Path

    def evaluate(
        self, tmp_path: Path, *options: str, num_ranks: int = 1, beams: int = 1, new_tokens: int = NEW_TOKENS
    ) -> Path:
        """Folder of the report."""
        argv = ["--run", str(self.folder), f"--beams={beams}", f"--max_new_tokens={new_tokens}", *options]
        (report,) = set(run_on_ranks(evaluate_on_rank, num_ranks, tmp_path, argv)) - {""}
        return Path(report)

    def copy(self, tmp_path: Path) -> "Run":
        return Run(shutil.copytree(self.folder, tmp_path / "runs" / "tiny", symlinks=True), self.model, self.data)

    @property
    def test_rows(self) -> list[tuple[str, int, str]]:
        """Task, position in the task, instruction."""
        rows = [json.loads(line) for line in (self.data / "test.jsonl").read_text().splitlines()]
        earlier = [[other["category"] for other in rows[:k]].count(row["category"]) for k, row in enumerate(rows)]
        return [(row["category"], k, row["instruction"]) for row, k in zip(rows, earlier, strict=True)]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Trains four clients, two on each of two ranks, well enough that adapters change answers."""
    folder = tmp_path_factory.mktemp("trained")
    model = tiny.make_model(folder / "model", tie_word_embeddings=False)
    data = tiny.make_federation(folder / "data", SIZES, NUM_TEST)

    def train(name: str, **overrides: Any) -> Run:
        settings = {
            "name": name,
            "data__template": "{instruction}",
            "lora__local_rank": 2,
            "lora__target_modules": TARGETS,
            "method__alpha": 0.4,
            "train__max_steps": 20,
            "train__learning_rate": 3e-2,
            "federation__aggregation_weights": "num_examples",
            "weighting__num_references": NUM_REFERENCES,
            "evaluation__every_rounds": 0,
        }
        argv = tiny.recipe(model, data, folder / f"{name}_runs", **{**settings, **overrides})
        run_on_ranks(train_on_rank, 2, folder, argv)
        return Run(folder / f"{name}_runs" / name, model, data)

    return train


@pytest.fixture(scope="module")
def run(train: Callable[..., Run]) -> Run:
    return train("tiny")


@pytest.fixture(scope="module")
def greedy(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of all clients on all instances, with the default weighting, by one rank."""
    return run.evaluate(tmp_path_factory.mktemp("greedy"))


def parse(report: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Answers of all files, and lines that are none."""
    parsed, broken = [], []
    for path in sorted((report.parent / "answers").iterdir()):
        for line in path.read_text().splitlines():
            try:
                parsed.append(json.loads(line))
            except json.JSONDecodeError:
                broken.append(line)
    return parsed, broken


def answers(report: Path) -> dict[Question, tuple[float, str]]:
    """Alpha and text to each question, none of which was answered twice."""
    parsed, _ = parse(report)
    keyed = {(a["client"], a["task"], a["row"]): (a["alpha"], a["text"]) for a in parsed}
    assert len(keyed) == len(parsed), "a question was answered twice"
    return keyed


def summary(report: Path) -> dict[str, Any]:
    return dict(json.loads((report / "summary.json").read_text()))


def assert_same(found: dict[Question, tuple[float, str]], expected: dict[Question, tuple[float, str]]) -> None:
    """The same texts; batches may differ, and with them the last bit of a weight."""
    assert found.keys() == expected.keys()
    for question, (alpha, text) in expected.items():
        assert found[question] == (pytest.approx(alpha, abs=1e-6), text), question


# ---- against plain transformers and PEFT ----------------------------------------------------------------------


@cache
def plain_client(run: Run, client: int) -> PlainClient:
    return PlainClient(run.model, run.folder / "adapters", client)


def test_without_weighting_the_base_alone_answers(run: Run, greedy: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tokenizer = AutoModelForCausalLM.from_pretrained(run.model), AutoTokenizer.from_pretrained(run.model)
    report = run.evaluate(tmp_path, "--weighting=none", "--instances=2")
    found = answers(report)
    asked = [row for row in run.test_rows if row[1] < 2]
    assert len(found) == len(SIZES) * len(asked)
    num_changed = 0
    for task, row, instruction in asked:
        prompt = tokenizer(instruction, return_tensors="pt")
        tokens = base.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        for client in range(len(SIZES)):
            assert found[client, task, row] == (0.0, text)
            num_changed += answers(greedy)[client, task, row][1] != text
    assert num_changed, "the adapters change answers"
    assert summary(report)["settings"]["weighting"] == "no adapter, the base alone"


@pytest.mark.parametrize(("kind", "scale", "representation", "beams"), [
    ("centred_cosine", 1.0, "last_token", 1),
    ("centred_cosine", 6.0, "last_token", 2),
    ("cosine", 4.0, "last_token", 2),
    ("cosine", 0.5, "mean", 1),
])  # fmt: skip
def test_alphas_and_answers_equal_a_plain_computation(
    run: Run, greedy: Path, tmp_path: Path, kind: str, scale: float, representation: str, beams: int
) -> None:
    """Answers with weight 0 are computed once for all clients: they too are compared with each client's own."""
    options = [f"--weighting={kind}", f"--lambda={scale}", f"--weighting.representation={representation}"]
    default = (kind, scale, beams) == ("centred_cosine", 1.0, 1)
    found = answers(greedy if default else run.evaluate(tmp_path, *options, beams=beams))
    assert len(found) == len(SIZES) * len(run.test_rows)
    for client in range(len(SIZES)):
        plain = plain_client(run, client)
        for task, row, instruction in run.test_rows:
            alpha, text = found[client, task, row]
            expected = plain.alpha(instruction, kind, scale, representation)
            assert alpha == pytest.approx(expected, abs=1e-5), (client, task, row)
            assert text == plain.answer(instruction, expected, beams, NEW_TOKENS), (client, task, row, alpha)
    # What would make the comparison say little: weights that do not vary, or answers that do not depend on them.
    alphas = [alpha for alpha, _ in found.values()]
    assert max(alphas) - min(alphas) > 0.1
    texts = [{found[c, task, row][1] for c in range(len(SIZES))} for task, row, _ in run.test_rows]
    assert sum(len(different) > 1 for different in texts) >= 5
    if kind == "centred_cosine":
        assert 0 < alphas.count(0.0) < len(alphas)
        assert (1.0 in alphas) == (scale == 6.0)


def test_with_rslora_answers_equal_those_of_peft(train: Callable[..., Run], tmp_path: Path) -> None:
    """Adapters of rank 4 and 2, at the scales that PEFT makes of their adapter_config.json."""
    run = train("rslora", lora__scaling="rslora")
    configs = [
        json.loads((run.folder / "adapters" / name / "adapter_config.json").read_text())
        for name in ("global", "local/client_00")
    ]
    assert [config["use_rslora"] for config in configs] == [True, True]
    assert [config["lora_alpha"] for config in configs] == [8.0, pytest.approx(8.0 * (2 / 4) ** 0.5)]
    found = answers(run.evaluate(tmp_path, "--weighting=fixed", "--alpha=0.3", "--clients=0,2"))
    for client in (0, 2):
        plain = plain_client(run, client)
        for task, row, instruction in run.test_rows:
            assert found[client, task, row] == (pytest.approx(0.3), plain.answer(instruction, 0.3, 1, NEW_TOKENS))
    assert len({text for _, text in found.values()}) >= 5


def test_references_and_the_reference_mean_of_the_federation(run: Run) -> None:
    """Prompts of the client's own examples, their embeddings by the base, and the mean of these, weighted by examples."""
    means = []
    for client, size in enumerate(SIZES):
        plain = plain_client(run, client)
        rows = json.loads((run.data / "4" / f"local_training_{client}.json").read_text())
        prompts = [plain.tokenizer.decode(tokens) for tokens in plain.references]
        assert len(set(prompts)) == len(prompts) == min(NUM_REFERENCES, size)
        assert set(prompts) <= {row["instruction"] for row in rows}
        expected = torch.stack([plain.embed(tokens, "none") for tokens in plain.references], dim=1)
        torch.testing.assert_close(plain.stored_embeddings, expected, rtol=0, atol=1e-5)
        means.append(expected.mean(dim=1))
    stored = plain_client(run, 0).reference_mean
    by_examples = sum(size * mean for size, mean in zip(SIZES, means, strict=True)) / sum(SIZES)
    torch.testing.assert_close(stored, by_examples, rtol=0, atol=1e-5)
    assert float((stored - sum(means) / len(means)).norm()) > 0.1, "not the mean over clients alike"


# ---- ranks, interruptions, parts ------------------------------------------------------------------------------


def with_unseen_task(run: Run, tmp_path: Path) -> str:
    """The run's test data, and a task that nobody trained on: one of its prompts is a single token."""
    rows = [{"instruction": text, "output": "cat", "task": "riddle", "category": "riddle"} for text in UNSEEN]
    known = (run.data / "test.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text(known + "".join(json.dumps(row) + "\n" for row in rows))
    return f"--data.test_path={tmp_path / 'more.jsonl'}"


def test_ranks_and_zero3_change_nothing(run: Run, tmp_path: Path) -> None:
    """With embeddings by the local adapter. Of the riddles the second rank of the partitioned base gets one token only."""
    options = [with_unseen_task(run, tmp_path), "--clients=1,3", "--tasks=count1,riddle"]
    options += ["--weighting=cosine", "--lambda=8"]
    layouts = {"one": (1, []), "three": (3, []), "zero3": (2, ["--evaluation.sharding=always"])}
    reports = {
        name: run.copy(tmp_path / name).evaluate(tmp_path, *options, *more, num_ranks=num_ranks, beams=2, new_tokens=4)
        for name, (num_ranks, more) in layouts.items()
    }
    expected = answers(reports["one"])
    assert len(expected) == 2 * (NUM_TEST + len(UNSEEN))
    assert 0 < sum(alpha == 0 for alpha, _ in expected.values()) < len(expected) / 2
    for name in ("three", "zero3"):
        assert answers(reports[name]) == expected, name
        assert summary(reports[name]) == summary(reports["one"]), name
    second = [
        json.loads(line) for line in (reports["zero3"].parent / "answers/rank_0001.jsonl").read_text().splitlines()
    ]
    riddles = {(answer["client"], answer["row"]) for answer in second if answer["task"] == "riddle"}
    assert riddles == {(1, 1), (3, 1)}
    ones, between = [expected[3, "count1", row][0] for row in (0, 2)], expected[3, "count1", 1][0]
    assert ones == [1.0, 1.0], "the local adapter alone answers all that the first rank has"
    assert 0 < between < 1, "and the second rank has a mix"


def test_ranks_and_zero3_sample_the_same_answers(run: Run, tmp_path: Path) -> None:
    """And the report says how, in a folder of its own for each seed."""
    options = ["--clients=1,3", "--tasks=count1,colour0", "--temperature=1.5", "--top_p=0.95"]
    layouts = {"one": (1, []), "three": (3, []), "zero3": (2, ["--evaluation.sharding=always"])}
    reports = {
        name: run.copy(tmp_path / name).evaluate(tmp_path, *options, *more, num_ranks=num_ranks)
        for name, (num_ranks, more) in layouts.items()
    }
    expected = answers(reports["one"])
    for name in ("three", "zero3"):
        assert answers(reports[name]) == expected, name
    assert summary(reports["one"])["settings"]["sampling"] == "temperature 1.5, top_k 0, top_p 0.95, seed 0"
    assert "temperature 1.5" in (reports["one"] / "report.md").read_text()
    again = Run(tmp_path / "one/runs/tiny", run.model, run.data)
    other = again.evaluate(tmp_path, *options, "--sampling_seed=1")
    assert other.parent != reports["one"].parent
    assert {key: text for key, (_, text) in answers(other).items()} != {k: text for k, (_, text) in expected.items()}


def test_an_interrupted_evaluation_resumes(run: Run, greedy: Path, tmp_path: Path) -> None:
    """By other ranks than before; the marked answer would be lost if what is there were computed again."""
    copy, expected = run.copy(tmp_path), answers(greedy)
    report = copy.folder / greedy.relative_to(run.folder)
    (path,) = (report.parent / "answers").iterdir()
    whole = path.read_text().splitlines(keepends=True)
    kept, cut = len(whole) // 2, whole[len(whole) // 2][:25]
    first = json.loads(whole[0])
    question = first["client"], first["task"], first["row"]
    expected[question] = first["alpha"], "marked"
    whole[0] = json.dumps({**first, "text": "marked"}) + "\n"
    path.write_text("".join(whole[:kept]) + cut)
    (report / "summary.json").unlink()

    assert copy.evaluate(tmp_path, num_ranks=2) == report
    assert_same(answers(report), expected)
    assert parse(report)[1] == [cut]
    assert path.read_text().startswith("".join(whole[:kept]) + cut + "\n")
    assert len(summary(report)["clients"]) == len(SIZES)


def test_a_part_first_and_the_rest_later(run: Run, greedy: Path, tmp_path: Path) -> None:
    """All parts share the answers, and a report on less does not replace one on more. Nor does another name matter."""
    copy, expected = run.copy(tmp_path), answers(greedy)
    shutil.rmtree(copy.folder / "evaluations")
    part = copy.evaluate(tmp_path, "--clients=client_0,animal2", "--tasks=verb3,colour0", "--instances=2")
    assert part.name == "clients_0+2-tasks_colour0+verb3-first_2"
    asked = answers(part)
    assert asked.keys() == {(c, task, row) for c in (0, 2) for task in ("colour0", "verb3") for row in range(2)}
    assert [client["client"] for client in summary(part)["clients"]] == [0, 2]
    before = {path: path.read_text() for path in (part.parent / "answers").iterdir()}

    renamed = Run(copy.folder.rename(copy.folder.with_name("renamed")), copy.model, copy.data)
    before = {renamed.folder / path.relative_to(copy.folder): text for path, text in before.items()}
    part, whole = renamed.folder / part.relative_to(copy.folder), renamed.evaluate(tmp_path)
    assert whole == part.with_name("all"), "the same settings: the same evaluation"
    assert {path: path.read_text()[: len(text)] for path, text in before.items()} == before
    found, of_all = answers(whole), summary(whole)
    assert_same(found, expected)
    assert of_all["TTP"] == summary(greedy)["TTP"]

    less = renamed.evaluate(tmp_path, "--tasks=verb3")
    assert answers(less) == found, "nothing is computed"
    assert [task["task"] for task in summary(less)["tasks"]] == ["verb3"]
    assert summary(whole) == of_all
    assert [client["client"] for client in summary(part)["clients"]] == [0, 2]


# ---- what counts ----------------------------------------------------------------------------------------------


def test_unseen_tasks_count_apart(run: Run, greedy: Path, tmp_path: Path) -> None:
    report = run.copy(tmp_path).evaluate(tmp_path, with_unseen_task(run, tmp_path))
    with_unseen, without = summary(report), summary(greedy)
    assert with_unseen["P"] == without["P"]
    assert with_unseen["TTP"] == without["TTP"]
    assert without["TTP"]["rouge1"]["mean"] > 1.0, "else equal scores say nothing"
    assert without.get("UNSEEN") is None
    assert 0 <= with_unseen["UNSEEN"]["rouge1"]["mean"] <= 100
    evaluation_set = answers(report).keys() - answers(greedy).keys()
    assert evaluation_set == {(c, "riddle", row) for c in range(4) for row in range(len(UNSEEN))}


def test_a_client_that_was_never_sampled_uses_the_global_adapter(train: Callable[..., Run], tmp_path: Path) -> None:
    partly = train("partly", federation__client_fraction=0.5, federation__num_rounds=1, train__max_steps=5)
    folders = [partly.folder / f"adapters/local/client_{client:02d}" for client in range(len(SIZES))]
    steps = [json.loads((folder / "state.json").read_text())["info"]["steps_taken"] for folder in folders]
    absent = {client for client in range(len(SIZES)) if steps[client] == {"global": 0, "local": 0}}
    assert len(absent) == 2
    for kind in ("cosine", "local"):
        found = answers(partly.evaluate(tmp_path, f"--weighting={kind}", "--instances=1"))
        for client in range(len(SIZES)):
            alphas = [found[client, task, 0][0] for task in TASKS]
            assert (set(alphas) == {0.0}) == (client in absent), (kind, client, alphas)
            assert kind == "cosine" or client in absent or set(alphas) == {1.0}
        for task, row, instruction in partly.test_rows:
            if row == 0:
                expected = plain_client(partly, 0).answer(instruction, 0.0, 1, NEW_TOKENS)
                assert {found[client, task, 0][1] for client in absent} == {expected}
