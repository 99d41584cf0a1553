"""Bad training and test data: one line names file and row, and nothing is written."""

import json
from pathlib import Path

import pytest

from tests.launch.bad_input import Case, Place, cut, fifo, folder, link, make_place, refuse, remove, write

pytestmark = pytest.mark.launch
CLIENT = "data/2/local_training_1.json"
GOOD = '{"instruction": "a", "output": "b"}'


def client(name: str, content: str | bytes, *says: str) -> Case:
    """A row on what is in the training file of client 1; {file} is its path."""
    return Case(
        name, tuple(text.replace("{file}", f"{{root}}/{CLIENT}") for text in says), spoil=write(CLIENT, content)
    )


def rows_of_test(name: str, content: str | bytes, *says: str) -> Case:
    """A row on what is in the test file; {file} is its path."""
    path = "data/test.jsonl"
    return Case(name, tuple(text.replace("{file}", f"{{root}}/{path}") for text in says), spoil=write(path, content))


def table(file: str, content: str | bytes, *says: str, column: str = "who", kind: str = "column") -> Case:
    """A row on what is in one table for all clients; {file} is its path."""
    path = f"{{root}}/{file}"
    arguments = (
        "--data.format=table",
        f"--data.path={path}",
        f"--data.test_path={path}",
        "--data.task_column=null",
        f"--data.partition.kind={kind}",
        f"--data.partition.column={column}",
        "--data.partition.num_clients=3",
    )
    return Case(file, tuple(text.replace("{file}", path) for text in says), arguments, write(file, content))


def parquet(place: Place) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.Table.from_pylist([json.loads(GOOD) | {"who": "x"}] * 5)
    pyarrow.parquet.write_table(rows, place.root / "cut.parquet")
    cut("cut.parquet", 20)(place)


CLIENTS = [
    client("zero bytes", "", "client_1 ({file}) has no training examples: add some, or take the client out"),
    client("no examples", "[]", "client_1 ({file}) has no training examples"),
    client("malformed", f"[{GOOD},\n{GOOD},\n{{oops]", "{file}:3: not JSON", "a file is one array of objects"),
    client("cut off", f"[{GOOD},\n{GOOD}", "{file}:2: not JSON"),
    client("not objects", "[1, 2]", "{file}: row 1: expected an object with named columns, got int"),
    client("null", "null", "{file}:1: expected an object with named columns, got NoneType"),
    client("column missing", '[{"instruction": "a", "answer": "b"}]', "{file}: row 1: no column 'output'; columns are"),
    client(
        "answer empty", f'[{GOOD}, {{"instruction": "a", "output": " "}}]', "{file}: row 2: column 'output' is empty"
    ),
    client(
        "question empty", '[{"instruction": "", "output": "b"}]', "row 1: column 'instruction' is empty: fill it in"
    ),
    client(
        "not text", '[{"instruction": ["a"], "output": "b"}]', "{file}: row 1: column 'instruction' must be text, got"
    ),
    client(
        "half a character",
        '[{"instruction": "\\ud83d", "output": "b"}]',
        "{file}: row 1: column 'instruction' has half",
    ),
    client("invalid UTF-8", b'[\n{"instruction": "\xe9"}]', "{file}:2: byte 0xe9 is not UTF-8: convert the file"),
    client("NUL byte", b'[{"instruction": "a\0"}]', "{file}:1: contains a NUL byte: the file is damaged"),
    client("BOM of UTF-16", "[]".encode("utf-16"), "{file}:1: byte 0xff is not UTF-8: convert the file to UTF-8"),
    client("deep nesting", "[" * 100_000, "{file}:1: JSON that cannot be read"),
    client("number too long", f'[{{"instruction": {"9" * 5000}}}]', "{file}:1: JSON that cannot be read", "shorten"),
    client("huge line", f'[{{"instruction": "{"a" * 20_000_000}', "{file}:1: not JSON"),
    client("huge cell", f'[{{"instruction": "{"a" * 200_000}", "output": "b"}}]', "data.max_length", "raise it"),
    client("huge column name", f'[{{"{"a" * 200_000}": "b"}}]', "{file}: row 1: no column 'instruction'"),
    client(
        "longer than the context",
        f'[{GOOD}, {{"instruction": "{"a" * 200}", "output": "b"}}]',
        "{file}: row 2 has 205 tokens with its answer, more than the model's context of 192: lower data.max_length to 192",
    ),
    Case("file is a folder", f"{{root}}/{CLIENT}: folder without data", spoil=folder(CLIENT)),
    Case(
        "file in a symlink loop", (f"{{root}}/{CLIENT}", "check the file"), spoil=link(CLIENT, "local_training_1.json")
    ),
    Case("file is a pipe", (f"{{root}}/{CLIENT}: is a pipe",), spoil=fifo(CLIENT)),
    Case("file without permission", (f"{{root}}/{CLIENT}", "check the file"), spoil=link(CLIENT, "/proc/self/mem")),
    Case(
        "file missing", "missing: ['local_training_1.json'], surplus: []: name the folder after", spoil=remove(CLIENT)
    ),
    Case(
        "client twice",
        "missing: [], surplus: ['local_training_01.json']: name the folder after its number of clients and number",
        spoil=write("data/2/local_training_01.json", f"[{GOOD}]"),
    ),
    Case(
        "one client too many",
        "surplus: ['local_training_2.json']: name the folder after its number of clients",
        spoil=write("data/2/local_training_2.json", f"[{GOOD}]"),
    ),
]

