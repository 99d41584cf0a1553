"""The file of answers: what was written stays, whatever happens to the next one."""

from pathlib import Path

import pytest

from dpa_ds.errors import CheckpointError
from dpa_ds.evaluation.answers import Answer, append_answers, prepare_answers, read_answers

ANSWERS = [Answer(0, "verb", row, 0.25, f"it sings {row}") for row in range(3)]


def test_a_full_disk_is_one_error_and_what_was_answered_is_kept(tmp_path: Path) -> None:
    append_answers(tmp_path / "rank_0000.jsonl", ANSWERS[:2])
    full = tmp_path / "rank_0001.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(
        CheckpointError, match=f"cannot write answers to {full}: .*No space left.*kept: make room, then"
    ):
        append_answers(full, ANSWERS[2:])
    full.unlink()
    assert list(read_answers(tmp_path)) == ANSWERS[:2]


def test_an_answer_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "rank_0000.jsonl"
    prepare_answers(path.parent)
    append_answers(path, ANSWERS[:2])
    path.write_bytes(path.read_bytes()[:-9])
    prepare_answers(path.parent)
    append_answers(path, ANSWERS[2:])
    assert list(read_answers(path.parent)) == [ANSWERS[0], ANSWERS[2]]


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write answers to .*file/answers: .*Not a directory"):
        prepare_answers(tmp_path / "file" / "answers")
