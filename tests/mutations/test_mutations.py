"""A sample of the mutated inputs (`make mutations` does many), and that what is wrong with an end is seen."""

from pathlib import Path

import pytest

from tests.mutations.harm import Places, harm, problem_with, try_all
from tests.mutations.inputs import PROGRESS, RUN, Damage, draw_inputs

pytestmark = pytest.mark.launch
NUM_INPUTS = 40


def test_mutated_inputs_are_refused_in_one_line(tmp_path: Path) -> None:
    inputs = draw_inputs(NUM_INPUTS, number=0)
    assert len({one.program for one in inputs}) > 5
    outcomes = try_all(tmp_path, dict(enumerate(inputs)), num_workers=2)
    assert [outcome.problem for outcome in outcomes if outcome.problem] == []
    assert sum(bool(outcome.status) for outcome in outcomes) > NUM_INPUTS // 4, "most inputs are good"


@pytest.mark.parametrize(
    ("status", "output", "after", "problem"),
    [
        (2, "error: x must be 1: say so\n", {"a": "1"}, ""),
        (0, "done\n", {"a": "1", "b": "2"}, ""),
        (0, "error: x\n", {"a": "1"}, "an error with status 0"),
        (1, "Traceback (most recent call last):\n", {"a": "1"}, "a traceback"),
        (1, "error: x\n", {"a": "1"}, "exit status 1"),
        (-9, "", {"a": "1"}, "exit status -9"),
        (2, "", {"a": "1"}, "0 error lines"),
        (3, "error: x\nerror: y\n", {"a": "1"}, "2 error lines"),
        (4, "error: x\nerror: y failed (see above)\n", {"a": "1"}, ""),
        (4, "error: x\n", {"a": "1", "b": "2"}, "refused, and yet changed"),
        (4, "error: x\n", {}, "refused, and yet changed"),
        (5, "round 0: mean held-out loss 6\nerror: x\n", {"b": "2"}, ""),
        (2, f"error: {'x' * 3000}\n", {"a": "1"}, "an error that nobody reads"),
    ],
)
def test_what_is_wrong_with_an_end_is_seen(status: int, output: str, after: dict[str, str], problem: str) -> None:
    assert problem_with(status, output, {"a": "1"}, after).startswith(problem)
    assert bool(problem_with(status, output, {"a": "1"}, after)) == bool(problem)


def test_harm_is_done(tmp_path: Path) -> None:
    """Each kind changes its file, so that an input is not a good one by mistake."""
    places = Places(tmp_path)
    state, tensors = f"{RUN}/rounds/round_000002/global/state.json", f"{PROGRESS}/client_00/*/local.safetensors"
    damages = [
        *(Damage(kind, state, 0.5, b"\xff") for kind in ("cut", "change", "put", "take", "remove", "folder")),
        Damage("swap", state, value=f"{RUN}/config.yaml"),
        Damage("value", state, 0.0, "x", is_sealed=True),
        Damage("value", "runs.yaml", value=["seed", -1]),
        Damage("value", "ds.json", 0.0, "x"),
        Damage("value", "data/test.jsonl", 0.0, 7),
        *(Damage(kind, tensors, 0.0, 1, is_sealed=True) for kind in ("shape", "tensor", "dtype", "key")),
    ]
    for damage in damages:
        place = places.copy("one", has_run=True)
        before = content_of(place.root)
        harm(place.root, damage)
        assert content_of(place.root) != before, damage


def content_of(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
