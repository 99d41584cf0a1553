"""Weights of instances by hand: one cosine at a time, extremes and clamps; references as drawn and as stored."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa_ds.config.schema import MethodConfig, WeightingConfig
from dpa_ds.data.references import REPRESENTATIONS, References, draw_references
from dpa_ds.data.tokenize import TokenizedExamples
from dpa_ds.errors import ConfigError
from dpa_ds.inference.weighting import Weighting, describe_weighting, instance_weights, mean_cosine, resolve_weighting

SIMILARITIES = ("cosine", "centred_cosine", "pearson", "l2", "swapped")


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(
    kind: str, states: torch.Tensor, references: torch.Tensor, scale: float = 1.0, mean: torch.Tensor | None = None
) -> torch.Tensor:
    mean = torch.zeros(states.shape[1]) if mean is None else mean
    return instance_weights(Weighting(kind, scale, "last_token", "none"), states, references, mean)


def clamped(value: float) -> float:
    return min(max(value, 0.0), 1.0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), num=st.integers(1, 7), s=st.integers(1, 9), hidden=st.integers(3, 64))
def test_mean_cosine_is_the_mean_of_cosines(seed: int, num: int, s: int, hidden: int) -> None:
    states, references = randn(seed, num, hidden), 5 * randn(seed + 1, s, hidden)
    each = torch.stack([torch.cosine_similarity(states, r.expand(num, -1), dim=1) for r in references])
    torch.testing.assert_close(mean_cosine(states, references), each.mean(dim=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_every_similarity_by_hand(scale: float) -> None:
    """In fp64 with math only, one pair at a time; some weights are clamped at 0, and with scale 3 at 1."""

    def cosine(a: Any, b: Any) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    def pearson(a: Any, b: Any) -> float:
        n, product = len(a), float(a @ b)
        covariance = n * product - a.sum() * b.sum()
        return float(covariance / math.sqrt((n * (a @ a) - a.sum() ** 2) * (n * (b @ b) - b.sum() ** 2)))

    def l2(a: Any, b: Any) -> float:
        difference = a / math.sqrt(a @ a) - b / math.sqrt(b @ b)
        return 1 - math.sqrt(difference @ difference) / 2

    references, mean = randn(1, 4, 12) + 0.7, randn(2, 12)
    states = torch.cat([references + 0.8 * randn(3, 4, 12), -references, 3 * randn(4, 4, 12)])
    formulas = {
        "cosine": cosine,
        "pearson": pearson,
        "l2": l2,
        "centred_cosine": lambda a, b: cosine(a - mean.double().numpy(), b - mean.double().numpy()),
    }
    found = {kind: weights(kind, states, references, scale, mean) for kind in SIMILARITIES}
    for kind, formula in formulas.items():
        rows = [[formula(x, r) for r in references.double().numpy()] for x in states.double().numpy()]
        expected = [clamped(scale * sum(row) / len(row)) for row in rows]
        torch.testing.assert_close(found[kind], torch.tensor(expected), rtol=0, atol=2e-6, msg=kind)
        assert len(set(found[kind].tolist())) > 4, f"{kind}: too few different weights to tell anything"
    assert (found["cosine"] == 0).any()
    assert (found["cosine"] == 1).any() == (scale == 3)
    torch.testing.assert_close(found["swapped"], 1 - found["cosine"])


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_extremes_and_the_clamp(kind: str) -> None:
    """The one reference itself, and its opposite."""
    reference = randn(5, 1, 16) - 0.2
    states = torch.cat([reference, 7 * reference, -reference])
    sign = 1.0 if kind != "swapped" else -1.0

    def expected(*similarity: float) -> list[float]:
        return [s if sign > 0 else 1 - s for s in similarity]

    for scale, whole in ((0.5, 0.5), (1.0, 1.0), (4.0, 1.0), (0.0, 0.0)):
        found = weights(kind, states, reference, scale)
        assert found.tolist() == pytest.approx(expected(whole, whole, 0.0), abs=1e-6), scale
        assert float(found.min()) >= 0.0
        assert float(found.max()) <= 1.0
    assert weights(kind, states[:2], reference, 4.0).tolist() == expected(1.0, 1.0), "clamped: exact, no rounding"


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_a_weight_does_not_depend_on_the_batch(kind: str) -> None:
    """40 states: torch.cdist has a faster algorithm for more than 25, which errs where states are near."""
    references = randn(6, 5, 32)
    states = torch.cat([references + 1e-4 * randn(7, 5, 32), randn(8, 35, 32)])
    mean = randn(9, 32)
    alone = torch.cat([weights(kind, state[None], references[:1], 1.0, mean) for state in states])
    torch.testing.assert_close(weights(kind, states, references[:1], 1.0, mean), alone, rtol=0, atol=1e-6)


def test_centring_equals_the_plain_cosine_of_centred_states() -> None:
    states, references, mean = randn(10, 6, 20) + 3, randn(11, 5, 20) + 3, 3 + 0.1 * randn(12, 20)
    by_hand = weights("cosine", states - mean, references - mean)
    torch.testing.assert_close(weights("centred_cosine", states, references, mean=mean), by_hand, rtol=0, atol=0)
    assert float((weights("cosine", states, references) - by_hand).abs().max()) > 0.1


def test_a_common_component_hides_the_task_until_it_is_subtracted() -> None:
    """Four clients; states are a large vector that all share, one of the task, and noise."""
    common, tasks = 30 * randn(13, 64), 3 * randn(14, 4, 64)
    references = [common + task + randn(15 + k, 5, 64) for k, task in enumerate(tasks)]
    prompts = [common + task + randn(25 + k, 8, 64) for k, task in enumerate(tasks)]
    mean = torch.stack([r.mean(dim=0) for r in references]).mean(dim=0)

    def own_and_other(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = [[weights(kind, p, r, mean=mean) for p in prompts] for r in references]
        own = torch.cat([alphas[k][k] for k in range(4)])
        return own, torch.cat([alphas[k][j] for k in range(4) for j in range(4) if j != k])

    own, other = own_and_other("cosine")
    assert float(torch.cat([own, other]).max() - torch.cat([own, other]).min()) < 0.04, "nearly constant"
    own, other = own_and_other("centred_cosine")
    assert float(own.min()) > 0.6
    assert float(other.max()) < 0.3


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_a_state_of_length_zero_gives_no_nan(kind: str) -> None:
    zero, some = torch.zeros(1, 8), randn(40, 1, 8)
    pairs = {"state": (zero, some), "reference": (some, zero), "both": (zero, zero)}
    for name, (state, reference) in pairs.items():
        (alpha,) = weights(kind, state, reference).tolist()
        if kind == "l2":  # a distance from the origin: 1 to a unit vector
            assert alpha == (1.0 if name == "both" else pytest.approx(0.5)), name
        else:
            assert alpha == (1.0 if kind == "swapped" else 0.0), name
    # One of two references has no direction: it counts as similarity 0.
    two = weights("cosine", some, torch.cat([some, zero]))
    assert two.tolist() == pytest.approx([0.5])
    # A state that is the mean itself, and one that is constant over its coordinates.
    assert weights("centred_cosine", some, some, mean=some[0]).tolist() == [0.0]
    assert weights("pearson", torch.full((1, 8), 0.25), some).tolist() == [0.0]


@pytest.mark.parametrize(("kind", "scale"), [("fixed", 0.3), ("global", 0.0), ("local", 1.0)])
def test_constants_ignore_states(kind: str, scale: float) -> None:
    weighting = Weighting(kind, scale, "last_token", "none")
    assert weighting.is_constant
    found = instance_weights(weighting, torch.full((3, 4), float("nan")), torch.zeros(0, 4), torch.zeros(()))
    assert found.tolist() == pytest.approx([scale] * 3)
    assert not any(Weighting(other, 1.0, "mean", "none").is_constant for other in SIMILARITIES)


def resolve(method: str = "feddpa_t", num_clients: int = 2, **chosen: Any) -> Weighting:
    return resolve_weighting(WeightingConfig(**chosen), MethodConfig(name=method, alpha=0.3), num_clients)  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "kind", "scale"), [
    ("feddpa_t", "centred_cosine", 1.0),
    ("feddpa_f", "centred_cosine", 1.0),
    ("fedit", "global", 0.0),
    ("centralized", "global", 0.0),
    ("fedlora", "local", 1.0),
    ("local", "local", 1.0),
])  # fmt: skip
def test_auto_is_what_fits_the_method(method: str, kind: str, scale: float) -> None:
    assert resolve(method) == Weighting(kind, scale, "last_token", "none")
    assert resolve(method, representation="mean", scale=0.7) == Weighting(
        kind, 0.7 if kind == "centred_cosine" else scale, "mean", "none"
    )


@pytest.mark.parametrize(("chosen", "expected"), [
    ({"kind": "cosine"}, Weighting("cosine", 0.5, "last_token", "local")),
    ({"kind": "cosine", "scale": 0.0}, Weighting("cosine", 0.0, "last_token", "local")),
    ({"kind": "cosine", "encoder": "none"}, Weighting("cosine", 0.5, "last_token", "none")),
    ({"kind": "pearson", "encoder": "global", "scale": 2.0}, Weighting("pearson", 2.0, "last_token", "global")),
    ({"kind": "l2", "representation": "mean"}, Weighting("l2", 0.5, "mean", "local")),
    ({"kind": "swapped"}, Weighting("swapped", 0.5, "last_token", "local")),
    ({"kind": "centred_cosine"}, Weighting("centred_cosine", 1.0, "last_token", "none")),
    ({"kind": "centred_cosine", "scale": 2.5, "encoder": "none"}, Weighting("centred_cosine", 2.5, "last_token", "none")),
    ({"kind": "fixed"}, Weighting("fixed", 0.3, "last_token", "none")),
    ({"kind": "fixed", "scale": 0.0, "encoder": "local"}, Weighting("fixed", 0.0, "last_token", "none")),
    ({"kind": "fixed", "scale": 0.8}, Weighting("fixed", 0.8, "last_token", "none")),
    ({"kind": "global", "scale": 0.8}, Weighting("global", 0.0, "last_token", "none")),
    ({"kind": "local", "scale": 0.8}, Weighting("local", 1.0, "last_token", "none")),
    ({"kind": "none", "scale": 0.8}, Weighting("none", 0.0, "last_token", "none")),
])  # fmt: skip
def test_explicit_choices(chosen: dict[str, Any], expected: Weighting) -> None:
    assert resolve(**chosen) == expected
    assert resolve("fedit", **chosen) == expected, "whatever the method"


def test_the_only_client_has_no_reference_mean_to_subtract() -> None:
    assert resolve(num_clients=1) == Weighting("cosine", 0.5, "last_token", "local")
    assert resolve("fedit", num_clients=1) == resolve("fedit")
    assert resolve(num_clients=1, kind="fixed") == resolve(kind="fixed")
    with pytest.raises(ConfigError, match=r"with one client is the client's own, .*: use weighting.kind cosine"):
        resolve(num_clients=1, kind="centred_cosine")


def test_description() -> None:
    assert describe_weighting(resolve(), 5) == (
        "centred_cosine, lambda 1, 5 references, last_token, encoded by the frozen base"
    )
    assert describe_weighting(resolve(kind="cosine", representation="mean"), 3) == (
        "cosine, lambda 0.5, 3 references, mean, encoded by the local adapter"
    )
    assert describe_weighting(resolve("fedit"), 5) == "global adapter alone"
    assert describe_weighting(resolve(kind="fixed"), 5) == "fixed alpha 0.3"


def examples(num: int) -> TokenizedExamples:
    """Example i: prompt [100 + i] * (1 + i % 3), then 1 + i % 2 tokens of answer and the end token, all below 10."""
    rows = [[100 + i] * (1 + i % 3) + [1] * (1 + i % 2) + [0] for i in range(num)]
    return TokenizedExamples(
        np.array([token for row in rows for token in row], dtype=np.int32),
        np.cumsum([0, *map(len, rows)], dtype=np.int64),
        np.array([(1 + i % 3, len(row)) for i, row in enumerate(rows)], dtype=np.int32),
        np.arange(num + 1),
        num_dropped=0,
    )


def test_references_are_whole_prompts_of_different_examples() -> None:
    drawn = draw_references(examples(30), 5, (0, 2))
    numbers = [prompt[0] - 100 for prompt in drawn]
    assert len(set(numbers)) == 5
    assert drawn == [[100 + i] * (1 + i % 3) for i in numbers], "the whole prompt, and nothing of the answer"
    assert all(type(token) is int for prompt in drawn for token in prompt)


def test_the_draw_is_a_function_of_its_seed() -> None:
    drawn = {seed: draw_references(examples(30), 5, seed) for seed in ((0, 2), (0, 3), (1, 2))}
    assert draw_references(examples(30), 5, (0, 2)) == drawn[0, 2]
    assert len({str(prompts) for prompts in drawn.values()}) == 3
    assert draw_references(examples(30), 8, (0, 2))[:5] == drawn[0, 2], "more references keep those there were"
    everyone = {prompt[0] for seed in range(40) for prompt in draw_references(examples(30), 5, (seed, 0))}
    assert everyone == {100 + i for i in range(30)}


def test_all_examples_where_there_are_fewer() -> None:
    assert sorted(draw_references(examples(3), 5, (0, 0))) == [[100], [101] * 2, [102] * 3]


def test_references_survive_a_file_bit_by_bit(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    prompts = [[7], [1, 2, 3, 2**31 - 1], [5, 5]]
    embeddings = {name: randn(50 + k, 3, 6) for k, name in enumerate(REPRESENTATIONS)}
    references = References(prompts, embeddings)
    save_file(references.to_tensors(), tmp_path / "references.safetensors")
    found = References.from_tensors(load_file(tmp_path / "references.safetensors"))
    assert found.prompts == prompts
    assert found.embeddings.keys() == embeddings.keys()
    assert all(torch.equal(found.embeddings[name], embeddings[name]) for name in REPRESENTATIONS)
    by_hand = torch.stack([sum(embeddings[name]) / 3 for name in ("last_token", "mean")])  # type: ignore[misc]
    torch.testing.assert_close(references.reference_mean, by_hand)
