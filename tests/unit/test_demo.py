"""The demo federation, on small archives with invented text; nothing is fetched."""

import dataclasses
import io
import json
import os
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from dpa_ds.data import demo
from dpa_ds.data.demo import Archive, Pair, Task
from dpa_ds.errors import DataError


def samples(*pairs: Pair) -> list[bytes]:
    """An evals sample file."""
    lines = [
        json.dumps({"input": [{"role": "system", "content": "-"}, {"role": "user", "content": text}], "ideal": answer})
        for text, answer in pairs
    ]
    return ["\n".join([*lines, ""]).encode()]


def compiled_catalogue(messages: dict[str, str]) -> bytes:
    """A gettext .mo file: header, table of sources, table of translations, the strings."""
    entries = [(key.encode() + b"\0", value.encode() + b"\0") for key, value in sorted(messages.items())]
    offset = 28 + 16 * len(entries)
    tables, strings = b"", b""
    for column in (0, 1):
        for entry in entries:
            tables += struct.pack("<II", len(entry[column]) - 1, offset + len(strings))
            strings += entry[column]
    header = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return header + tables + strings


def write_tar(target: Path | io.BytesIO, members: dict[str, bytes]) -> None:
    fileobj = io.BytesIO() if isinstance(target, Path) else target
    with tarfile.open(fileobj=fileobj, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if isinstance(target, Path):
        target.write_bytes(fileobj.getvalue())


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_sentiment_pairs_leave_out_unclear_short_and_broken_snippets() -> None:
    lines = [
        "1\t2.5\ta fine &amp; happy film",
        "2\t-1\ta dull film at length",
        "3\t0.9\tneither good nor bad it is",
        "4\t3\ttoo short",
        "5\t3\ta broken \ufffd letter is here",
        "6\t3",
    ]
    pairs = list(demo.sentiment_pairs(["\r\n".join(lines).encode()]))
    assert pairs == [("a fine & happy film", "positive"), ("a dull film at length", "negative")]


def test_sarcasm_pairs_name_the_labels() -> None:
    assert list(demo.sarcasm_pairs(samples(("a", "1"), ("b", "0")))) == [("a", "yes"), ("b", "no")]


def test_social_pairs_answer_with_the_option() -> None:
    question = "Jo ran. Why? A: to win: at last; B: to rest; C: for fun."
    contents = samples((question, "A"), (question, "C"), (question, "D"), (f"Look ... {question}", "A"))
    assert list(demo.social_pairs(contents)) == [(question, "to win: at last"), (question, "for fun")]


def test_science_pairs_answer_with_the_option() -> None:
    contents = samples(("Ice is\n\n A: colder or\n B: warmer.", "A"), ("Ice is\n\n A: cold\n B: hot.", "B"))
    expected = [("Ice is\nA: colder or\nB: warmer.", "colder"), ("Ice is\nA: cold\nB: hot.", "hot")]
    assert list(demo.science_pairs(contents)) == expected


def test_entity_pairs_thin_out_sentences_without_entities() -> None:
    without = [(f"clause {index}", demo.NO_ENTITIES) for index in range(10)]
    contents = samples(*without, ("Ann pays", "[Ann - PERSON]"), ("x" * 400, "[x - PERSON]"))
    pairs = list(demo.entity_pairs(contents))
    assert pairs[-1] == ("Ann pays", "Ann - PERSON")
    assert [answer for _, answer in pairs[:-1]] == [demo.NO_ENTITIES] * 2


def test_translation_pairs_take_singulars_and_drop_contexts() -> None:
    catalogue = compiled_catalogue(
        {
            "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n != 1;\n",
            "Save it now": "Enregistrer maintenant",
            "menu\x04Open the file": "Ouvrir le fichier",
            "%d red dot\0%d red dots": "%d point rouge\0%d points rouges",
            "Save": "Enregistrer",
            "Two\nlines here": "Deux\nlignes",
            "same as before": "same as before",
        }
    )
    assert dict(demo.translation_pairs([catalogue])) == {
        "Save it now": "Enregistrer maintenant",
        "Open the file": "Ouvrir le fichier",
        "%d red dot": "%d point rouge",
    }


def test_summary_pairs_take_prose_of_public_functions() -> None:
    prose = "It goes on and on about what " + "the function does " * 6 + "in the end."
    source = f'''
def kept():
    """Do one thing and do
    it well.

    {prose}

    Args: none.
    """
def _private():
    """Do one thing and do it well.

    {prose}
    """
class Listed:
    """Do one thing and do it well.

    Args: {prose}
    """
def unfinished():
    """Do one thing and do it well

    {prose}
    """
'''
    assert list(demo.summary_pairs([source.encode(), b"not ( python"])) == [(prose, "Do one thing and do it well.")]


def test_members_come_from_zip_tar_and_nested_archives_in_order(tmp_path: Path) -> None:
    nested = io.BytesIO()
    write_tar(nested, {"inner/b.txt": b"B", "inner/a.txt": b"A", "inner/a.dat": b"-"})
    write_tar(tmp_path / "sdist.tar.gz", {"top/data.tar.gz": nested.getvalue(), "top/setup.py": b"raise SystemExit"})
    write_zip(tmp_path / "wheel.whl", {"z.txt": b"Z", "y.txt": b"Y"})
    assert demo.read_members(tmp_path / "sdist.tar.gz", "*/data.tar.gz!*.txt") == [b"A", b"B"]
    assert demo.read_members(tmp_path / "wheel.whl", "*.txt") == [b"Y", b"Z"]
    with pytest.raises(DataError, match=r"wheel\.whl holds no member \*\.csv"):
        demo.read_members(tmp_path / "wheel.whl", "*.csv")


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
    write_zip(path, members)
    archive = Archive("toy", "1.0", "wheel", path.name, path.stat().st_size, demo.sha256_of(path), "LICENSE")
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
    assert demo.verified_manifest(out_dir) is None
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
    assert demo.verified_manifest(tmp_path / "out") is None


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


def test_archives_are_fetched_by_pip_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "dpa_toy-1.0-py3-none-any.whl"
    (tmp_path / "links").mkdir()
    metadata = b"Metadata-Version: 2.1\nName: dpa-toy\nVersion: 1.0\nRequires-Python: >=3.12\n"
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = "dpa_toy-1.0.dist-info"
    write_zip(tmp_path / "links" / name, {f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel, f"{info}/RECORD": b""})
    for key, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "links"),
    }.items():
        monkeypatch.setenv(key, value)
    digest = demo.sha256_of(tmp_path / "links" / name)
    archive = Archive("dpa-toy", "1.0", "wheel", name, 1000, digest, "LICENSE")
    archives_dir = tmp_path / "archives"
    path = demo.obtain(archive, archives_dir)
    assert path.read_bytes() == (tmp_path / "links" / name).read_bytes()
    path.write_bytes(b"damaged")
    assert demo.sha256_of(demo.obtain(archive, archives_dir)) == digest
    with pytest.raises(DataError, match=rf"put {name} \(sha256 0+\) into"):
        demo.obtain(dataclasses.replace(archive, sha256="0" * 64), archives_dir)
    assert [entry.name for entry in archives_dir.iterdir()] == [name]