TESTS = [
    rows_of_test("test file empty", "", "{file}: is empty: no rows; give data.path and data.test_path a file"),
    rows_of_test("test row malformed", f"{GOOD}\n{GOOD}\nnope\n", "{file}:3: not JSON"),
    rows_of_test(
        "test row without answer", f'{GOOD}\n{{"instruction": "a"}}\n', "{file}:2: no column 'output'; columns are"
    ),
    rows_of_test(
        "test row in invalid UTF-8", f"{GOOD}\n".encode() + b"\xff", "{file}:2: byte 0xff is not UTF-8: convert"
    ),
    rows_of_test("test row huge", f"{GOOD}\n" + "[" * 20_000_000, "{file}:2: JSON that cannot be read"),
    rows_of_test(
        "no room for the answer",
        f'{GOOD}\n{{"instruction": "{"a" * 120}", "output": "b"}}\n',
        "row 1 of task all has 123 tokens: with generation.max_new_tokens 80 that is more than the model's context of 192",
    ),
    Case(
        "held-out prompt without room for the answer",
        (f"{{root}}/{CLIENT}: row ", "with generation.max_new_tokens 80 that is more than the model's context of 192"),
        ("--data.held_out_fraction=0.5", "--evaluation.split=held_out"),
        spoil=write(CLIENT, json.dumps([{"instruction": "a" * (115 + n), "output": "b"} for n in range(4)])),
    ),
    Case(
        "two test files",
        "{data}: several test files (other.jsonl, test.jsonl): name one in data.test_path",
        spoil=write("data/other.jsonl", GOOD),
    ),
    Case("test file missing", "nowhere.jsonl: no such file or folder: check", ("--data.test_path", "nowhere.jsonl")),
    Case("test file is a folder", "{data}: folder without data: name a file in it", ("--data.test_path", "{data}")),
    Case(
        "test file in a symlink loop",
        "{data}/test.jsonl: cannot be read",
        spoil=link("data/test.jsonl", "test.jsonl"),
    ),
]

PLACES = [
    Case("no such data", "nowhere: no such file or folder: check data.path", ("--data.path", "nowhere")),
    Case("data in a symlink loop", ("{data}: cannot be read", "check the file"), spoil=link("data", "data")),
    Case("data is a file", ("{recipe}: is a file", "set data.format table"), ("--data.path", "{recipe}")),
    Case(
        "no such number of clients",
        "{data}: folders named after their number of clients: [2], wanted: 5: set data.num_clients to one of them",
        ("--data.num_clients", "5"),
    ),
    Case(
        "no clients at all",
        "{data}: folders named after their number of clients: none, wanted: the only one",
        spoil=remove("data/2"),
    ),
    Case("path too long", "data.path must be a path (", ("--data.path", "d" * 5000)),
]

ROW = GOOD[:-1] + ', "who": "x"}\n'
TABLES = [
    table("folder", "", "{file}: unknown kind of file '': use .json, .jsonl, .csv, .parquet"),
    table("empty.jsonl", "", "{file}: is empty: no rows"),
    table("column.jsonl", ROW, "{file}:1: no column 'whom'; columns are", "set data.partition.column", column="whom"),
    table(
        "few.jsonl",
        ROW * 2,
        "2 examples cannot be divided among 3 clients: set data.partition.num_clients between 1",
        kind="iid",
    ),
    table("quote.csv", 'instruction,output,who\na,"b,x\n', "{file}:2: not CSV", "check quotes"),
    table("fields.csv", "instruction,output,who\na,b\n", "{file}:2: 2 fields, but the header has 3: quote commas"),
    table("twice.csv", "who,output,who\na,b,c\n", "{file}:1: a column name occurs twice"),
    table("huge.csv", f"instruction,output,who\na,{'b' * 200_000},x\n", "data.max_length", "raise it"),
    table("text.parquet", "no parquet", "{file}: not a readable parquet file", "write it again"),
    Case(
        "cut.parquet",
        "{root}/cut.parquet: not a readable parquet file",
        ("--data.format=table", "--data.path={root}/cut.parquet", "--data.partition.column=who"),
        parquet,
    ),
    Case(
        "damaged data set",
        ("{root}/saved: not a readable data set", "save it again with save_to_disk"),
        ("--data.format=table", "--data.path={root}/saved", "--data.partition.column=who"),
        write("saved/state.json", '{"_data_files": 3}'),
    ),
]


BEFORE = [
    Case(f"{case.name}, preflight", case.says, ("--config", "{recipe}"), case.spoil, program="launch/preflight.py")
    for case in (*CLIENTS, *TESTS)
    if case.name in ("longer than the context", "no room for the answer", "answer empty")
]
"""Found out by the program that is to find out before a job is queued."""


@pytest.mark.parametrize("case", [*CLIENTS, *TESTS, *PLACES, *TABLES, *BEFORE], ids=str)
def test_refused(case: Case, tmp_path: Path, model: Path, federation: Path) -> None:
    place: Place = make_place(tmp_path, model, federation)
    refuse(case, place)
