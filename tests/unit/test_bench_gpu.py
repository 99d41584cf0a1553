"""The kit for one GPU, without running it: predictions, verdicts, sizes, and the limit of a part's time."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

import benchmarks.gpu.__main__ as kit
from benchmarks.gpu.claims import Claim, all_claims, markdown_table
from benchmarks.gpu.parts import PARTS, Options, Part, command
from benchmarks.gpu.results import Results, find_result, read_results
from benchmarks.gpu.settings import DEFAULT_GPU, SETTINGS
from tests.launch.processes import PYTHON, REPOSITORY, Running

CLAIM = Claim("part", "measure", "value", "text", "against", least=2.0, most=3.0)


def test_the_page_has_the_predictions_of_today_and_what_was_measured() -> None:
    page = (REPOSITORY / "docs" / "gpu.md").read_text()
    results = read_results(REPOSITORY / "benchmarks" / "gpu" / "measured" / "h200.jsonl")
    assert markdown_table(all_claims("h200-141g"), results) in page


@pytest.mark.parametrize("part", SETTINGS)
def test_a_setting_fits_the_card(part: str) -> None:
    assert SETTINGS[part].plan(DEFAULT_GPU).fits


def test_a_setting_that_does_not_fit_is_found() -> None:
    assert not replace(SETTINGS["speed_13b"], rows=4).plan(DEFAULT_GPU).fits


@pytest.mark.parametrize(
    ("value", "verdict"), [(None, "not measured"), (1.9, "missed"), (2.0, "reached"), (3.0, "reached"), (3.1, "missed")]
)
def test_verdict(value: float | None, verdict: str) -> None:
    assert CLAIM.verdict(value) == verdict


def test_a_claim_without_aim_has_no_verdict() -> None:
    assert replace(CLAIM, least=None, most=None).verdict(1.0) == ""


def test_the_last_result_of_a_name_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = Results(path, "part")
    results.put("measure", value=2.5)
    results.put("measure", "other", value=9.0)
    results.put("measure", value=2.75)
    with path.open("a") as file:
        file.write('{"part": "cut o')
    found = read_results(path)
    assert len(found) == 3
    assert CLAIM.measured(found) == 2.75
    assert find_result(found, "part", "no such measure") is None
    assert "| 2.00 to 3.00 |  | 2.75 | reached |" in markdown_table([CLAIM], found)


def test_every_part_is_a_program_that_exists(tmp_path: Path) -> None:
    options = Options(tmp_path, DEFAULT_GPU, dry=False)
    for part in PARTS:
        words = command(part, options, part.limit_seconds)
        programs = [word for word in words if word.endswith(".py")]
        assert len(programs) == 1, words
        assert (REPOSITORY / programs[0]).is_file()


def test_a_part_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(part: Part, options: Options, limit_seconds: float) -> Running:
        return Running([PYTHON, "-c", "import time; print('began', flush=True); time.sleep(60)"])

    monkeypatch.setattr(kit, "start", start)
    options = Options(tmp_path, DEFAULT_GPU, dry=False)
    began = time.monotonic()
    assert kit.run_part(Part("facts", 1.0, 0.0), options, seconds_left=100.0) == kit.HANGS
    assert time.monotonic() - began < 20.0
    assert "began" in options.log.read_text()
    (result,) = read_results(options.results)
    assert result["exit_status"] == kit.HANGS


def test_a_part_is_left_out_where_time_is_short(tmp_path: Path) -> None:
    options = Options(tmp_path, DEFAULT_GPU, dry=False)
    assert kit.run_part(PARTS[0], options, seconds_left=1.0) == 0
    (result,) = read_results(options.results)
    assert result["skipped"] == "1 s are left, it needs 20"
