"""The parser of all programs: what is declared is what is taken, shown and refused."""

import re
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa_ds.cli import __main__ as programs
from dpa_ds.cli.args import at_least_one, option, parse, positive_and_finite, refuse_unknown
from dpa_ds.errors import ConfigError
from tests.launch.processes import PYTHON, REPOSITORY, run


@dataclass(frozen=True, kw_only=True)
class Base:
    """Options of several programs."""

    text: str = option("TEXT", missing="nothing to look for: give --text TEXT")
    """Words to look for, 100% of them."""


@dataclass(frozen=True, kw_only=True)
class Search(Base):
    """Finds words.

    Slowly.

    examples
      search --text a
    """

    limit: int = option("N", 10, must_be="a whole number >= 1", test=at_least_one)
    """Most lines."""
    share: float = option("X", 0.5, must_be="a number > 0", test=positive_and_finite)
    """Share of the file."""
    mode: Literal["fast", "slow"] = option("fast|slow", "fast")
    """Speed."""
    names: tuple[str, ...] | None = option("A,B", None)
    """Files."""
    lambda_: str | None = option("X", None)
    """A word that Python keeps for itself."""


def search(*words: str) -> tuple[Search, list[str]]:
    return parse(words, Search, "python search.py")


def test_values_have_their_types() -> None:
    found, others = search(
        "--text", "a b", "--limit=3", "--share", "2", "--mode=slow", "--names", "[x,y]", "--lambda=1"
    )
    assert found == Search(text="a b", limit=3, share=2.0, mode="slow", names=("x", "y"), lambda_="1")
    assert isinstance(found.share, float)
    assert others == []
    assert search("--text", "a")[0] == Search(text="a")


def test_a_word_that_is_not_utf8() -> None:
    with pytest.raises(ConfigError, match=r"on the command line is not UTF-8 .character 1.: type it in a terminal"):
        search("--text", "a\udcff")


def test_an_option_is_given_once() -> None:
    with pytest.raises(ConfigError, match="--text is given twice \\('a' and 'b'\\): keep one"):
        search("--text=a", "--text", "b")


WORDS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=5)


@settings(deadline=None)  # the first parser takes longest
@given(st.lists(st.tuples(st.sampled_from(["--train.batch_size", "--config", "--x.y"]), WORDS)))
def test_other_words_come_back_in_order(pairs: list[tuple[str, str]]) -> None:
    """Both spellings, whatever options of the program stand between them."""
    options = iter([["--limit", "7"], ["--share=0.5"], ["--mode", "slow"]])
    words, expected = ["--text", "a"], []
    for number, (key, value) in enumerate(pairs):
        given = [key, value]
        if number % 2:
            given = [f"{key}={value}"]
        words += [*given, *next(options, [])]
        expected += given
    assert search(*words)[1] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to look for: give --text TEXT"),
        (["--text"], "--text needs a value: --text VALUE (see --help)"),
        (["--text", "--limit", "3"], "--text needs a value: --text VALUE (see --help)"),
        (["--text", "a", "--limit", "0"], "--limit must be a whole number >= 1, got '0'"),
        (["--text", "a", "--limit", "1.5"], "--limit must be a whole number >= 1, got '1.5'"),
        (["--text", "a", "--share", "nan"], "--share must be a number > 0, got 'nan'"),
        (["--text", "a", "--mode", "warp"], "--mode is fast or slow, got 'warp'"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        search(*words)


def test_unknown_options_are_refused_where_nobody_takes_them() -> None:
    refuse_unknown(["--local_rank=0"], Search)  # deepspeed adds it
    with pytest.raises(ConfigError, match=r"--tex is not an option; options are --text, --limit, .*--lambda$"):
        refuse_unknown(search("--text", "a", "--tex", "b")[1], Search)
    with pytest.raises(ConfigError, match="unexpected argument 'b': options look like --name VALUE"):
        refuse_unknown(["b"], Search)


def test_help_is_what_was_declared(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        search("--help")
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: python search.py --text TEXT [--option VALUE ...]"
    assert lines[2:5] == ["Finds words.", "", "Slowly."]
    shown = [" ".join(line.split()) for line in lines]
    assert "--text TEXT Words to look for, 100% of them." in shown
    assert "--limit N Most lines (default: 10)." in shown
    assert "--names A,B Files." in shown
    assert lines[-2:] == ["examples", "  search --text a"]


def test_every_program_has_help_and_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    """Sub-commands and files in launch/ are the same; and each option has a docstring, else there is no parser."""
    scripts = {path.stem.replace("_", "-") for path in (REPOSITORY / "launch").glob("*.py")}
    assert scripts - {"run"} == set(programs.PROGRAMS) - {"train"}
    for program in programs.PROGRAMS:
        with pytest.raises(SystemExit) as ended:
            programs.main(["--local_rank=0", program, "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        script = "run" if program == "train" else program.replace("-", "_")
        assert f"launch/{script}.py" in shown.splitlines()[0]


def test_an_unknown_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.main(["trian"]) == 2
    assert "'trian' is not a program: give one of init, train, evaluate" in capsys.readouterr().err
    assert programs.main([]) == 0
    assert "scaling-study" in capsys.readouterr().out


@pytest.mark.parametrize("program", programs.PROGRAMS)
def test_help_imports_no_torch(program: str) -> None:
    """A mistake in recipe or ranks is reported before seconds are spent on it."""
    ended = run([PYTHON, "-X", "importtime", "-m", "dpa_ds.cli", program, "--help"])
    assert ended.returncode == 0, ended.output
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", ended.output, re.M))
    assert "dpa_ds.cli.args" in imported or program == "train"
    assert not {"torch", "transformers", "deepspeed", "datasets", "matplotlib"} & imported
