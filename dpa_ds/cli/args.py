"""From the command line of a program that uses a trained run to its RunConfig: `--run runs/NAME [--option VALUE ...]`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dpa_ds.config.load import load_config
from dpa_ds.config.schema import RunConfig
from dpa_ds.config.validate import diff_configs, fingerprint_sections
from dpa_ds.errors import ConfigError

SHORT = {
    "clients": "evaluation.clients",
    "tasks": "evaluation.tasks",
    "split": "evaluation.split",
    "instances": "evaluation.instances_per_task",
    "weighting": "weighting.kind",
    "lambda": "weighting.scale",
    "alpha": "weighting.scale",
    "beams": "generation.num_beams",
    "max_new_tokens": "generation.max_new_tokens",
}
"""Options of these programs and the fields that they set."""
_MAY_DIFFER = {"model.path", "model.precision", "data.path", "data.test_path", "data.num_clients"}


def load_run_config(argv: Sequence[str], usage: str) -> RunConfig:
    """The recipe of the run that `--run` names, with overrides of what does not belong to its training.

    ConfigError: no such run, an unknown option, a field that the run was trained with, or --alpha where the weight is not
    fixed. SystemExit(0): --help, which prints `usage`.
    """
    if any(word in ("-h", "--help") for word in argv):
        sys.stdout.write(usage.rstrip() + "\n")
        raise SystemExit(0)
    options = _options(argv)
    if "run" not in options:
        raise ConfigError("no run: give one with --run runs/NAME (a folder that launch/run.py wrote; see --help)")
    run_dir = Path(options.pop("run")).expanduser()
    recipe = run_dir / "config.yaml"
    if not os.path.isfile(recipe):  # unlike Path.is_file it takes any path
        found = sorted(path.parent.name for path in run_dir.absolute().parent.glob("*/config.yaml"))
        there = f"; runs beside it: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}" if found else ""
        raise ConfigError(f"--run {run_dir}: no such run (no {recipe}): give a folder that launch/run.py wrote{there}")
    base = ["--config", str(recipe), f"--name={run_dir.absolute().name}", f"--output_dir={run_dir.absolute().parent}"]
    trained = fingerprint_sections(load_config(base))
    config = load_config([*base, *(f"--{key}={value}" for key, value in options.items())])
    changed = {key: value for key, value in fingerprint_sections(config).items() if key not in _MAY_DIFFER}
    differences = diff_configs({key: trained[key] for key in changed}, changed)
    if differences:
        raise ConfigError(
            f"{run_dir} was trained with another value ({'; '.join(differences)}): leave that option out, or train a run "
            "of its own with it"
        )
    if config.weighting.kind != "fixed" and any(word.partition("=")[0] == "--alpha" for word in argv):
        raise ConfigError(
            f"--alpha is the weight of --weighting fixed, but weighting.kind is {config.weighting.kind}: add --weighting "
            "fixed, or give the scale of the similarity with --lambda"
        )
    return config


def take_options(argv: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options `names` (`--name VALUE` or `--name=VALUE`) with their values, and all other words.

    ConfigError: an option without a value.
    """
    taken: dict[str, str] = {}
    others, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in names:
            others.append(word)
            continue
        if not has_value and (not rest or rest[0].startswith("--")):
            raise ConfigError(f"--{name} needs a value: --{name} VALUE (see --help)")
        taken[name] = value if has_value else rest.pop(0)
    return taken, others


def _options(argv: Sequence[str]) -> dict[str, str]:
    """`--name VALUE` or `--name=VALUE` -> field of the recipe (or `run`) and its value."""
    options: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}: options look like --name VALUE (see --help)")
        name, has_value, value = word.removeprefix("--").partition("=")
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name} VALUE (see --help)")
            value = rest.pop(0)
        if name in ("local_rank", "local-rank"):  # the DeepSpeed launcher adds it
            continue
        key = SHORT.get(name, name)
        if key != "run" and "." not in key:
            raise ConfigError(
                f"--{name} is not an option; options are --run, {', '.join(f'--{name}' for name in SHORT)}, --section.field"
            )
        options[key] = f"[{value}]" if name in ("clients", "tasks") and not value.startswith("[") else value
    return options
