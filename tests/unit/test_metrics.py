"""Scores are the libraries' own, and the floors of the authors' test set are the known ones."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from dpa_ds.evaluation.answers import Instance
from dpa_ds.evaluation.metrics import (
    METRICS,
    best_floor,
    constant_floor,
    copy_floor,
    describe_floors,
    first_option_floor,
    score_answer,
)

DATASET1 = Path(__file__).parents[3] / "shared/data/feddpa/dataset1"
ROUGE = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
CHRF_SCORER = CHRF()

# Few different words, so that texts overlap; punctuation, other scripts and odd blanks as they come.
words = st.sampled_from(["the", "The", "cat", "cats", "sat", "can't", "3.5", "é", "中文", "-", "\n", "\u00a0"])
texts = st.lists(words, max_size=8).map(" ".join) | st.text(max_size=12)


@settings(deadline=None)
@given(prediction=texts, reference=texts)
def test_scores_are_the_libraries_own(prediction: str, reference: str) -> None:
    scores = score_answer(prediction, reference)
    rouge = ROUGE.score(target=reference, prediction=prediction)
    assert tuple(scores) == METRICS
    assert scores["rouge1"] == 100 * rouge["rouge1"].fmeasure
    assert scores["rougeL"] == 100 * rouge["rougeL"].fmeasure
    assert scores["chrf"] == CHRF_SCORER.sentence_score(prediction, [reference]).score
    assert scores["exact_match"] == (100 if prediction.strip() == reference.strip() else 0)
    assert all(0 <= score <= 100 + 1e-9 for score in scores.values())


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge1", "rouge_l", "exact"),
    [
        ("yes", "yes", 100, 100, 100),
        (" yes\n", "yes", 100, 100, 100),
        ("Yes.", "yes", 100, 100, 0),
        ("no", "yes", 0, 0, 0),
        ("", "yes", 0, 0, 0),
        ("", "", 0, 0, 100),
        ("...", "!?", 0, 0, 0),
        ("b a", "a b", 100, 50, 0),
        ("a a a", "a", 50, 50, 0),
        ("the cat", "the cat sat on", 200 / 3, 200 / 3, 0),
        ("cats", "cat", 0, 0, 0),  # no stemmer
        ("中文", "中文", 0, 0, 100),  # ROUGE knows a-z and 0-9 only
        ("café", "cafe", 0, 0, 0),
    ],
)
def test_hand_cases(prediction: str, reference: str, rouge1: float, rouge_l: float, exact: float) -> None:
    scores = score_answer(prediction, reference)
    assert (scores["rouge1"], scores["rougeL"], scores["exact_match"]) == pytest.approx((rouge1, rouge_l, exact))


def test_a_caller_may_change_what_it_got() -> None:
    score_answer("a", "a").clear()
    assert score_answer("a", "a")["rouge1"] == 100


def test_importing_the_module_imports_no_scorer() -> None:
    code = (
        "import sys, dpa_ds.evaluation.metrics; sys.exit(bool({'nltk', 'rouge_score', 'sacrebleu'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def plain_constant_floor(references: list[str]) -> float:
    """The highest mean rouge1 of a reference, by the library alone."""

    def mean(answer: str) -> float:
        return sum(ROUGE.score(r, answer)["rouge1"].fmeasure for r in references) * 100 / len(references)

    return max(map(mean, references))


@settings(deadline=None, max_examples=50)
@given(references=st.lists(texts, min_size=1, max_size=8))
def test_constant_floor_is_the_highest_by_the_library(references: list[str]) -> None:
    answer, scores = constant_floor(references)
    assert answer in references
    assert scores["rouge1"] == pytest.approx(plain_constant_floor(references), abs=1e-9)
    for metric in METRICS:
        plain = sum(score_answer(answer, reference)[metric] for reference in references) / len(references)
        assert scores[metric] == pytest.approx(plain)


def test_constant_floor_among_equals() -> None:
    assert constant_floor(["a", "b"])[0] == "a"
    assert constant_floor(["b", "a"])[0] == "b"
    assert constant_floor(["Yes", "no", "yes", "yes"])[0] == "yes"  # equal rouge1, but more often exact
    assert constant_floor(["!", "?"]) == ("!", pytest.approx({"rouge1": 0, "rougeL": 0, "exact_match": 50, "chrf": 50}))


def test_constant_floor_of_long_references_is_fast() -> None:
    references = [" ".join(f"w{(i * j * 7919) % 400}" for j in range(30)) for i in range(200)]
    start = process_time()
    constant_floor(references)
    assert process_time() - start < 2


def instance(instruction: str, reference: str, row: int = 0, task: str = "t") -> Instance:
    return Instance(task, row, instruction, reference)


def test_first_option() -> None:
    yes_no = "Is it?\nOPTIONS:\n- yes\n- no"
    assert first_option_floor([instance(yes_no, "yes"), instance(yes_no, "no", 1)]) == {
        "rouge1": 50,
        "rougeL": 50,
        "exact_match": 50,
        "chrf": 50,
    }
    for instruction in (
        "Who?\n\nOPTIONS:\n- The man \n- Bob",
        "Who? OPTIONS: \r\n - The man\r\n - Bob",
        "Who?\nOPTIONS:\n- Eve\n- Ann\nEve\n\nWho?\nOPTIONS:\n- The man\n- Bob",
    ):
        floor = first_option_floor([instance(instruction, "The man")])
        assert floor is not None
        assert floor["exact_match"] == 100


@pytest.mark.parametrize("instruction", ["Is it?", "OPTIONS:", "OPTIONS:\n", "OPTIONS:\n-", "OPTIONS: - yes", "- yes"])
def test_no_first_option_unless_every_row_has_one(instruction: str) -> None:
    assert first_option_floor([instance(instruction, "yes")]) is None
    assert first_option_floor([instance("Is it?\nOPTIONS:\n- yes", "yes"), instance(instruction, "yes", 1)]) is None


def test_copy_is_the_whole_instruction() -> None:
    assert copy_floor([instance("a b c\n\nd", "a b")]) == pytest.approx(score_answer("a b c\n\nd", "a b"))


def test_best_floor_is_per_metric() -> None:
    floors = describe_floors([instance("say x y\nOPTIONS:\n- x\n- y", "x"), instance("OPTIONS:\n- x\n- y", "y", 1)])
    assert floors["constant_answer"] == "x"
    best = best_floor(floors["floors"])
    assert all(best[metric] == max(floor[metric] for floor in floors["floors"].values()) for metric in METRICS)
    assert best_floor({**floors["floors"], "first_option": None})["rouge1"] == pytest.approx(50)


def test_floors_of_the_authors_test_set() -> None:
    paths = sorted(DATASET1.glob("*.jsonl"))
    if not paths:
        pytest.skip(f"the authors' data is not in {DATASET1}")
    by_task: dict[str, list[Instance]] = defaultdict(list)
    for line in paths[0].read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        task = row["category"]
        by_task[task].append(instance(row["instruction"], row["output"], len(by_task[task]), task))
    floors = {task: describe_floors(instances) for task, instances in by_task.items()}
    rouge1 = {
        task: {kind: scores and round(scores["rouge1"], 1) for kind, scores in floor["floors"].items()}
        for task, floor in floors.items()
    }
    constants = {
        "entailment": ("no", 36.0),
        "linguistic_acceptability": ("acceptable", 64.5),
        "paraphrase": ("no", 65.5),
        "question_classification": ("description", 26.0),
        "word_disambiguation": ("different meanings", 51.0),
    }
    assert {task: (floors[task]["constant_answer"], rouge1[task]["constant"]) for task in constants} == constants
    assert rouge1["coreference"]["first_option"] == 55.6
    assert rouge1["structure_to_text"]["copy"] == pytest.approx(41.9, abs=0.1)
    assert rouge1["text_formatting"]["copy"] == 79.7
    without_options = {task for task, floor in rouge1.items() if floor["first_option"] is None}
    assert without_options == {"structure_to_text", "text_formatting"}
