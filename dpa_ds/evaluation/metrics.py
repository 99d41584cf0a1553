"""How right an answer is, and what an answer is worth that needs no model: the floors.

Every score lies in 0..100. A model that scores below the floor of a task has not learned the task.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpa_ds.evaluation.answers import Instance

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF

METRICS = ("rouge1", "rougeL", "exact_match", "chrf")
"""rouge1, rougeL: F1 of rouge-score, no stemmer. exact_match: equal but for outer blanks. chrf: of sacrebleu, for each
answer."""

_FIRST_OPTION = re.compile(r"\bOPTIONS:[^\S\n]*\n\s*-[^\S\n]*(\S[^\n]*)")


def score_answer(prediction: str, reference: str) -> dict[str, float]:
    """All METRICS of one answer.

    ROUGE sees lower-case a-z and 0-9 only: in other scripts it is 0 even for the right answer, where chrF still counts.
    """
    return dict(zip(METRICS, _scores(prediction, reference), strict=True))


def constant_floor(references: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The reference that is best as the answer to every instance (highest mean rouge1), and its mean scores.

    Among equals the more frequent reference wins, then the earlier one. `references`: one per instance, not empty.
    """
    assert references
    counts = Counter(references)
    candidates = list(counts)
    means = _mean_rouge1(candidates, np.array(list(counts.values())))
    # Means that differ by rounding only count as equal, so that every machine chooses the same.
    means = np.round(means, 9)
    best = 0
    for k, candidate in enumerate(candidates):
        if (means[k], counts[candidate]) > (means[best], counts[candidates[best]]):
            best = k
    answer = candidates[best]
    return answer, _mean_scores([(answer, reference) for reference in references])


def copy_floor(instances: Sequence[Instance]) -> dict[str, float]:
    """Mean scores of giving the whole instruction back, word for word: question, template and options included.

    A floor for tasks that rewrite their input. It is not the highest that copying can reach: picking the input
    out of the template scores more, but needs a rule for every template.
    """
    return _mean_scores([(instance.instruction, instance.reference) for instance in instances])


def first_option_floor(instances: Sequence[Instance]) -> dict[str, float] | None:
    """Mean scores of always taking the first option; None unless every instruction offers options.

    Options are lines that start with a dash, below OPTIONS: at the end of a line. Where an instruction has several such
    lists, as with worked examples before the question, the last one counts.
    """
    pairs = []
    for instance in instances:
        options = _FIRST_OPTION.findall(instance.instruction)
        if not options:
            return None
        pairs.append((options[-1].strip(), instance.reference))
    return _mean_scores(pairs)


def describe_floors(instances: Sequence[Instance]) -> dict[str, Any]:
    """The best constant answer and the scores of all floors of one task; `first_option` may be None."""
    answer, constant = constant_floor([instance.reference for instance in instances])
    floors = {"constant": constant, "copy": copy_floor(instances), "first_option": first_option_floor(instances)}
    return {"constant_answer": answer, "floors": floors}


def best_floor(floors: Mapping[str, Mapping[str, float] | None]) -> dict[str, float]:
    """Per metric the highest of the `floors` of one task."""
    known = [floor for floor in floors.values() if floor is not None]
    best = {}
    for metric in METRICS:
        best[metric] = max(floor[metric] for floor in known)
    return best


# Labels repeat: thousands of answers to eight tasks have a few hundred different pairs.
@functools.lru_cache(maxsize=2**16)
def _scores(prediction: str, reference: str) -> tuple[float, ...]:
    """METRICS of one pair, in that order."""
    rouge, chrf = _scorers()
    found = rouge.score(target=reference, prediction=prediction)
    return (
        100.0 * found["rouge1"].fmeasure,
        100.0 * found["rougeL"].fmeasure,
        100.0 * (prediction.strip() == reference.strip()),
        chrf.sentence_score(prediction, [reference]).score,
    )


@functools.cache
def _scorers() -> tuple[Any, "CHRF"]:
    """The RougeScorer and the CHRF; rouge-score imports nltk, so not before the first score is asked for."""
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    from sacrebleu.metrics.chrf import CHRF

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False), CHRF()


def _mean_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Means of METRICS over (prediction, reference) pairs, at least one."""
    scores = [_scores(prediction, reference) for prediction, reference in pairs]
    return dict(zip(METRICS, np.mean(scores, axis=0).tolist(), strict=True))


def _mean_rouge1(texts: Sequence[str], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean rouge1 of each text as the answer to all texts, text k being the reference of `counts[k]` instances.

    What the library gives for every pair, by an index from token to texts: 200 texts are 40,000 pairs.
    """
    from rouge_score.tokenize import tokenize  # type: ignore[import-untyped]

    bags = [Counter(tokenize(text, stemmer=None)) for text in texts]
    lengths = np.array([bag.total() for bag in bags], dtype=np.float64)
    occurrences: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for k, bag in enumerate(bags):
        for token, count in bag.items():
            occurrences[token].append((k, count))
    # Token -> the texts that have it, and how often each.
    index = {token: np.array(pairs).T for token, pairs in occurrences.items()}
    means = np.zeros(len(texts))
    for k, bag in enumerate(bags):
        overlap = np.zeros(len(texts))
        for token, count in bag.items():
            where, counts_there = index[token]
            overlap[where] += np.minimum(counts_there, count)
        # 2 PR / (P + R) of F1, with both lengths multiplied out; two texts without tokens have F1 = 0.
        f1 = 2.0 * overlap / np.maximum(lengths[k] + lengths, 1.0)
        means[k] = 100.0 * np.average(f1, weights=counts)
    return means
