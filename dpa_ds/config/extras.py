"""Packages that some runs need and others do not: the extras of setup.py, and what is said where they are absent."""

import importlib.util
from typing import Literal

from dpa_ds.errors import ConfigError

Extra = Literal["elastic", "gguf", "metrics", "figures", "quantization", "wandb", "mlflow"]

MODULES: dict[Extra, tuple[str, ...]] = {
    "elastic": ("torchft",),
    "gguf": ("gguf",),
    "metrics": ("rouge_score", "sacrebleu"),
    "figures": ("matplotlib",),
    "quantization": ("bitsandbytes",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
"""Extra of setup.py -> what is imported of it."""


def missing(extra: Extra) -> list[str]:
    """Modules of the extra that are not installed. Imports none of them."""
    return [name for name in MODULES[extra] if not _is_there(name)]


def require(extra: Extra, what: str) -> None:
    """Refuse a start that would fail later, at an import.

    Args:
        what: needs the extra, for the message.

    Raises:
        ConfigError: it is not installed.
    """
    absent = missing(extra)
    if absent:
        raise ConfigError(f"{what} needs {' and '.join(absent)}: {_remedy(extra)}")


def no_pictures() -> str:
    """What a report says in place of its pictures, where they could not be drawn."""
    return f"no pictures, which need matplotlib: {_remedy('figures')}"


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # half imported, or forbidden
        return False


def _remedy(extra: Extra) -> str:
    return f'pip install "dpa_ds[{extra}]"'
