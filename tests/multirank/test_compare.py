"""What launch/compare.py takes for granted: FedDPA-F, FedLoRA and FedIT share their rounds, bit for bit."""

from pathlib import Path

import pytest

from dpa_ds.errors import ConfigError
from dpa_ds.experiments.comparison import Candidate, parse_weightings, plan_entries
from tests import tiny
from tests.launch.processes import adapters, assert_same_adapters
from tests.ranks import run_on_ranks, train_on_rank


@pytest.mark.multirank
def test_one_run_has_the_adapters_of_three_methods(tmp_path: Path) -> None:
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_federation(tmp_path / "data")
    runs = {}
    for method in ("feddpa_f", "fedlora", "fedit"):
        argv = tiny.recipe(model, data, tmp_path / method, method__name=method, lora__dropout=0.1)
        run_on_ranks(train_on_rank, 2, tmp_path, argv)
        runs[method] = adapters(tmp_path / method / "tiny")
    assert_same_adapters(runs["fedlora"], runs["feddpa_f"], tolerance=0.0)
    of_global = [
        {key: tensor for key, tensor in runs[method].items() if key.startswith("global/")}
        for method in ("fedit", "feddpa_f")
    ]
    assert_same_adapters(*of_global, tolerance=0.0)


def test_what_is_trained_for_which_line() -> None:
    weightings = parse_weightings("cosine, centred_cosine:0.5|1,fixed:0.3")
    assert weightings == [Candidate("cosine"), Candidate("centred_cosine", (0.5, 1.0)), Candidate("fixed", (0.3,))]
    methods = ("feddpa_t", "fedit", "fedlora", "local", "centralized")
    entries = plan_entries(methods, weightings)
    assert [(e.method, e.candidate.kind, e.trained_as(methods)) for e in entries] == [
        ("feddpa_t", "cosine", "feddpa_t"),
        ("feddpa_t", "centred_cosine", "feddpa_t"),
        ("feddpa_t", "fixed", "feddpa_t"),
        ("fedit", "global", "fedlora"),  # its rounds are among those of fedlora
        ("fedlora", "local", "fedlora"),
        ("local", "local", "local"),
        ("centralized", "global", "centralized"),
    ]
    assert plan_entries(["fedit"], weightings)[0].trained_as(["fedit"]) == "fedit"
    assert plan_entries(["fedlora"], weightings)[0].trained_as(["feddpa_f", "fedlora"]) == "feddpa_f"


def test_a_scale_that_is_no_number_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--weightings cosine:0.5\|x: scales are numbers"):
        parse_weightings("cosine:0.5|x")
