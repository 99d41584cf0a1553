"""Archives are fetched once, checked, and only read; nothing is fetched from a network here."""

import dataclasses
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from dpa_ds.demo import archives
from dpa_ds.demo.archives import Archive
from dpa_ds.errors import DataError


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


def test_members_come_from_zip_tar_and_nested_archives_in_order(tmp_path: Path) -> None:
    nested = io.BytesIO()
    write_tar(nested, {"inner/b.txt": b"B", "inner/a.txt": b"A", "inner/a.dat": b"-"})
    write_tar(tmp_path / "sdist.tar.gz", {"top/data.tar.gz": nested.getvalue(), "top/setup.py": b"raise SystemExit"})
    write_zip(tmp_path / "wheel.whl", {"z.txt": b"Z", "y.txt": b"Y"})
    assert archives.read_members(tmp_path / "sdist.tar.gz", "*/data.tar.gz!*.txt") == [b"A", b"B"]
    assert archives.read_members(tmp_path / "wheel.whl", "*.txt") == [b"Y", b"Z"]
    with pytest.raises(DataError, match=r"wheel\.whl holds no member \*\.csv"):
        archives.read_members(tmp_path / "wheel.whl", "*.csv")


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
    digest = archives.sha256_of(tmp_path / "links" / name)
    archive = Archive("dpa-toy", "1.0", "wheel", name, 1000, digest, "LICENSE")
    archives_dir = tmp_path / "archives"
    path = archives.obtain(archive, archives_dir)
    assert path.read_bytes() == (tmp_path / "links" / name).read_bytes()
    path.write_bytes(b"damaged")
    assert archives.sha256_of(archives.obtain(archive, archives_dir)) == digest
    with pytest.raises(DataError, match=rf"put {name} \(sha256 0+\) into"):
        archives.obtain(dataclasses.replace(archive, sha256="0" * 64), archives_dir)
    assert [entry.name for entry in archives_dir.iterdir()] == [name]


def test_a_member_is_extracted_once_and_checked(tmp_path: Path) -> None:
    wheel_path = tmp_path / "toy.whl"
    write_zip(wheel_path, {"toy/weights": b"numbers"})
    archive = Archive("toy", "1.0", "wheel", wheel_path.name, 1000, archives.sha256_of(wheel_path), "LICENSE")
    (tmp_path / "expected").write_bytes(b"numbers")
    digest = archives.sha256_of(tmp_path / "expected")
    target = archives.extract_member(archive, "toy/weights", digest, tmp_path / "weights", tmp_path)
    assert target.read_bytes() == b"numbers"
    wheel_path.unlink()
    assert archives.extract_member(archive, "toy/weights", digest, target, tmp_path) == target
    write_zip(wheel_path, {"toy/weights": b"others"})
    other = dataclasses.replace(archive, sha256=archives.sha256_of(wheel_path))
    with pytest.raises(DataError, match=rf"toy/weights has sha256 \w+, not {digest}"):
        archives.extract_member(other, "toy/weights", digest, tmp_path / "again", tmp_path)
    assert not list(tmp_path.glob("*again*"))
