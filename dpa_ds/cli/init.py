"""Entry point of launch/init.py: a recipe and a job script to edit."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpa_ds.cli.args import option, parse, refuse_unknown
from dpa_ds.cli.bootstrap import run_alone
from dpa_ds.config.paths import expand
from dpa_ds.config.shipped import SHIPPED, as_started_here, find_recipe, job_script_names, recipe_names
from dpa_ds.errors import ConfigError, storage_errors


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Copies a recipe and a job script of the package into a folder, for you to edit. Nothing is overwritten.

    python launch/init.py [NAME] [DIR]: NAME is a recipe (default: own_data), DIR a folder (default: the working
    directory). --list names the recipes and the job scripts.

    examples
      python launch/init.py
      python launch/init.py demo my_first_run
      python launch/init.py llama2_7b runs_of_may --job train_groups
    """

    job: str = option("NAME", "train")
    """Job script for Slurm, without its ending; none: the recipe alone."""
    list: bool = option("true", False)
    """Name what there is, and copy nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Copy them in one process, without a launcher; the exit status."""
    return run_alone(partial(run, argv))


def run(argv: Sequence[str] | None) -> None:
    """Copy the recipe and the job script, and say what to do next.

    Raises:
        ConfigError: no such recipe or job script, or a file that is there already; nothing was copied.
    """
    options, others = parse(argv, InitOptions, "python launch/init.py [NAME] [DIR]")
    words = [word for word in others if not word.startswith("-")]
    unknown = [word for word in others if word.startswith("-")]
    refuse_unknown([*unknown, *words[2:]], InitOptions)
    if options.list:
        sys.stdout.write(_list())
        return
    name, folder = words + ["own_data", "."][len(words) :]
    sources = [find_recipe(name)]
    if options.job != "none":
        sources.append(_find_job_script(options.job))
    target = expand(folder, "DIR")
    copies = [target / source.name for source in sources]
    for copy in copies:
        if os.path.lexists(copy):
            raise ConfigError(f"{copy} is there already, and is not overwritten: move it away, or give another folder")
    with storage_errors(target, "choose another folder"):
        target.mkdir(parents=True, exist_ok=True)
        for source, copy in zip(sources, copies, strict=True):
            shutil.copyfile(source, copy)
    sys.stdout.write(_next_steps(copies))


def _find_job_script(name: str) -> Path:
    if name not in job_script_names():
        raise ConfigError(f"--job {name[:80]!r} is not a job script: it is none or {', '.join(job_script_names())}")
    return SHIPPED / "launch" / "slurm" / f"{name}.sbatch"


def _list() -> str:
    """Names of the recipes with what their first line says, and of the job scripts."""
    lines = ["recipes"]
    for name in recipe_names():
        says = find_recipe(name).read_text(encoding="utf-8").splitlines()[0]
        lines.append(f"  {name:14}{says.removeprefix('# ')}")
    return "\n".join([*lines, "", f"job scripts: {', '.join(job_script_names())}", ""])


def _next_steps(copies: Sequence[Path]) -> str:
    recipe, *jobs = copies
    lines = [
        f"wrote {' and '.join(map(str, copies))}",
        "1. edit the recipe: model.path and data.path, and what is marked EDIT",
        as_started_here(f"2. see what would run: python launch/run.py --config {recipe} --print_config"),
        as_started_here(f"3. train: python launch/run.py --config {recipe}"),
    ]
    for job in jobs:
        lines.append(f"   or, under Slurm, with its lines marked EDIT: sbatch {job} --config {recipe}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
