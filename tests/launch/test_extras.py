"""Packages that only some runs need: without them the others work, and those that need one say which.

Finders that do not see a package are the absence itself: Python asks them wherever it looks for a module.
"""

import re
import sys
from collections.abc import Sequence
from distutils.core import run_setup  # setuptools brings it where Python does not
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from dpa_ds.cli import compare, evaluate, rendezvous, train
from dpa_ds.cli.prepare_demo import prepare_model
from dpa_ds.config.extras import MODULES, missing
from dpa_ds.config.schema import ModelConfig
from dpa_ds.errors import ConfigError
from dpa_ds.model.base import resolve_model
from tests import tiny
from tests.launch.processes import PYTHON, REPOSITORY, run

ABSENT = sorted(name for names in MODULES.values() for name in names)

WITHOUT = """
import re
import sys
from tests.launch.test_extras import without_extras
sys.meta_path[:] = without_extras(sys.meta_path)
from dpa_ds.cli.train import main
main(sys.argv[1:])
"""


class Hide:
    """A finder of modules that does not see the extras."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] in ABSENT:
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def without_extras(finders: Sequence[Any]) -> list[Any]:
    return [Hide(finder) for finder in finders]


@pytest.fixture
def _without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ABSENT:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", without_extras(sys.meta_path))


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    return tiny.recipe(tmp_path / "model", tmp_path / "data", tmp_path / "runs")


def test_extras_are_those_of_setup_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    extras = run_setup("setup.py", stop_after="init").extras_require
    assert set(MODULES) < set(extras)
    assert all(set(extras[name]) <= set(extras["all"]) for name in MODULES)
    assert all(set(extras[name]) <= set(extras["test"]) for name in MODULES)
    assert {re.split("[<>]", name)[0] for name in extras["demo"]} == {
        "pip",
        "gguf",
        "rouge-score",
        "sacrebleu",
        "matplotlib",
    }
    assert [missing(extra) for extra in MODULES] == [[]] * len(MODULES)


@pytest.mark.usefixtures("_without_extras")
def test_who_needs_an_extra_says_so(recipe: list[str], tmp_path: Path) -> None:
    assert sorted(name for extra in MODULES for name in missing(extra)) == ABSENT
    elastic = 'needs torchft: pip install "dpa_ds[elastic]"'
    metrics = 'needs rouge_score and sacrebleu: pip install "dpa_ds[metrics]"'
    gguf = 'needs gguf: pip install "dpa_ds[gguf]"'
    group = [*recipe, "--cluster.group=0", "--cluster.num_groups=2", "--cluster.rendezvous=localhost:1"]
    with pytest.raises(ConfigError, match=r"^cluster\.group ") as found:
        train.prepare(group)
    assert str(found.value).endswith(elastic)
    with pytest.raises(ConfigError, match=r"^launch/rendezvous\.py ") as found:
        rendezvous.run(recipe)
    assert str(found.value).endswith(elastic)
    assert not list(tmp_path.glob("runs/*"))
    with pytest.raises(ConfigError) as found:
        train.prepare([*recipe, "--evaluation.scores_every_rounds=1"])
    assert str(found.value) == f"evaluation.scores_every_rounds {metrics}"
    with pytest.raises(ConfigError) as found:
        compare.prepare(recipe)
    assert str(found.value) == f"the scores of answers {metrics}"
    run_dir = tmp_path / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(Path(recipe[1]).read_text())
    with pytest.raises(ConfigError) as found:
        evaluate.prepare(["--run", str(run_dir)])
    assert str(found.value) == f"the scores of answers {metrics}"
    for name in ("wandb", "mlflow"):
        with pytest.raises(ConfigError) as found:
            train.prepare([*recipe, f"--tracking.{name}=offline"])
        assert str(found.value).startswith(f"tracking.{name}")
        assert str(found.value).endswith(f' needs {name}: pip install "dpa_ds[{name}]"')
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError) as found:
        resolve_model(ModelConfig(path=str(tmp_path / "model.gguf")), str(tmp_path))
    assert str(found.value) == f"{tmp_path / 'model.gguf'}, a GGUF file, {gguf}"
    with pytest.raises(ConfigError) as found:
        prepare_model(tmp_path / "cache")
    assert str(found.value) == f"the demo's model {gguf}"


def test_training_needs_none_of_them(tmp_path: Path, model: Path, federation: Path) -> None:
    """Results are there, and instead of a picture there is a line (20 s: a process of its own, with its imports)."""
    words = tiny.recipe(model, federation, tmp_path / "runs", federation__num_rounds=1)
    ended = run([PYTHON, "-c", WITHOUT, *words])
    assert ended.returncode == 0, ended.output
    assert 'no pictures, which need matplotlib: pip install "dpa_ds[figures]"' in ended.output
    assert ended.num_tracebacks == 0
    run_dir = tmp_path / "runs" / "tiny"
    assert (run_dir / "results.json").is_file()
    assert not (run_dir / "held_out_loss.png").exists()
