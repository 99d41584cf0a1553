"""Scores of a trained run: the same on any ranks and after an interruption, and equal to a plain second computation."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank
Question = tuple[int, str, int]
"""Client, task, row."""
SIZES, NUM_TEST, NUM_REFERENCES, NEW_TOKENS = (7, 5, 9, 6), 3, 6, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNSEEN = ("which cat sings", "b")


def evaluate_on_rank(job: Any, argv: Sequence[str]) -> str:
    """The evaluation that `launch/evaluate.py` starts with the arguments `argv`; the folder of the report."""
    from dpa_ds.evaluate import evaluate
    from dpa_ds.run_arguments import load_run_config

    return str(evaluate(load_run_config(argv, ""), job))


@dataclass(frozen=True)
class Run:
    """A trained run, the base it was trained over and its data."""

    folder: Path
    model: Path
    data: Path

    def evaluate(self, tmp_path: Path, *options: str, num_ranks: int = 1, beams: int = 1) -> Path:
        """Folder of the report."""
        argv = ["--run", str(self.folder), f"--beams={beams}", f"--max_new_tokens={NEW_TOKENS}", *options]
        (report,) = set(run_on_ranks(evaluate_on_rank, num_ranks, tmp_path, argv))
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
            "federation__weighting": "num_examples",
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


def lines(report: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((report / "answers").iterdir()):
        for line in path.read_text().splitlines():
            yield json.loads(line)


def answers(report: Path) -> dict[Question, tuple[float, str]]:
    """Alpha and text to each question, none of which was answered twice."""
    found = list(lines(report))
    keyed = {(a["client"], a["task"], a["row"]): (a["alpha"], a["text"]) for a in found}
    assert len(keyed) == len(found), "a question was answered twice"
    return keyed


def summary(report: Path) -> dict[str, Any]:
    return dict(json.loads((report / "summary.json").read_text()))


# ---- against plain transformers and PEFT ----------------------------------------------------------------------


class Plain:
    """One client, one prompt at a time: the base, the run's files, and nothing of this package."""

    def __init__(self, run: Run, client: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(run.model)
        self.adapters, self.directory = run.folder / "adapters", run.model
        self.local_dir = self.adapters / "local" / f"client_{client:02d}"
        load = partial(peft.PeftModel.from_pretrained, autocast_adapter_dtype=False)
        self.encoders = {"none": self._base(), "local": load(self._base(), self.local_dir).eval()}
        self.model = load(self._base(), self.adapters / "global", adapter_name="global").eval()
        self.model.load_adapter(self.local_dir, adapter_name="local", autocast_adapter_dtype=False)
        self.model.base_model.set_adapter(["global", "local"])
        stored = load_file(self.local_dir / "references.safetensors")
        self.stored_states = {name: stored[f"states.{name}"] for name in ("last_token", "mean")}
        self.references = [part.tolist() for part in stored["tokens"].split(stored["lengths"].tolist())]
        self.mean_states = load_file(self.adapters / "global" / "mean_states.safetensors")["mean_states"]

    def _base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()

    def tokens(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt)["input_ids"])

    @torch.no_grad()
    def states(self, tokens: Sequence[int], encoder: str) -> tuple[torch.Tensor, torch.Tensor]:
        """At the last token, and the mean over tokens."""
        output = self.encoders[encoder](input_ids=torch.tensor([list(tokens)]), output_hidden_states=True)
        return output.hidden_states[-1][0, -1], output.hidden_states[-1][0].mean(dim=0)

    def alpha(self, prompt: str, kind: str, scale: float, representation: int) -> float:
        encoder = "local" if kind == "cosine" else "none"
        centre = self.mean_states[representation] if kind == "centred_cosine" else 0.0
        state = self.states(self.tokens(prompt), encoder)[representation] - centre
        cosines = [
            float(torch.cosine_similarity(state, self.states(tokens, encoder)[representation] - centre, dim=0))
            for tokens in self.references
        ]
        return min(max(scale * sum(cosines) / len(cosines), 0.0), 1.0)

    @torch.no_grad()
    def answer(self, prompt: str, alpha: float, beams: int) -> str:
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                for name, weight in (("global", 1 - alpha), ("local", alpha)):
                    lora = self.model.peft_config[name]
                    layer.scaling[name] = weight * lora.lora_alpha / lora.r
        ids = torch.tensor([self.tokens(prompt)])
        settings = {"max_new_tokens": NEW_TOKENS, "num_beams": beams, "do_sample": False}
        tokens = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return str(self.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@cache
def plain_client(run: Run, client: int) -> Plain:
    return Plain(run, client)


@pytest.mark.parametrize(("kind", "scale", "representation", "beams"), [
    ("centred_cosine", 1.0, 0, 1),
    ("centred_cosine", 6.0, 0, 2),
    ("cosine", 0.5, 0, 2),
    ("cosine", 0.7, 1, 1),
])  # fmt: skip
def test_alphas_and_answers_equal_a_plain_computation(
    run: Run, greedy: Path, tmp_path: Path, kind: str, scale: float, representation: int, beams: int
) -> None:
    """Answers with weight 0 are computed once for all clients: they too are compared with each client's own."""
    options = [f"--weighting={kind}", f"--lambda={scale}"]
    options += ["--weighting.representation=mean"] if representation else []
    default = (kind, scale, beams) == ("centred_cosine", 1.0, 1)
    found = answers(greedy if default else run.evaluate(tmp_path, *options, beams=beams))
    assert len(found) == len(SIZES) * len(run.test_rows)
    for client in range(len(SIZES)):
        plain = plain_client(run, client)
        for task, row, instruction in run.test_rows:
            alpha, text = found[client, task, row]
            expected = plain.alpha(instruction, kind, scale, representation)
            assert alpha == pytest.approx(expected, abs=1e-5), (client, task, row)
            assert text == plain.answer(instruction, expected, beams), (client, task, row, alpha)
    # What would make the comparison say little: weights that do not vary, or answers that do not depend on them.
    alphas = [alpha for alpha, _ in found.values()]
    assert max(alphas) - min(alphas) > 0.1
    texts = {(task, row): {found[c, task, row][1] for c in range(len(SIZES))} for task, row, _ in run.test_rows}
    assert sum(len(different) > 1 for different in texts.values()) >= 5
    if kind == "centred_cosine":
        assert 0 < alphas.count(0.0) < len(alphas)
        assert (1.0 in alphas) == (scale == 6.0)


def test_references_and_the_federations_mean_state(run: Run) -> None:
    """Prompts of the client's own examples, the base's states of them, and their mean weighted by examples."""
    means = []
    for client, size in enumerate(SIZES):
        plain = plain_client(run, client)
        rows = json.loads((run.data / "4" / f"local_training_{client}.json").read_text())
        prompts = [plain.tokenizer.decode(tokens) for tokens in plain.references]
        assert len(set(prompts)) == len(prompts) == min(NUM_REFERENCES, size)
        assert set(prompts) <= {row["instruction"] for row in rows}
        for i, name in enumerate(("last_token", "mean")):
            expected = torch.stack([plain.states(tokens, "none")[i] for tokens in plain.references])
            torch.testing.assert_close(plain.stored_states[name], expected, rtol=0, atol=1e-5)
        means.append(torch.stack([plain.stored_states[name].mean(dim=0) for name in ("last_token", "mean")]))
    stored = plain_client(run, 0).mean_states
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
    """The prompt of one token is all that one of the two ranks of the partitioned base gets of its piece."""
    options = [with_unseen_task(run, tmp_path), "--instances=2", "--max_new_tokens=4", "--beams=2"]
    reports = {
        layout: run.copy(tmp_path / layout).evaluate(tmp_path, *options, *more, num_ranks=num_ranks)
        for layout, num_ranks, more in (
            ("one", 1, []),
            ("three", 3, []),
            ("zero3", 2, ["--evaluation.sharding=always"]),
        )
    }
    expected = answers(reports["one"])
    assert len(expected) == 4 * (4 * 2 + 2)
    assert 0 < sum(alpha == 0 for alpha, _ in expected.values()) < len(expected)
    for layout in ("three", "zero3"):
        assert answers(reports[layout]) == expected, layout
        assert summary(reports[layout]) == summary(reports["one"]), layout
    by_rank = [path.read_text().count("\n") for path in sorted((reports["zero3"] / "answers").iterdir())]
    assert len(by_rank) == 2
    assert min(by_rank) > 10, "each answers its share"


def test_an_interrupted_evaluation_goes_on(run: Run, greedy: Path, tmp_path: Path) -> None:
    """By other ranks than before; the marked answer would be lost if what is there were computed again."""
    copy = run.copy(tmp_path)
    report = copy.folder / greedy.relative_to(run.folder)
    (path,) = (report / "answers").iterdir()
    whole = path.read_text().splitlines(keepends=True)
    kept = len(whole) // 2
    marked = {**json.loads(whole[0]), "text": "marked"}
    path.write_text(json.dumps(marked) + "\n" + "".join(whole[1:kept]) + whole[kept][:25])
    (report / "summary.json").unlink()

    assert copy.evaluate(tmp_path, num_ranks=2) == report
    parsed, broken = [], []
    for file in (report / "answers").iterdir():
        for line in file.read_text().splitlines():
            try:
                parsed.append(json.loads(line))
            except json.JSONDecodeError:
                broken.append(line)
    assert broken == [whole[kept][:25]]
    assert len(parsed) == len(whole) == 4 * 4 * NUM_TEST

    def order(answer: dict[str, Any]) -> Question:
        return answer["client"], answer["task"], answer["row"]

    assert sorted(parsed, key=order) == sorted([marked, *map(json.loads, whole[1:])], key=order)
    assert path.read_text().splitlines(keepends=True)[:kept] == [json.dumps(marked) + "\n", *whole[1:kept]]
    assert summary(report)["TTP"] != summary(greedy)["TTP"] or marked["text"] in (report / "report.md").read_text()


def test_a_part_first_and_the_rest_later(run: Run, greedy: Path, tmp_path: Path) -> None:
    copy, expected = run.copy(tmp_path), answers(greedy)
    shutil.rmtree(copy.folder / "evaluations")
    report = copy.evaluate(tmp_path, "--clients=0,2", "--tasks=colour0,verb3", "--instances=2")
    part = answers(report)
    assert part.keys() == {(c, task, row) for c in (0, 2) for task in ("colour0", "verb3") for row in range(2)}
    assert [client["client"] for client in summary(report)["clients"]] == [0, 2]
    before = {path: path.read_text() for path in (report / "answers").iterdir()}

    assert copy.evaluate(tmp_path) == report, "the same settings: the same evaluation"
    assert {path: path.read_text()[: len(text)] for path, text in before.items()} == before
    found = answers(report)
    assert found.keys() == expected.keys()
    for question, (alpha, text) in found.items():  # batches differ, and with them the last bit of a weight
        assert alpha == pytest.approx(expected[question][0], abs=1e-6)
        assert text == expected[question][1]
    assert summary(report)["TTP"] == summary(greedy)["TTP"]

    assert copy.evaluate(tmp_path, "--tasks=verb3") == report, "and less again: nothing is computed"
    assert answers(report) == found
    assert [task["task"] for task in summary(report)["tasks"]] == ["verb3"]


# ---- what counts ----------------------------------------------------------------------------------------------


def test_unseen_tasks_count_apart(run: Run, greedy: Path, tmp_path: Path) -> None:
    report = run.copy(tmp_path).evaluate(tmp_path, with_unseen_task(run, tmp_path))
    with_unseen, without = summary(report), summary(greedy)
    assert with_unseen["P"] == without["P"]
    assert with_unseen["TTP"] == without["TTP"]
    assert without["TTP"]["rouge1"]["mean"] > 1.0, "else equal scores say nothing"
    assert without.get("UNSEEN") is None
    assert 0 <= with_unseen["UNSEEN"]["rouge1"]["mean"] <= 100
    questions = answers(report).keys() - answers(greedy).keys()
    assert questions == {(c, "riddle", row) for c in range(4) for row in range(len(UNSEEN))}


@pytest.mark.parametrize("kind", ["cosine", "local"])
def test_a_client_that_was_never_drawn_uses_the_global_adapter(
    train: Callable[..., Run], tmp_path: Path, kind: str
) -> None:
    settings = {"federation__client_fraction": 0.5, "federation__num_rounds": 1, "train__max_steps": 5}
    partly = cached_run(train, **settings)
    found = answers(partly.evaluate(tmp_path, f"--weighting={kind}", "--instances=1"))
    steps = [
        json.loads((partly.folder / f"adapters/local/client_{c:02d}/state.json").read_text())["info"]["steps_taken"]
        for c in range(4)
    ]
    absent = {c for c in range(4) if steps[c] == {"global": 0, "local": 0}}
    assert len(absent) == 2
    for (client, task, row), (alpha, text) in found.items():
        if client in absent:
            assert alpha == 0.0
            assert text == plain_client(partly, client).answer(
                next(i for t, r, i in partly.test_rows if (t, r) == (task, row)), 0.0, 1
            )
    assert all(alpha > 0 for (client, _, _), (alpha, _) in found.items() if client not in absent)


@cache
def cached_run(train: Callable[..., Run], **settings: Any) -> Run:
    return train("partly", **settings)
