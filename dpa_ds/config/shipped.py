"""What the package brings beside its code: the recipes, job scripts and programs of launch/, and ds_configs/.

In a checkout they are at its top level. A wheel holds the same folders, with the same names, in dpa_ds/shipped
(setup.py). Whatever a recipe or a command names in them is found in both.
"""

import os
import re
from pathlib import Path

from dpa_ds.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = _PACKAGE / "shipped"
IS_INSTALLED = _IN_WHEEL.is_dir()
"""False where the package is used from a checkout, which an editable install does, too."""
SHIPPED = _IN_WHEEL if IS_INSTALLED else _PACKAGE.parent
"""Folder in which launch/ and ds_configs/ are."""
_COMMANDS = {"run": ("dpa-train", "train"), "preflight": ("dpa-check", "preflight")}
"""Program of launch/ -> its console command and its module in dpa_ds/cli, where these have other names."""
_START = re.compile(r"(?:(?P<launcher>deepspeed|torchrun)(?P<options>[^\n]*?) |python )?launch/(?P<script>\w+)\.py")


def candidates(path: Path) -> list[Path]:
    """Where a file that a user names is looked for: from the working directory, then among those of the package."""
    return list(dict.fromkeys((path, SHIPPED / path)))


def find_file(path: Path, given: str, remedy: str) -> Path:
    """The file or folder that a user names.

    Args:
        given: field or option, for the message.

    Raises:
        ConfigError: it is in none of the places.
    """
    for candidate in candidates(path):
        # A name that no file system takes: who reads it says so.
        if "\0" in str(path) or os.path.lexists(candidate):
            return candidate
    tried = " and ".join(str(candidate.absolute()) for candidate in candidates(path))
    raise ConfigError(f"{given}: no such file: {path} (tried {tried}): {remedy}")


def find_recipe(name: str) -> Path:
    """The recipe of launch/recipes with this name, without its ending.

    Raises:
        ConfigError: there is none.
    """
    path = SHIPPED / "launch" / "recipes" / f"{name}.yaml"
    if name not in recipe_names():
        raise ConfigError(f"--recipe {name[:80]!r} is not a recipe of the package: it has {', '.join(recipe_names())}")
    return path


def recipe_names() -> list[str]:
    """Of launch/recipes, sorted."""
    return sorted(path.stem for path in (SHIPPED / "launch" / "recipes").glob("*.yaml"))


def job_script_names() -> list[str]:
    """Of launch/slurm, sorted."""
    return sorted(path.stem for path in (SHIPPED / "launch" / "slurm").glob("*.sbatch"))


def as_started_here(text: str, is_installed: bool = IS_INSTALLED) -> str:
    """A help or a message, which names programs as a checkout has them, with the console commands of an install."""
    return _START.sub(_command, text) if is_installed else text


def _command(found: re.Match[str]) -> str:
    script = found["script"]
    command, module = _COMMANDS.get(script, (f"dpa-{script.replace('_', '-')}", script))
    match found["launcher"]:
        case "deepspeed":
            return f"deepspeed{found['options']} --module dpa_ds.cli.{module}"
        case "torchrun":
            return f"torchrun{found['options']} -m dpa_ds.cli.{module}"
        case _:
            return command
