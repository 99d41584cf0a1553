"""From the options of a program that uses a trained run to its RunConfig: `--run runs/NAME [--option VALUE ...]`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpa_ds.cli.args import fields_of, option, refuse_unknown
from dpa_ds.config.load import load_config
from dpa_ds.config.paths import expand
from dpa_ds.config.schema import RunConfig
from dpa_ds.config.validate import diff_configs, fingerprint_sections
from dpa_ds.errors import ConfigError

_MAY_DIFFER = {
    "model.path",
    "model.precision",
    "model.quantization",
    "data.path",
    "data.test_path",
    "data.test_split",
    "data.field",
    "data.num_clients",
}
"""Fields that may be others than in training: base and data may have moved."""
_MOST_NAMES = 8
"""Runs that a message names."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every program that uses a trained run."""

    run: str = option(
        "runs/NAME",
        missing="no run: give one with --run runs/NAME (a folder that launch/run.py wrote; see --help)",
    )
    """The run, as launch/run.py wrote it."""
    weighting: str | None = option("KIND", None, sets="weighting.kind")
    """Weight of the local adapter: centred_cosine, cosine (the paper's), pearson, l2, fixed, global, local, swapped
    (the published code's convention), none (the base alone); default: the recipe's, else what fits the method."""
    lambda_: str | None = option("X", None, sets="weighting.scale")
    """Scale of the similarity (cosine 0.5, centred_cosine 1.0)."""
    alpha: str | None = option("X", None, sets="weighting.scale")
    """With --weighting fixed: the weight."""
    beams: str | None = option("N", None, sets="generation.num_beams")
    """Beams; 1: greedy (default: the recipe's)."""
    private_dir: str | None = option("FOLDER", None, sets="private_dir")
    """Where what the clients keep to themselves can be seen here (default: the recipe's private_dir)."""
    max_new_tokens: str | None = option("N", None, sets="generation.max_new_tokens")
    """Longest answer, in tokens (default: the recipe's)."""
    temperature: str | None = option("X", None, sets="generation.temperature")
    """Sample answers, with logits divided by X; 0: nothing is sampled (default: the recipe's)."""
    top_k: str | None = option("N", None, sets="generation.top_k")
    """Sample among the N likeliest tokens; 0: among all."""
    top_p: str | None = option("X", None, sets="generation.top_p")
    """Sample among the likeliest tokens that together have this probability."""
    sampling_seed: str | None = option("N", None, sets="generation.seed")
    """Another seed, another answer; the same seed, the same answer to the same prompt."""


def load_run_config(options: RunOptions, others: Sequence[str]) -> RunConfig:
    """The recipe of the run that `--run` names, with overrides of what does not belong to its training.

    Args:
        others: words that are not options of the program: `--section.field VALUE`, which win over its own options.

    Raises:
        ConfigError: no such run, an unknown option, a field that the run was trained with, or --alpha where the weight
            is not fixed.
    """
    _check_words(options, others)
    run_dir = expand(options.run, "--run")
    recipe = run_dir / "config.yaml"
    if not os.path.isfile(recipe):  # unlike Path.is_file it takes any path
        raise ConfigError(
            f"--run {run_dir}: no such run (no {recipe}): give a folder that launch/run.py wrote{_runs_beside(run_dir)}"
        )
    base = ["--config", str(recipe), f"--name={run_dir.absolute().name}", f"--output_dir={run_dir.absolute().parent}"]
    recorded = load_config(base)
    trained = fingerprint_sections(recorded)
    config = load_config([*base, *_overrides(options, others), *others])
    if config.model.precision == "auto":
        config = replace(config, model=replace(config.model, precision=recorded.model.precision))
    changed = {key: value for key, value in fingerprint_sections(config).items() if key not in _MAY_DIFFER}
    differences = diff_configs({key: trained[key] for key in changed}, changed)
    if differences:
        raise ConfigError(
            f"{run_dir} was trained with another value ({'; '.join(differences)}): leave that option out, or train a "
            "run of its own with it"
        )
    if options.alpha is not None and config.weighting.kind != "fixed":
        raise ConfigError(
            f"--alpha is the weight of --weighting fixed, but weighting.kind is {config.weighting.kind}: add "
            "--weighting fixed, or give the scale of the similarity with --lambda"
        )
    return config


def _check_words(options: RunOptions, others: Sequence[str]) -> None:
    """Refuse what has no dot: the recipe's loader would take --beam for a field, and --name for another run."""
    for word in others:
        if word.startswith("--") and word != "--quiet" and "." not in word.partition("=")[0]:
            refuse_unknown([word], type(options), also=["section.field"])


def _overrides(options: RunOptions, others: Sequence[str]) -> list[str]:
    """The program's own options as overrides of the recipe, but for what the user gives by the field's name."""
    given = {word.removeprefix("--").partition("=")[0] for word in others if word.startswith("--")}
    words = []
    for field in fields_of(type(options)):
        key, value = field.metadata["sets"], getattr(options, field.name)
        if not key or value is None or key in given:
            continue
        if isinstance(value, tuple):
            value = f"[{','.join(value)}]"
        words.append(f"--{key}={value}")
    return words


def _runs_beside(run_dir: Path) -> str:
    found = sorted(path.parent.name for path in run_dir.absolute().parent.glob("*/config.yaml"))
    if not found:
        return ""
    if len(found) > _MOST_NAMES:
        found = [*found[:_MOST_NAMES], "..."]
    return f"; runs beside it: {', '.join(found)}"
