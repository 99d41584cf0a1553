"""Prompts of a file are asked as training asked them."""

import json
from pathlib import Path

import pytest

from dpa_ds.config.schema import DataConfig
from dpa_ds.data.sources import read_client
from dpa_ds.errors import DataError
from dpa_ds.inference.console import read_questions

ROWS = [
    {"q": "Is it true?", "context": "Ice is cold.", "a": "yes"},
    {"q": "Say a.", "context": None, "a": "a"},
    {"q": "Say b.", "context": float("nan"), "a": "b"},
    {"q": 7, "context": 3.0, "a": "c"},
]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "local_training_0.json").write_text(json.dumps(ROWS))
    return DataConfig(path=str(tmp_path), instruction_column="q", input_column="context", output_column="a")


@pytest.mark.parametrize("input_column", ["context", None])
def test_rows_are_asked_as_in_training(tmp_path: Path, data: DataConfig, input_column: str | None) -> None:
    columns = {"instruction_column": "q", "input_column": input_column, "output_column": "a"}
    data = DataConfig(path=data.path, **columns)
    trained = [example.instruction for example in read_client(data, 0, 0).train]
    asked = read_questions(tmp_path / "1" / "local_training_0.json", data)
    assert [question.instruction for question in asked] == trained
    assert trained[0] == ("Is it true?\nIce is cold." if input_column else "Is it true?")


def test_rows_to_ask_need_no_answer_but_a_question(tmp_path: Path, data: DataConfig) -> None:
    file = tmp_path / "ask.jsonl"
    file.write_text('{"q": "a", "context": ""}\n{"q": "", "context": "b"}\n')
    with pytest.raises(DataError, match=r"ask.jsonl:2: column 'q' is empty: fill it in, or remove the row"):
        read_questions(file, data)


def test_lines_of_text_are_prompts(tmp_path: Path, data: DataConfig) -> None:
    (tmp_path / "ask.txt").write_text("one\n\ntwo\n")
    asked = read_questions(tmp_path / "ask.txt", data)
    assert [question.instruction for question in asked] == ["one", "two"]
