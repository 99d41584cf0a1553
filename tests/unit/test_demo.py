"""The demo federation, on a small archive with invented text."""

import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from dpa_ds.demo import federation as demo
from dpa_ds.demo.archives import Archive, sha256_of, verified_manifest
from dpa_ds.demo.pairs import Pair
from dpa_ds.demo.tasks import Task
from dpa_ds.errors import DataError


def lettered_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Lines of text|answer."""
    for content in contents:
        for line in content.decode().splitlines():
            text, answer = line.split("|")
            yield text, answer


@pytest.fixture
def toy(tmp_path: Path) -> tuple[tuple[Task, ...], Path]:
    """Two tasks of one archive that is already in the cache: 60 plain rows, and 60 rows with 40 : 15 : 5 answers."""
    plain = "\n".join(f"Text {index}|answer {index}" for index in range(60))
    doubles = "\n".join(f"text   {index}|another" for index in range(60))
    labelled = "\n".join(f"case {index}|{'a' if index < 40 else 'b' if index < 55 else 'c'}" for index in range(60))
    path = tmp_path / "archives" / "toy-1.0-py3-none-any.whl"
    path.parent.mkdir()
    members = {"plain": f"{plain}\n{doubles}".encode(), "labelled": labelled.encode(), "LICENSE": b"free"}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    archive = Archive("toy", "1.0", "wheel", path.name, path.stat().st_size, sha256_of(path), "LICENSE")
    tasks = (
        Task("plain", "Answer.", archive, "plain", lettered_pairs, "MIT", "all"),
        Task("labelled", "Choose.", archive, "labelled", lettered_pairs, "MIT", "all", is_balanced=True),
    )
    return tasks, path.parent


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_federation_has_the_authors_layout_without_leaks(tmp_path: Path, toy: tuple[tuple[Task, ...], Path]) -> None:
    tasks, archives_dir = toy
    out_dir = demo.build_federation(tmp_path / "out", archives_dir, tasks, num_train=20, num_test=10, seed=3)
    test = [json.loads(line) for line in (out_dir / "test.jsonl").read_text().splitlines()]
    assert len(test) == 20
    for client, task in enumerate(tasks):
        train = json.loads((out_dir / "2" / f"local_training_{client}.json").read_text())
        held_out = [row for row in test if row["category"] == task.name]
        assert (len(train), len(held_out)) == (20, 10)
        rows = train + held_out
        assert all(row.keys() == {"instruction", "output", "task", "category"} for row in rows)
        assert all(row["instruction"].startswith(f"{task.instruction}\n") for row in rows)
        assert len({row["instruction"].casefold() for row in rows}) == 30
    assert "| 1 | labelled | toy 1.0 (wheel) | MIT | all |" in (out_dir / "DATA_LICENSES.md").read_text()
    assert (out_dir / "licenses" / "toy.txt").read_text() == "free"


def test_answers_are_balanced_as_far_as_the_rarest_goes(toy: tuple[tuple[Task, ...], Path]) -> None:
    task = toy[0][1]
    pairs = [(f"case {index}", "a" if index < 40 else "b" if index < 55 else "c") for index in range(60)]
    train, test = demo.split_rows(task, pairs, num_train=24, num_test=8, seed=0)
    shares = [Counter(row["output"] for row in rows) for rows in (train, test)]
    assert shares[0] + shares[1] == Counter(a=13, b=14, c=5)
    assert shares[1]["c"] == 1
    assert abs(shares[1]["a"] - shares[1]["b"]) <= 1
    equal = [(f"case {index}", "ab"[index % 2]) for index in range(60)]
    for rows in demo.split_rows(task, equal, num_train=24, num_test=8, seed=0):
        assert len(set(Counter(row["output"] for row in rows).values())) == 1


def test_rows_depend_on_the_seed_only(toy: tuple[tuple[Task, ...], Path]) -> None:
    task = toy[0][0]
    pairs = [(f"Text {index}", "x") for index in range(40)]
    assert demo.split_rows(task, pairs, 20, 10, 0) == demo.split_rows(task, pairs, 20, 10, 0)
    assert demo.split_rows(task, pairs, 20, 10, 0) != demo.split_rows(task, pairs, 20, 10, 1)
    with pytest.raises(DataError, match="task plain has 40 distinct examples, 30 \\+ 20 are needed"):
        demo.split_rows(task, pairs, 30, 20, 0)


def test_a_whole_federation_is_kept_and_a_damaged_one_rebuilt(
    tmp_path: Path, toy: tuple[tuple[Task, ...], Path]
) -> None:
    tasks, archives_dir = toy
    out_dir = demo.build_federation(tmp_path / "out", archives_dir, tasks, 20, 10)
    files = all_files(out_dir)
    times = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    demo.build_federation(out_dir, archives_dir, tasks, 20, 10)
    assert {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")} == times
    (out_dir / "test.jsonl").write_text("damaged")
    (out_dir / "2" / "local_training_0.json").unlink()
    assert verified_manifest(out_dir) is None
    demo.build_federation(out_dir, archives_dir, tasks, 20, 10)
    assert all_files(out_dir) == files
    demo.build_federation(out_dir, archives_dir, tasks, 20, 10, seed=1)
    assert all_files(out_dir).keys() == files.keys()
    assert all_files(out_dir) != files


def test_an_interrupted_build_leaves_no_manifest(tmp_path: Path, toy: tuple[tuple[Task, ...], Path]) -> None:
    tasks, archives_dir = toy
    demo.build_federation(tmp_path / "out", archives_dir, tasks, 20, 10)
    with pytest.raises(DataError, match="distinct examples"):
        demo.build_federation(tmp_path / "out", archives_dir, tasks, 50, 20)
    assert verified_manifest(tmp_path / "out") is None


def test_installed_packages_are_read_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("__init__.py", "b.py", "a/c.py", "a/data.txt", "_private/d.py", "tests/e.py", "testing/f.py"):
        path = tmp_path / "toy_package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise SystemExit({name!r})")
    monkeypatch.syspath_prepend(tmp_path)
    contents = list(demo._installed_files("toy_package", "*.py"))
    assert [content.decode().split("'")[1] for content in contents] == ["__init__.py", "a/c.py", "b.py"]
    with pytest.raises(DataError, match="pip install no_such_package_here"):
        list(demo._installed_files("no_such_package_here", "*.py"))
