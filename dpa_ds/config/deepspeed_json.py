"""The DeepSpeed JSON that `engine.deepspeed_config` names: read, and kept apart from what the recipe owns."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpa_ds.config.validate import REPOSITORY, read_text, show
from dpa_ds.errors import ConfigError

_OBJECTS = (
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "fp16",
    "bf16",
)
_OWNER_OF_DEEPSPEED_KEY = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_size",
    "managed_gradient_accumulation": "train.batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate, train.weight_decay and train.adam_*",
    "scheduler": "train.lr_schedule",
    "fp16.enabled": "model.precision",
    "bf16.enabled": "model.precision",
    "bfloat16.enabled": "model.precision",
    "tensorboard": "tracking.tensorboard",
}


def load_deepspeed_json(path: str) -> dict[str, Any]:
    """Read `engine.deepspeed_config`; a path that does not exist in the working directory may start at the repository.

    ConfigError: missing, unreadable, malformed (with its line), a key given twice, a section that is no object, or keys that
    the recipe owns.
    """
    remedy = "name one of those in ds_configs/"
    candidates = [Path(path).expanduser(), REPOSITORY / Path(path).expanduser()]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    if found is None:
        tried = " and ".join(str(candidate.absolute()) for candidate in dict.fromkeys(candidates))
        raise ConfigError(f"engine.deepspeed_config: no such file: {path} (tried {tried}): {remedy}")
    try:
        content = json.loads(read_text(found, "engine.deepspeed_config", remedy), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{found}, line {error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ConfigError(f"{found}: not a DeepSpeed JSON: nested too deeply") from error
    except ValueError as error:
        raise ConfigError(f"{found}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{found}: a DeepSpeed JSON is an object of keys, got {show(content)}")
    for key in _OBJECTS:
        section, _, inner = key.partition(".")
        value = content.get(section, {}).get(inner, {}) if inner else content.get(section, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{found}: {key} must be an object of keys, got {show(value)}")
    check_deepspeed_owner(content, str(found))
    return content


def check_deepspeed_owner(content: Mapping[str, Any], path: str) -> None:
    """One ConfigError with every key of the DeepSpeed JSON that the recipe owns, and the file to edit."""
    clashes = []
    for key, owner in _OWNER_OF_DEEPSPEED_KEY.items():
        section, _, leaf = key.partition(".")
        inside = content.get(section, {})
        if (not leaf and section in content) or (leaf and isinstance(inside, Mapping) and leaf in inside):
            clashes.append(f"{key} (owned by {owner})")
    if clashes:
        raise ConfigError(
            f"{path} sets what the recipe owns: {', '.join(clashes)}.\nRemove {'it' if len(clashes) == 1 else 'them'} from {path}."
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice} is given twice: keep one")
    return content
